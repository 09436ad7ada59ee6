"""Methods that subtract an expert of negative weight, against float64; all others refuse by name."""

from __future__ import annotations

import json
from contextlib import closing
from importlib.resources import files
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from merge_reference import SHAPES, write_family
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file
from sparse_reference import naive
from transformers import LlamaConfig, LlamaForCausalLM

from hf_frmerge import FisherRaoMerger, MergingArguments
from hf_frmerge.errors import ArgumentError
from hf_frmerge.evaluation.suite.merge_evaluation import models_to_measure
from hf_frmerge.merging.inspection import inspect_experts
from hf_frmerge.merging.record.find_models import MergeModels
from hf_frmerge.merging.record.manifest import read_manifest
from hf_frmerge.methods.table import METHODS
from hf_frmerge.provenance.merge_again import reproduce
from hf_frmerge.provenance.verify import verify

ADDING = [method.name for method in METHODS.values() if method.adds]
WEIGHTS = [3.0, -1.0, -2.0]


def merge(folder: Path, experts: list[str], base: str | None, method: str, **options) -> Path:
    args = MergingArguments(output_dir=str(folder), method=method, **options)
    FisherRaoMerger(experts, args, weights=WEIGHTS[: len(experts)], base_model=base).merge()
    return folder


def tensors(folder: str | Path) -> dict[str, np.ndarray]:
    return {name: value.astype(np.float64) for name, value in load_file(Path(folder) / "model.safetensors").items()}


@pytest.mark.parametrize("method", ADDING)
def test_an_expert_of_negative_weight_is_subtracted(tmp_path: Path, method: str) -> None:
    """Subtracting what an expert learned is adding its negative."""
    base, experts = write_family(tmp_path)
    out = merge(tmp_path / "out", experts, base, method, scale=0.4)
    origin, models = tensors(base), [tensors(expert) for expert in experts]
    for name, merged in tensors(out).items():
        deltas = np.stack([(model[name] - origin[name]).ravel() for model in models])
        signed, sizes = np.sign(WEIGHTS)[:, None] * deltas, np.abs(WEIGHTS)
        if method == "task_arithmetic":
            expected = 0.4 * sizes @ signed
        else:
            places = [(name, deltas.shape[1], SHAPES[name][-1])]
            expected = naive(method, signed, sizes, places, scale=0.4)
        np.testing.assert_allclose((merged - origin[name]).ravel(), expected, rtol=0, atol=5e-7)
    assert verify(str(out)).ok and reproduce(str(out)).identical
    schema = json.loads(files("hf_frmerge.merging.record").joinpath("merge_manifest.schema.json").read_text())
    manifest = json.loads((out / "merge_manifest.json").read_text())
    jsonschema.validate(manifest, schema)
    assert [expert["weight"] for expert in manifest["experts"]] == WEIGHTS


@pytest.mark.parametrize("weights", [[1.0, -0.5], [0.6, 0.4], [2.0, 2.0]])
def test_weights_are_what_deltas_are_multiplied_with(tmp_path: Path, weights: list[float]) -> None:
    """As in mergekit, and in PEFT's `add_weighted_adapter`."""
    base, experts = write_family(tmp_path)
    args = MergingArguments(output_dir=str(tmp_path / "out"), method="task_arithmetic")
    FisherRaoMerger(experts[:2], args, weights=weights, base_model=base).merge()
    origin, (one, other) = tensors(base), (tensors(expert) for expert in experts[:2])
    for name, merged in tensors(tmp_path / "out").items():
        expected = origin[name] + weights[0] * (one[name] - origin[name]) + weights[1] * (other[name] - origin[name])
        np.testing.assert_allclose(merged, expected, rtol=0, atol=1e-6)


def test_weights_by_name_add_a_delta_once_in_the_mean(tmp_path: Path) -> None:
    """They are shares; if all are alike, every delta is added once, as without weights."""
    base, experts = write_family(tmp_path)
    for name, weights in (("by-name", "uniform"), ("plain", None)):
        args = MergingArguments(output_dir=str(tmp_path / name), method="task_arithmetic")
        FisherRaoMerger(experts, args, weights=weights, base_model=base).merge()
    by_name, plain = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("by-name", "plain"))
    assert by_name == plain
    args = MergingArguments(output_dir=str(tmp_path / "nan"), method="task_arithmetic")
    with closing(FisherRaoMerger(experts, args, weights="nan", base_model=base).plan()) as plan:
        assert sum(plan.weights) == pytest.approx(3)


@pytest.mark.parametrize("weights", [None, [3.0, 1.0, 0.5]])
def test_lengths_are_told_by_shares(tmp_path: Path, weights: list[float] | None) -> None:
    """A sum of N deltas at right angles is about the square root of N times as long as they are, and so it is told."""
    base, experts = write_family(tmp_path)
    args = MergingArguments(output_dir=str(tmp_path / "out"), method="task_arithmetic")
    FisherRaoMerger(experts, args, weights=weights, base_model=base).merge()
    origin, models = tensors(base), [tensors(expert) for expert in experts]
    factors = np.array(weights or [1.0, 1.0, 1.0])
    for name, tensor in read_manifest(tmp_path / "out").tensors.items():
        deltas = np.stack([(model[name] - origin[name]).ravel() for model in models])
        mean = (factors / factors.sum()) @ np.linalg.norm(deltas, axis=1)
        assert tensor.geometry is not None
        assert tensor.geometry.norm_ratio == pytest.approx(np.linalg.norm(factors @ deltas) / mean, rel=1e-5)
        linear = np.linalg.norm(factors @ deltas) / factors.sum() / mean
        assert tensor.geometry.linear_norm_ratio == pytest.approx(linear, rel=1e-5)


