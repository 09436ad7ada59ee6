"""Activation statistics against numpy on all activations at once."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel

from hf_frmerge.evaluation.measures.collapse import ActivationStatistics, effective_rank


def reference(tokens: np.ndarray) -> tuple[float, float]:
    """Mean variance over features; exponential of the entropy of the covariance's eigenvalues, as singular values."""
    centred = tokens - tokens.mean(axis=0)
    eigenvalues = np.linalg.svd(centred, compute_uv=False) ** 2
    share = eigenvalues[eigenvalues > 0] / eigenvalues.sum()
    return float((centred**2).mean()), math.exp(-(share * np.log(share)).sum())


def batches(
    seed: int = 0, n: int = 5, dtype: torch.dtype = torch.float32
) -> list[tuple[list[torch.Tensor], torch.Tensor]]:
    """Two layers of different widths, far from zero on average, and a mask that pads left, right or not at all."""
    rng = np.random.default_rng(seed)
    result = []
    for index in range(n):
        states = [
            torch.from_numpy(50 + rng.standard_normal((3, 20, width)) * rng.uniform(0.1, 3, width)).to(dtype)
            for width in (8, 12)
        ]
        mask = torch.ones(3, 20, dtype=torch.int64)
        if index % 3 == 0:
            mask[1, :7] = 0
        elif index % 3 == 1:
            mask[2, 13:] = 0
        result.append((states, mask))
    return result


def measured(parts: list[tuple[list[torch.Tensor], torch.Tensor]]) -> list[tuple[float, float]]:
    statistics = ActivationStatistics()
    for states, mask in parts:
        statistics.update(states, mask)
    return [(row.activation_variance, row.effective_rank) for row in statistics.results("m")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streamed_moments_are_those_of_all_tokens_without_padding(dtype: torch.dtype) -> None:
    parts = batches(dtype=dtype)
    for layer, actual in enumerate(measured(parts)):
        tokens = np.concatenate([states[layer][mask.bool()].double().numpy() for states, mask in parts])
        assert actual == pytest.approx(reference(tokens), rel=1e-6)


def test_what_is_under_the_padding_and_the_order_do_not_matter() -> None:
    parts = batches()
    rubbish = [
        ([torch.where(mask.bool()[..., None], layer, torch.nan) for layer in states], mask) for states, mask in parts
    ]
    assert measured(rubbish) == measured(parts)
    assert np.array(measured(parts[::-1])) == pytest.approx(np.array(measured(parts)), rel=1e-9)


def test_batches_do_not_matter() -> None:
    parts = batches()
    one = [([torch.cat([states[layer] for states, _ in parts]) for layer in (0, 1)], torch.cat([m for _, m in parts]))]
    assert np.array(measured(one)) == pytest.approx(np.array(measured(parts)), rel=1e-6)


@pytest.mark.parametrize("shift", [0.0, 1e3])
def test_small_variance_beside_a_large_mean(shift: float) -> None:
    states = shift + 1e-2 * torch.from_numpy(np.random.default_rng(0).standard_normal((4, 50, 6))).float()
    [actual] = measured([([states], torch.ones(4, 50))])
    assert actual == pytest.approx(reference(states.double().flatten(0, 1).numpy()), rel=1e-6)


def test_effective_rank_of_known_spectra() -> None:
    assert effective_rank(torch.eye(7, dtype=torch.float64)) == pytest.approx(7)
    assert effective_rank(torch.zeros(3, 3, dtype=torch.float64)) == 0
    assert math.isnan(effective_rank(torch.full((3, 3), torch.inf, dtype=torch.float64)))
    rank_one = torch.outer(*2 * [torch.arange(5, dtype=torch.float64)])
    assert effective_rank(rank_one) == pytest.approx(1, abs=1e-9)
    two = torch.diag(torch.tensor([0.75, 0.25, 0.0], dtype=torch.float64))
    assert effective_rank(two) == pytest.approx(math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)))


def test_padding_side_of_an_encoder_does_not_matter() -> None:
    torch.manual_seed(0)
    model = BertModel(
        BertConfig(vocab_size=30, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    ).eval()
    # Position ids follow the tokens, as tokenizers that pad on the left have models do.
    tokens, positions = torch.arange(2, 12)[None], torch.arange(10)[None]
    actual = []
    for before, after in ((0, 0), (4, 0), (0, 4)):
        pad = torch.nn.functional.pad
        mask = pad(torch.ones_like(tokens), (before, after))
        with torch.inference_mode():
            output = model(
                pad(tokens, (before, after)),
                attention_mask=mask,
                position_ids=pad(positions, (before, after)),
                output_hidden_states=True,
            )
        actual.append(np.array(measured([(list(output.hidden_states), mask)])))
    np.testing.assert_allclose(actual[1], actual[0], rtol=1e-4)
    np.testing.assert_allclose(actual[2], actual[0], rtol=1e-4)
