"""Experts that are merged one after the other: OPCM by the paper's formulas in float64, and recursive means."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from adapter_merges import make_adapter, peft_deltas
from merge_reference import SHAPES, naive_karcher, random_model, write_family, write_model
from safetensors.numpy import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from hf_frmerge import FisherRaoMerger, MergingArguments
from hf_frmerge.errors import ArgumentError
from hf_frmerge.methods.spectral.continual import without_disturbance
from hf_frmerge.provenance.merge_again import reproduce
from hf_frmerge.provenance.verify import verify
from hf_frmerge.weighting.continual import read_before

MATRICES = [name for name in SHAPES if "proj" in name]
Model = dict[str, np.ndarray]


def tensors(folder: str | Path) -> Model:
    return {name: value.astype(np.float64) for name, value in load_file(Path(folder) / "model.safetensors").items()}


def norm(model: Model) -> float:
    return float(np.sqrt(sum((value**2).sum() for value in model.values())))


def naive_projection(merged: np.ndarray, new: np.ndarray, share: float) -> np.ndarray:
    """Section 4 of the paper, with the full U and V, element by element of P."""
    left, values, right = np.linalg.svd(merged, full_matrices=True)
    shares = np.cumsum(values) / values.sum()
    leading = next((i for i, part in enumerate(shares) if part > share), len(values))
    p = left.T @ new @ right.T
    for i in range(np.linalg.matrix_rank(merged)):  # the others are directions of no value
        p[i, i] = 0.0
    p[:leading, :leading] = 0.0
    return left @ p @ right


def naive_opcm(deltas: list[Model], share: float, *, whole: bool = False) -> Model:
    """One delta after the other, as dense deltas with lambda and the mean of the norms; `whole`: all are matrices."""
    merged, growth, mean = deltas[0], 1.0, norm(deltas[0])
    for t, new in enumerate(deltas[1:], start=2):
        kept = {n: naive_projection(merged[n], new[n], share) if whole or n in MATRICES else new[n] for n in new}
        added = {name: growth * merged[name] + kept[name] for name in new}
        mean = ((t - 1) * mean + norm(new)) / t
        growth = norm(added) / mean
        merged = {name: value / growth for name, value in added.items()}
    return merged


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (7, 7)])
@pytest.mark.parametrize("share", [0.5, 0.05, 1.0])
def test_the_thin_form_is_the_full_one(shape: tuple[int, int], share: float) -> None:
    merged, new = np.random.default_rng(0).normal(size=(2, *shape))
    actual = without_disturbance(merged.astype(np.float32), new.astype(np.float32), share).astype(np.float64)
    np.testing.assert_allclose(actual, naive_projection(merged, new, share), rtol=0, atol=1e-5)
    assert abs((actual * merged).sum()) < 1e-4  # orthogonal to the merge
    if share == 1.0:  # nothing is left of what the merge has
        assert np.abs(without_disturbance(merged.astype(np.float32), merged.astype(np.float32), 1.0)).max() < 1e-5


def test_a_merge_that_is_zero_disturbs_nothing() -> None:
    new = np.ones((3, 4), np.float32)
    np.testing.assert_array_equal(without_disturbance(np.zeros((3, 4), np.float32), new, 0.5), new)


@pytest.mark.parametrize("share", [0.5, 0.8])
def test_opcm_over_four_experts(tmp_path: Path, share: float) -> None:
    base, experts = write_family(tmp_path, 4)
    args = MergingArguments(output_dir=str(tmp_path / "two"), method="opcm", density=share)
    merger = FisherRaoMerger(experts[:2], args, base_model=base).merge()
    origin = tensors(base)
    deltas = [{name: value - origin[name] for name, value in tensors(expert).items()} for expert in experts]
    for count, folder in ((2, "two"), (3, "three"), (4, "four")):
        if count > 2:
            merger = merger.add_expert(experts[count - 1], str(tmp_path / folder))
        merged = {name: value - origin[name] for name, value in tensors(tmp_path / folder).items()}
        expected = naive_opcm(deltas[:count], share)
        for name in SHAPES:
            np.testing.assert_allclose(merged[name], expected[name], rtol=0, atol=2e-5)
        mean = np.mean([norm(delta) for delta in deltas[:count]])
        assert norm(merged) == pytest.approx(mean, rel=1e-5)
        assert read_before(str(tmp_path / folder)).n_experts == count
        assert verify(str(tmp_path / folder)).ok
    assert reproduce(str(tmp_path / "four")).identical


def test_opcm_of_adapters_is_an_adapter_that_goes_on(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = tmp_path / "base"
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(base)
    experts = [
        make_adapter(base, tmp_path / f"a{i}", i, r=1 + i, lora_alpha=3, target_modules=["q_proj", "down_proj"])
        for i in range(3)
    ]
    merged = str(experts[0])
    for number, expert in enumerate(experts[1:]):
        out = tmp_path / f"m{number}"
        FisherRaoMerger([merged, str(expert)], MergingArguments(str(out), method="opcm", density=0.5)).merge()
        merged = str(out)
    expected = naive_opcm([peft_deltas(base, expert) for expert in experts], 0.5, whole=True)
    actual = peft_deltas(base, Path(merged))
    for name, delta in expected.items():
        assert np.linalg.norm(actual[name] - delta) < 1e-5 * np.linalg.norm(delta)
    assert read_before(merged).n_experts == 3
    assert verify(merged).problems == []


def test_a_recursive_mean_counts_the_merge_as_often_as_it_has_experts(tmp_path: Path) -> None:
    _, experts = write_family(tmp_path, 4)
    first = FisherRaoMerger(experts[:2], MergingArguments(output_dir=str(tmp_path / "two"))).merge()
    last = first.add_expert(experts[2], str(tmp_path / "three")).add_expert(experts[3], str(tmp_path / "four"))
    assert last.weights == pytest.approx([3 / 4, 1 / 4])
    points = [tensors(expert) for expert in experts]
    for name in SHAPES:
        mean = naive_karcher(np.stack([points[0][name].ravel(), points[1][name].ravel()]), [0.5, 0.5])
        for count, point in ((2, points[2]), (3, points[3])):
            mean = naive_karcher(np.stack([mean, point[name].ravel()]), [count / (count + 1), 1 / (count + 1)])
        np.testing.assert_allclose(tensors(tmp_path / "four")[name].ravel(), mean, rtol=0, atol=2e-6)
    assert verify(str(tmp_path / "four")).ok and reproduce(str(tmp_path / "four")).identical


def test_a_recursive_linear_mean_is_the_mean_of_all(tmp_path: Path) -> None:
    base, experts = write_family(tmp_path, 5)
    args = MergingArguments(output_dir=str(tmp_path / "a"), method="linear")
    merger = FisherRaoMerger(experts[:3], args, base_model=base).merge()
    merger = merger.add_expert(experts[3], str(tmp_path / "b")).add_expert(experts[4], str(tmp_path / "c"))
    for name, value in tensors(tmp_path / "c").items():
        mean = np.mean([tensors(expert)[name] for expert in experts], axis=0)
        np.testing.assert_allclose(value, mean, rtol=0, atol=1e-6)


def test_opcm_refuses_what_it_cannot_go_on_with(tmp_path: Path) -> None:
    base, experts = write_family(tmp_path, 3)
    linear = MergingArguments(output_dir=str(tmp_path / "mean"), method="linear")
    merger = FisherRaoMerger(experts[:2], linear, base_model=base).merge()
    with pytest.raises(ArgumentError, match="goes on with its own merges only"):
        merger.add_expert(experts[2], str(tmp_path / "next"), method="opcm")
    merger.add_expert(experts[2], str(tmp_path / "next"))  # what the message says
    opcm = MergingArguments(output_dir=str(tmp_path / "out"), method="opcm")
    with pytest.raises(ArgumentError, match="finds weights and scale itself"):
        FisherRaoMerger(experts[:2], opcm, weights=[1.0, 2.0], base_model=base).merge()
    with pytest.raises(ArgumentError, match="joins exactly 2 experts"):
        FisherRaoMerger(experts, opcm, base_model=base).merge()
    twins = [write_model(tmp_path / f"twin{i}", random_model(0)) for i in range(2)]
    with pytest.raises(ArgumentError, match="there is nothing to merge"):
        FisherRaoMerger(twins, opcm, base_model=base).merge()
    with pytest.raises(RuntimeError, match="`add_expert` needs a merged model"):
        FisherRaoMerger(experts, linear).add_expert(experts[0], str(tmp_path / "x"))
