"""Stacks of small tensors: the same bits, errors and records as one by one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from merge_reference import merged_reference, random_model, write_model
from safetensors.torch import load_file
from xxhash import xxh3_128_hexdigest

from hf_frmerge.errors import MergeError, NonFiniteError
from hf_frmerge.kernels.interface import Operand
from hf_frmerge.kernels.load import load_kernels
from hf_frmerge.kernels.torch_backend import TorchKernels
from hf_frmerge.merging import run
from hf_frmerge.merging.arguments.merging_arguments import MergingArguments
from hf_frmerge.merging.engine import batches
from hf_frmerge.merging.engine import engine as engine_module
from hf_frmerge.merging.engine.journal import Journal
from hf_frmerge.merging.engine.outcomes import StepObserver
from hf_frmerge.merging.engine.processes import Processes
from hf_frmerge.merging.engine.tensor_stack import TensorStack
from hf_frmerge.merging.operands.dense_tensors import ZeroTensor
from hf_frmerge.merging.operands.low_rank_deltas import LowRankDeltas
from hf_frmerge.merging.operands.open_inputs import open_tensors
from hf_frmerge.merging.outputs.memory_output import MemoryOutput
from hf_frmerge.merging.planning.build_plan import build_plan
from hf_frmerge.merging.planning.plan import MergePlan
from hf_frmerge.methods.post_steps import SingularValueCalibration
from hf_frmerge.provenance.verify import verify

SIZES = [1] * 9 + [3] * 6 + [1, 3, 5] * 2 + [70] * 4  # runs of one size, and sizes in turns


def small_tensors(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """A model of many small tensors, named in the order in which they lie in the file."""
    generator = torch.Generator().manual_seed(seed)
    return {f"t.{i:02d}.weight": torch.randn(n, generator=generator).to(dtype) for i, n in enumerate(SIZES)}


def plan_of(experts: list[str], out: Path, base: str | None = None, **options: Any) -> MergePlan:
    return build_plan(experts, MergingArguments(output_dir=str(out), **options), None, base)


def merge(experts: list[str], out: Path, base: str | None = None, **options: Any) -> dict[str, torch.Tensor]:
    run.run_merge(plan_of(experts, out, base, **options), StepObserver(), Processes())
    return load_file(out / "model.safetensors")


@pytest.fixture(autouse=True)
def stacks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the sizes of all stacks that are made, in batches large enough for them."""
    monkeypatch.setattr(batches, "BATCH_TENSORS", 64)
    sizes: list[int] = []
    stacked = engine_module.stacked

    def seen(*args: Any) -> Any:
        units = stacked(*args)
        sizes.extend(len(unit.tensors) for unit in units if isinstance(unit, TensorStack))
        return units

    monkeypatch.setattr(engine_module, "stacked", seen)
    return sizes


def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "stacked", lambda tensors, layout: tensors)


@pytest.mark.parametrize("dtypes", [(torch.float32,) * 3, (torch.bfloat16, torch.float32, torch.float16)])
@pytest.mark.parametrize(("method", "space"), [("karcher", "weights"), ("nre", "deltas"), ("linear", "weights")])
def test_bits_and_record_are_those_of_tensors_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stacks: list[int], method: str, space: str, dtypes: Any
) -> None:
    experts = [write_model(tmp_path / f"e{i}", small_tensors(i + 1, dtype)) for i, dtype in enumerate(dtypes)]
    base = write_model(tmp_path / "base", small_tensors(0))
    merged = merge(experts, tmp_path / "stacked", base, method=method, space=space)
    assert stacks == [9, 6, 4]
    alone(monkeypatch)
    merge(experts, tmp_path / "alone", base, method=method, space=space)
    for file in ("model.safetensors", "merge_coefficients.safetensors"):
        assert (tmp_path / "stacked" / file).read_bytes() == (tmp_path / "alone" / file).read_bytes()
    records = [json.loads((tmp_path / name / "merge_manifest.json").read_text()) for name in ("stacked", "alone")]
    assert records[0]["tensors"] == records[1]["tensors"]
    assert verify(tmp_path / "stacked").ok
    origin, sources = small_tensors(0), [load_file(f"{expert}/model.safetensors") for expert in experts]
    for name, tensor in merged.items():
        if tensor.numel() > 1:  # single numbers get the plain mean, whatever the method
            points = [source[name] for source in sources]
            expected = merged_reference(method, points, [1, 1, 1], origin[name] if space == "deltas" else None)
            np.testing.assert_allclose(
                tensor.double().numpy(), expected, rtol=1e-2 if dtypes[0] != dtypes[1] else 1e-6
            )
        digest = xxh3_128_hexdigest(tensor.view(torch.uint8).numpy().tobytes())
        assert records[0]["tensors"][name]["output_xxh3_128"] == digest


def test_memory_gets_the_same_bits(tmp_path: Path, stacks: list[int]) -> None:
    experts = [write_model(tmp_path / f"e{i}", small_tensors(i)) for i in range(2)]
    merged = merge(experts, tmp_path / "out")
    plan = plan_of(experts, tmp_path / "memory")
    output = MemoryOutput(plan)
    run.merge_into_memory(plan, output)
    assert stacks == [9, 6, 4] * 2
    for name, tensor in merged.items():
        assert output.tensors[name].tobytes() == tensor.numpy().tobytes()


