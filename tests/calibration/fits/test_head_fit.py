"""The fit of a head: against the closed form in float64, on what transformers' models give."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from refinement_models import MODELS, N_EXPERTS, padded, prompts, save_models
from torch import Tensor

from hf_frmerge.calibration.blocks.blockwise_model import BlockwiseModel
from hf_frmerge.calibration.blocks.streams import Batch
from hf_frmerge.calibration.blocks.weights import WeightReader
from hf_frmerge.calibration.fits.head_fit import find_head, fit_head
from hf_frmerge.calibration.fits.sweep_state import SweepOptions, SweepState
from hf_frmerge.calibration.sweep import Sweep
from hf_frmerge.kernels.load import load_kernels
from hf_frmerge.merging.arguments.merging_arguments import MergingArguments
from hf_frmerge.merging.planning.build_plan import build_plan

RIDGE, SHARES = 0.03, [0.25, 0.75]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_models(folder)
    return folder


def state_of(models: Path, kind: str) -> SweepState:
    """A linear merge of two experts, twelve prompts of each to fit it to, and four that are held out; in float32."""
    experts = [str(models / kind / f"full{number}") for number in range(N_EXPERTS)]
    plan = build_plan(experts, MergingArguments(method="linear", space="deltas"), SHARES, str(models / kind / "base"))
    model = BlockwiseModel(*MODELS[kind], torch.device("cpu"), torch.float32)
    batches = [
        Batch(expert, padded(prompts(expert)[rows]), is_held_out)
        for expert in range(N_EXPERTS)
        for is_held_out, rows in ((False, slice(0, 12)), (True, slice(12, 16)))
    ]
    reader = WeightReader(plan, load_kernels("cpu"), model)
    options = SweepOptions(fits_outer=True)
    sweep = Sweep(model, reader, batches, SHARES, options, is_full=True, offers_table=True)
    sweep.begin()
    assert sweep.head == find_head(model.model)
    return sweep.state


def expert_of(models: Path, kind: str, number: int) -> torch.nn.Module:
    model: torch.nn.Module = MODELS[kind][0].from_pretrained(models / kind / f"full{number}", dtype=torch.float64)
    return model.eval()


def head_of(models: Path, kind: str, name: str) -> Tensor:
    model = MODELS[kind][0].from_pretrained(models / kind / name, dtype=torch.float64)
    weight: Tensor = model.get_output_embeddings().weight.detach()
    return weight


def entering_head(model: torch.nn.Module, rows: slice, expert: int) -> Tensor:
    """What enters the head on some prompts, without padding, `(tokens, I)`."""
    inputs = padded(prompts(expert)[rows])
    with torch.no_grad():
        hidden = model.base_model(**inputs).last_hidden_state
    return hidden[inputs["attention_mask"].bool()]


def outputs(model: torch.nn.Module, expert: int) -> Tensor:
    """Predictions on held-out prompts, as points of the sphere."""
    inputs = padded(prompts(expert)[12:16])
    with torch.no_grad():
        logits = model(**inputs).logits[inputs["attention_mask"].bool()]
    return logits.softmax(-1).sqrt()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_head_is_the_closed_form_on_what_enters_those_of_the_experts(models: Path, kind: str) -> None:
    state = state_of(models, kind)
    head = find_head(state.model.model)
    assert head is not None and head.is_embedding == (kind == "gpt2")
    experts = [expert_of(models, kind, number) for number in range(N_EXPERTS)]
    own = [head_of(models, kind, f"full{number}") for number in range(N_EXPERTS)]
    base = head_of(models, kind, "base")
    start = base + sum(share * (weight - base) for share, weight in zip(SHARES, own))
    grams = []
    for number, expert in enumerate(experts):
        x = entering_head(expert, slice(0, 12), number)
        grams.append(SHARES[number] * x.T @ x / len(x))
    system = sum(grams) + RIDGE * sum(grams).diagonal().mean() * torch.eye(len(grams[0]), dtype=torch.float64)
    pull = sum((weight - start) @ gram for weight, gram in zip(own, grams))
    expected = start + torch.linalg.solve(system, pull.T).T

    found = fit_head(state, head)
    assert found is not None
    torch.testing.assert_close(start + found.correction_VI.double(), expected, rtol=1e-4, atol=1e-5)

    # The table has the sum of what the experts learned that is nearest in the system of the fit, row by row.
    updates = torch.stack([weight - base for weight in own], dim=1)  # V, N, I
    assert found.coefficients_VN is not None
    seen = updates @ system
    coefficients = torch.linalg.solve(seen @ updates.mT, (seen @ (expected - start)[..., None])[..., 0])
    torch.testing.assert_close(found.coefficients_VN, coefficients, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("kind", ["llama", "tied", "gpt2"])
def test_a_head_is_kept_where_experts_that_get_it_stay_nearer_to_themselves(
    models: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = state_of(models, kind)
    head = find_head(state.model.model)
    assert head is not None
    is_kept = fit_head(state, head) is not None
    monkeypatch.setattr("hf_frmerge.calibration.fits.head_fit._helps", lambda *_: True)
    found = fit_head(state, head)
    assert found is not None
    start = state.reader.start(head.parameter)
    totals = []
    for weight in (start, start + found.correction_VI.float()):
        total = 0.0
        for number in range(N_EXPERTS):
            expert = expert_of(models, kind, number)
            own = outputs(expert, number)
            with torch.no_grad():
                expert.get_output_embeddings().weight.copy_(weight)  # the embedding, too, if they are one
            cosine = (own * outputs(expert, number)).sum(-1).clamp(max=1)
            total += float((2 * torch.arccos(cosine)).square().sum())
        totals.append(total)
    assert is_kept == (totals[1] < 0.8 * totals[0])
    assert is_kept == (kind != "tied")  # both happen


def test_models_without_a_head_that_is_one_matrix_have_none_to_fit() -> None:
    for kind in ("classifier", "headless"):
        model_class, config = MODELS[kind]
        assert find_head(model_class(config)) is None