def test_an_inspection_weighs_by_shares(tmp_path: Path) -> None:
    base, experts = write_family(tmp_path)
    found = []
    for method in ("karcher", "task_arithmetic"):
        with closing(FisherRaoMerger(experts, MergingArguments(method=method), None, base).plan()) as plan:
            found.append([tensor.deltas for tensor in inspect_experts(plan).tensors])
    assert found[0] == found[1]


@pytest.mark.parametrize("method", ["dare_linear", "breadcrumbs", "consensus"])
def test_a_weight_counts_as_often_in_all_that_add(tmp_path: Path, method: str) -> None:
    """Weights of two are a scale of two, bit for bit."""
    base, experts = write_family(tmp_path)
    for name, weights, scale in (("weights", [2.0, 2.0, 2.0], 0.5), ("scale", None, 1.0)):
        args = MergingArguments(output_dir=str(tmp_path / name), method=method, scale=scale)
        FisherRaoMerger(experts, args, weights=weights, base_model=base).merge()
    by_weights, by_scale = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("weights", "scale"))
    assert by_weights == by_scale


def test_opposite_weights_of_one_expert_leave_the_base(tmp_path: Path) -> None:
    base, experts = write_family(tmp_path)
    args = MergingArguments(output_dir=str(tmp_path / "out"), method="task_arithmetic")
    FisherRaoMerger([experts[0], experts[0]], args, weights=[1.0, -1.0], base_model=base).merge()
    for name, merged in tensors(tmp_path / "out").items():
        np.testing.assert_array_equal(merged, tensors(base)[name])


@pytest.mark.parametrize("options", [{}, {"adapter_rank": 4}], ids=["exact", "recompressed"])
def test_adapters_are_subtracted(tmp_path: Path, options: dict) -> None:
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=32
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    for name in "ab":
        model = LlamaForCausalLM.from_pretrained(tmp_path / "base")
        lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        get_peft_model(model, lora).save_pretrained(tmp_path / name)
    experts = [str(tmp_path / name) for name in "ab"]
    out = merge(tmp_path / "out", experts, None, "task_arithmetic", **options)

    def delta(folder: Path) -> np.ndarray:
        model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tmp_path / "base"), folder).double()
        layer = model.base_model.model.model.layers[0].self_attn.q_proj
        return layer.get_delta_weight("default").detach().numpy()

    a, b, merged = delta(tmp_path / "a"), delta(tmp_path / "b"), delta(out)
    expected = 3 * a - b
    np.testing.assert_allclose(merged, expected, rtol=0, atol=3e-6 * np.abs(expected).max())
    assert verify(str(out)).ok


def test_other_methods_refuse_before_they_read(tmp_path: Path) -> None:
    base, experts = write_family(tmp_path)
    for method in ("karcher", "ties", "tsv_m"):
        with pytest.raises(ArgumentError, match=f"must not be negative with method='{method}'"):
            merge(tmp_path / "out", experts, base, method)
    rules = [r"q_proj=1,-1,0"]
    with pytest.raises(ArgumentError, match=r"Weight rule 'q_proj=1,-1,0': `weights` must not be negative"):
        FisherRaoMerger(experts, MergingArguments(weight_rules=rules), base_model=base).plan()
    out = MergingArguments(output_dir=str(tmp_path / "ruled"), method="task_arithmetic", weight_rules=rules)
    FisherRaoMerger(experts, out, base_model=base).merge()  # what the message says
    name = next(name for name in SHAPES if "q_proj" in name)
    models = [tensors(expert)[name] for expert in experts]
    expected = tensors(base)[name] + models[0] - models[1]
    np.testing.assert_allclose(tensors(tmp_path / "ruled")[name], expected, rtol=0, atol=1e-6)


def test_a_gradient_may_cross_zero(tmp_path: Path) -> None:
    base, experts = write_family(tmp_path, 2)
    args = MergingArguments(output_dir=str(tmp_path / "out"), method="task_arithmetic", weight_rules=["layers=1,1:-1"])
    FisherRaoMerger(experts, args, base_model=base).merge()
    first, second = (f"model.layers.{layer}.mlp.up_proj.weight" for layer in (0, 1))
    origin, (a, b) = tensors(base), (tensors(expert) for expert in experts)
    merged = tensors(tmp_path / "out")
    np.testing.assert_allclose(merged[first], a[first] + b[first] - origin[first], rtol=0, atol=1e-6)
    np.testing.assert_allclose(merged[second], origin[second] + a[second] - b[second], rtol=0, atol=1e-6)


def test_a_merge_that_subtracts_is_not_fitted(tmp_path: Path) -> None:
    base, experts = write_family(tmp_path, 2)
    args = MergingArguments(output_dir=str(tmp_path / "out"), method="task_arithmetic")
    with pytest.raises(ArgumentError, match="has a negative weight, to be subtracted"):
        FisherRaoMerger(experts, args, weights=[1.0, -1.0], base_model=base, calibration_dataset=["a text"]).merge()


def test_what_was_subtracted_is_not_asked_for_in_an_evaluation() -> None:
    models = MergeModels(["org/a", "org/b", "org/c"], [0.5, -0.25, 0.25])
    assert models_to_measure(models, "merged").weights == {"a": 0.5, "b": 0.0, "c": 0.25}
    assert models_to_measure(MergeModels(["org/a", "org/b"], [0.0, -1.0]), "merged").weights is None