def test_kernels_whose_blocks_depend_on_each_other_get_tensors_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stacks: list[int]
) -> None:
    experts = [write_model(tmp_path / f"e{i}", small_tensors(i)) for i in range(2)]
    monkeypatch.setattr(run, "load_kernels", TorchKernels)
    merge(experts, tmp_path / "out")
    assert not stacks


def test_tensors_that_lie_apart_in_one_model_are_not_stacked(tmp_path: Path, stacks: list[int]) -> None:
    first, second = small_tensors(0), small_tensors(1)
    wide = {"t.03.weight": second["t.03.weight"].double()}  # wider dtypes come first in a file
    experts = [write_model(tmp_path / "a", first), write_model(tmp_path / "b", second | wide)]
    merged = merge(experts, tmp_path / "out", dtype="float32", method="linear")
    assert stacks == [3, 5, 6, 4]
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, (first[name] + second[name]) / 2)


@pytest.mark.parametrize(
    "more",
    [
        {"low_rank": LowRankDeltas({1: None}, 1)},  # type: ignore[dict-item]
        {"correction": ZeroTensor()},
        {"post_step": SingularValueCalibration(0.0)},
        {"dense": {}},
        {"base": ZeroTensor()},
    ],
)
def test_what_is_more_than_stored_tensors_is_not_stacked(tmp_path: Path, more: dict[str, Any]) -> None:
    experts = [write_model(tmp_path / f"e{i}", small_tensors(i)) for i in range(2)]
    plan = plan_of(experts, tmp_path / "out", write_model(tmp_path / "base", small_tensors(2)), space="deltas")
    first, second = (open_tensors(plan, step) for step in plan.steps[:2])
    assert second.follow(first) and not first.follow(second)
    assert not replace(second, **more).follow(first)
    assert not second.follow(replace(first, **more))


def test_an_input_that_is_not_finite_is_named(tmp_path: Path) -> None:
    bad = small_tensors(1)
    bad["t.04.weight"][0] = torch.nan
    experts = [write_model(tmp_path / "a", small_tensors(0)), write_model(tmp_path / "b", bad)]
    with pytest.raises(NonFiniteError, match=r"1 NaN .* tensor 't\.04\.weight' of expert '.*/b'"):
        merge(experts, tmp_path / "out")


def test_a_result_beyond_the_dtype_is_named_or_saturates(tmp_path: Path) -> None:
    experts = []
    for name, value in (("a", 70_000.0), ("b", 80_000.0)):
        tensors = small_tensors(5)
        tensors["t.11.weight"][1] = value
        experts.append(write_model(tmp_path / name, tensors))
    options: dict[str, Any] = {"dtype": "float16", "method": "linear"}
    with pytest.raises(NonFiniteError, match=r"'t\.11\.weight' would hold values up to 7\.5e\+04"):
        merge(experts, tmp_path / "out", **options)
    merged = merge(experts, tmp_path / "out", overwrite=True, on_overflow="saturate", **options)
    assert float(merged["t.11.weight"][1]) == 65504
    record = json.loads((tmp_path / "out" / "merge_manifest.json").read_text())["tensors"]
    assert {name: entry["n_saturated"] for name, entry in record.items() if "n_saturated" in entry} == {
        "t.11.weight": 1
    }
    assert torch.equal(merged["t.10.weight"], small_tensors(5)["t.10.weight"].half())


def test_zeros_are_measured_again_one_by_one(tmp_path: Path) -> None:
    models = [small_tensors(0), small_tensors(1)]
    for model in models:
        model["t.10.weight"].zero_()
    merged = merge([write_model(tmp_path / f"e{i}", model) for i, model in enumerate(models)], tmp_path / "out")
    assert not merged["t.10.weight"].any()
    np.testing.assert_allclose(
        merged["t.11.weight"].double().numpy(),
        merged_reference("karcher", [model["t.11.weight"] for model in models], [1, 1], None),
        rtol=1e-6,
    )


@pytest.mark.parametrize("done", [0, 1, 12])
def test_a_stack_that_is_interrupted_is_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, done: int
) -> None:
    experts = [write_model(tmp_path / f"e{i}", small_tensors(i) | random_model(i)) for i in range(2)]
    merge(experts, tmp_path / "whole")
    real, left = Journal.record_written, iter(range(done))

    def stop(self: Journal, *args: Any) -> None:
        if next(left, None) is None:
            raise MergeError("stopped")
        real(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "record_written", stop)
        with pytest.raises(MergeError, match="stopped"):
            merge(experts, tmp_path / "out")
    merge(experts, tmp_path / "out", resume_from_checkpoint=True)
    for file in ("model.safetensors", "merge_coefficients.safetensors"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_kernels_give_a_block_the_same_bits_in_company() -> None:
    """What stacks rest on."""
    assert load_kernels("cpu").blocks_are_independent
    kernels, generator = load_kernels("cpu"), np.random.default_rng(0)
    for length in (1, 2, 7, 64, 1000):
        points = [generator.normal(size=(33, length)).astype("f") for _ in range(3)]
        whole = kernels.gram([Operand(p.reshape(-1).view(np.uint8), "F32") for p in points], 33, length, precise=True)
        for block in range(33):
            operands = [Operand(p[block].copy().view(np.uint8), "F32") for p in points]
            assert np.array_equal(kernels.gram(operands, 1, length, precise=True)[0], whole[block])
