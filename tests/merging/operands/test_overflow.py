"""Finite inputs give finite outputs or a refusal, whose advice is followed here."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from merge_reference import naive_karcher, random_model, write_family, write_model
from safetensors.torch import load_file, save_file

from hf_frmerge.checkpoints.tensors.floats import widen
from hf_frmerge.errors import CheckpointError, NonFiniteError
from hf_frmerge.kernels.interface import Operand
from hf_frmerge.kernels.load import load_kernels
from hf_frmerge.kernels.torch_backend import TorchKernels
from hf_frmerge.merging.arguments.merging_arguments import MergingArguments
from hf_frmerge.merging.engine.outcomes import StepObserver
from hf_frmerge.merging.engine.processes import Processes
from hf_frmerge.merging.operands import overflow
from hf_frmerge.merging.operands.tensor_inputs import TensorInputs
from hf_frmerge.merging.planning.build_plan import build_plan
from hf_frmerge.merging.run import run_merge
from hf_frmerge.provenance import verify

NORM = "model.layers.0.norm.weight"
PROJECTION = "model.layers.0.self_attn.q_proj.weight"


def merge(experts: list[str], output: Path, base: str | None = None, **options: Any) -> dict[str, torch.Tensor]:
    """A merge whose output is finite, all of it; what is refused leaves no model."""
    observer = options.pop("observer", StepObserver())
    plan = build_plan(experts, MergingArguments(output_dir=str(output), **options), None, base)
    try:
        run_merge(plan, observer, Processes())
    except NonFiniteError:
        assert not (output / "config.json").exists() and not list(output.glob("*model*.safetensors"))
        raise
    merged = load_file(next(output.glob("*model*.safetensors")))
    assert all(tensor.isfinite().all() for tensor in merged.values())
    assert verify.verify(str(output)).problems == []
    return merged


def with_values(folder: Path, dtype: torch.dtype, values: list[float]) -> list[str]:
    """Two models, in each of which one element of a norm is as given."""
    models = []
    for i, value in enumerate(values):
        tensors = random_model(i, dtype)
        tensors[NORM][3] = value
        models.append(write_model(folder / f"e{i}", tensors))
    return models


@pytest.mark.parametrize("options", [{}, {"method": "linear"}, {"block": "row"}], ids=str)
def test_what_float16_cannot_hold_is_refused_and_bfloat16_holds_it(tmp_path: Path, options: dict[str, Any]) -> None:
    experts = with_values(tmp_path, torch.float32, [70_000.0, 80_000.0])
    with pytest.raises(NonFiniteError, match=r"norm\.weight' would hold .* 7\.5e\+04, .*float16.*e0.*e1") as error:
        merge(experts, tmp_path / "out", dtype="float16", **options)
    assert str(error.value).endswith("Write the model with dtype='bfloat16'.")
    merged = merge(experts, tmp_path / "out", dtype="bfloat16", overwrite=True, **options)
    assert float(merged[NORM][3]) == pytest.approx(75_000, rel=2**-8)


LARGEST = {"float16": 65504.0, "bfloat16": 2.0**128 - 2.0**120, "float32": (2 - 2.0**-23) * 2.0**127}


@pytest.mark.parametrize(
    ("dtype", "values"),
    [
        ("float16", [[70_000.0, -1e9, 65_519.0], [80_000.0, -1e9, 65_519.0]]),
        ("bfloat16", [[1e100, -3.4e38, 3.4e38], [1e100, -3.4e38, 3.4e38]]),
        ("float32", [[1e100, -1e39, 3.4e38], [1e100, -1e39, 3.4e38]]),
    ],
)
@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties"])
def test_saturation_is_numpy_s_clip_of_the_float64_sum(
    tmp_path: Path, dtype: str, values: list[list[float]], method: str
) -> None:
    """Where values are equal, the methods give these; 65519 still rounds to 65504, and is not counted."""
    base = write_model(tmp_path / "base", {n: torch.zeros_like(t) for n, t in random_model(9, torch.float64).items()})
    tensors = random_model(1, torch.float64)
    for name, row in zip(("a", "b"), values):
        tensors[NORM][:3] = torch.tensor(row, dtype=torch.float64)
        write_model(tmp_path / name, tensors)
    args: dict[str, Any] = {"method": method, "dtype": dtype, "scale": 0.5 if method == "task_arithmetic" else 1.0}
    if method == "ties":
        args["density"] = 1.0
    experts = [str(tmp_path / name) for name in "ab"]
    with pytest.raises(NonFiniteError):
        merge(experts, tmp_path / "out", base, space="deltas", **args)
    merged = merge(experts, tmp_path / "out", base, space="deltas", overwrite=True, on_overflow="saturate", **args)
    mean = torch.tensor(np.mean(values, axis=0)) if method != "ties" else torch.tensor(values[0], dtype=torch.float64)
    expected = torch.from_numpy(np.clip(mean.numpy(), -LARGEST[dtype], LARGEST[dtype])).to(getattr(torch, dtype))
    assert torch.equal(merged[NORM][:3], expected)
    record = json.loads((tmp_path / "out" / "merge_manifest.json").read_text())
    n_beyond = int(mean.to(getattr(torch, dtype)).isinf().sum())
    assert record["tensors"][NORM]["n_saturated"] == n_beyond > 0
    assert not any("n_saturated" in entry for name, entry in record["tensors"].items() if name != NORM)
    assert any(f"{n_beyond} merged values were beyond" in note and NORM in note for note in record["notes"])
    assert record["arguments"]["on_overflow"] == "saturate"


@pytest.mark.parametrize("device", ["cpu", "torch"])
@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
def test_saturation_has_the_same_bits_on_every_backend(device: str, dtype: str) -> None:
    kernels = TorchKernels("cpu") if device == "torch" else load_kernels("cpu")
    rng = np.random.default_rng(0)
    largest = LARGEST[{"F16": "float16", "BF16": "bfloat16", "F32": "float32"}[dtype]]
    values = rng.standard_normal((2, 6 * 501)) * largest
    table = rng.standard_normal((6, 2))
    operands = [Operand(row.view(np.uint8), "F64") for row in values]
    out = np.empty(6 * 501 * (4 if dtype == "F32" else 2), np.uint8)
    kernels.combine(operands, table, out, dtype, 6, 501)
    within = overflow.saturate(kernels, operands, table, out, dtype, 501)
    assert within is not None
    first, second = table.repeat(501, axis=0).T * values  # a rounding after each product, and one after the sum
    significand, exponent = np.frexp(first + second)
    digits = {"F16": 2048, "BF16": 256, "F32": 2**24}[dtype]
    rounded = np.ldexp(np.rint(significand * digits) / digits, exponent)  # half to even
    expected = np.clip(rounded, -largest, largest)
    np.testing.assert_array_equal(widen(out, dtype).astype(np.float64), expected)
    assert within[0].is_finite and within[1] == int((np.abs(rounded) > largest).sum()) > 100


@pytest.mark.parametrize(("factor", "dtype"), [(10.0, "F16"), (10.0, "F64")])
def test_a_sum_beyond_float64_is_not_saturated(factor: float, dtype: str) -> None:
    """Of such a sum nobody knows how large it is, nor whether it is a number."""
    operand = Operand(np.full(4, 1e308).view(np.uint8), "F64")
    out = np.zeros(32, np.uint8)
    for table in ([[factor]], [[factor, -factor]]):
        operands = [operand] * len(table[0])
        assert overflow.saturate(load_kernels(), operands, np.array(table), out, dtype, 4) is None


def test_a_resumed_merge_knows_what_was_saturated_before(tmp_path: Path) -> None:
    class Stop(StepObserver):
        def end(self, outcome: Any) -> bool:
            return outcome.step.name != NORM

    experts = with_values(tmp_path, torch.float32, [70_000.0, 80_000.0])
    options: dict[str, Any] = {"dtype": "float16", "on_overflow": "saturate", "num_workers": 1}
    plan = build_plan(experts, MergingArguments(output_dir=str(tmp_path / "out"), **options))
    assert not run_merge(plan, Stop(), Processes()).complete
    merge(experts, tmp_path / "out", resume_from_checkpoint=True, **options)
    record = json.loads((tmp_path / "out" / "merge_manifest.json").read_text())
    assert record["tensors"][NORM]["n_saturated"] == 1


class Skip(StepObserver):
    def begin(self, step: Any) -> bool:
        return step.name != NORM


def test_a_copy_is_looked_at_too(tmp_path: Path) -> None:
    """A skipped tensor is copied, and here converted."""
    experts = with_values(tmp_path, torch.float32, [70_000.0, 1.0])
    with pytest.raises(NonFiniteError, match=r"7e\+04, .*float16: it is 1 times expert .*e0.*dtype='bfloat16'"):
        merge(experts, tmp_path / "out", dtype="float16", observer=Skip())


@pytest.mark.parametrize(
    ("options", "better", "sentence"),
    [
        ({"beta": -5000.0}, {"beta": -1.0}, "nearer to 0"),
        ({"beta": -1e308}, {"beta": -1.0}, "with beta=-1e+308 the coefficients .* Choose one nearer to 0"),
        ({"beta": 1e308}, {"beta": 1.0}, "with beta=1e+308 the coefficients .* Choose one nearer to 0"),
        ({"method": "task_arithmetic", "scale": 1e39}, {"scale": 1.0}, "[Cc]hoose a smaller scale"),
        ({"beta": -9.0, "scale": 1e308, "space": "deltas"}, {"beta": 0.0, "scale": 1.0}, "scale=1e.308 .* Choose"),
    ],
)
@pytest.mark.parametrize("adapters", [False, True])
def test_options_that_leave_the_range_are_refused(
    tmp_path: Path, adapters: bool, options: dict[str, Any], better: dict[str, Any], sentence: str
) -> None:
    base, experts = write_family(tmp_path, 2)
    if adapters:
        experts = [write_adapter(tmp_path / f"a{i}", i) for i in range(2)]
    with pytest.raises(NonFiniteError, match=sentence.replace("+", r"\+")):
        merge(experts, tmp_path / "out", base, **options)
    merge(experts, tmp_path / "out", base, overwrite=True, **options | better)


def test_a_beta_of_everything_is_an_answer_where_points_coincide(tmp_path: Path) -> None:
    model = random_model(0)
    experts = [write_model(tmp_path / f"e{i}", model | {NORM: torch.zeros(24)}) for i in range(2)]
    merged = merge(experts, tmp_path / "out", beta=1e308)
    assert torch.equal(merged[PROJECTION], model[PROJECTION])
    merged = merge(experts, tmp_path / "scaled", experts[0], method="task_arithmetic", scale=0.0)
    assert torch.equal(merged[PROJECTION], model[PROJECTION])


def test_a_median_norm_of_zero_is_an_answer(tmp_path: Path) -> None:
    """Two of three rows are zero, so half of the weight does not exceed 0; of these alone nothing is left."""
    models = [random_model(i) for i in range(3)]
    for model in models[:2]:
        model[PROJECTION][5] = 0
    experts = [write_model(tmp_path / f"e{i}", model) for i, model in enumerate(models)]
    for beta in (0.0, 1.0):
        merged = merge(experts, tmp_path / f"out{beta}", block="row", norm="median", beta=beta)[PROJECTION]
        assert merged.any(dim=1).tolist() == [row != 5 for row in range(24)]
    with pytest.raises(NonFiniteError, match=r"with beta=1e\+308"):
        merge(experts, tmp_path / "out", block="row", norm="median", beta=1e308)


@pytest.mark.parametrize("power", [1000, -1020])
@pytest.mark.parametrize("block", ["tensor", "row", "layer"])
def test_squares_that_leave_float64_are_refused_and_a_power_of_two_brings_them_back(
    tmp_path: Path, power: int, block: str
) -> None:
    models = [random_model(i, torch.float64) for i in range(2)]
    points = np.stack([model[NORM].numpy() for model in models])
    experts = []
    for i, model in enumerate(models):
        experts.append(write_model(tmp_path / f"e{i}", model | {NORM: model[NORM] * 2.0**power}))
    with pytest.raises(NonFiniteError, match=f"'{NORM}': the squares of the values of .*e.* power of two in all"):
        merge(experts, tmp_path / "out", block=block)
    for i, model in enumerate(models):
        write_model(tmp_path / f"e{i}", model)
    merged = merge(experts, tmp_path / "out", overwrite=True)[NORM] * 2.0**power
    np.testing.assert_allclose(merged, naive_karcher(points, [0.5, 0.5]) * 2.0**power, rtol=1e-10)


@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_zeros_of_float64_are_no_vanished_squares(tmp_path: Path, zero: float) -> None:
    models = [random_model(i, torch.float64) | {NORM: torch.full((24,), zero, dtype=torch.float64)} for i in range(2)]
    experts = [write_model(tmp_path / f"e{i}", model) for i, model in enumerate(models)]
    assert not merge(experts, tmp_path / "out")[NORM].any()


def test_the_greatest_numbers_merge_where_the_result_fits(tmp_path: Path) -> None:
    experts = with_values(tmp_path, torch.float32, [3.3e38, 3.4e38])
    assert float(merge(experts, tmp_path / "out")[NORM][3]) == pytest.approx(3.35e38, rel=1e-6)


def test_a_model_with_infinity_in_it_does_not_verify(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as a version without this check wrote."""
    experts = with_values(tmp_path, torch.float32, [70_000.0, 80_000.0])
    kernels = load_kernels()

    def unchecked(self: TensorInputs, k: Any, operands: Any, owners: Any, table: Any, piece: Any, *out: Any) -> str:
        return kernels.combine(operands, np.ascontiguousarray(table), *out, piece.n_blocks, piece.block_len).digest

    monkeypatch.setattr(TensorInputs, "write_sum", unchecked)
    plan = build_plan(experts, MergingArguments(output_dir=str(tmp_path / "out"), dtype="float16"))
    run_merge(plan, StepObserver(), Processes())
    assert load_file(tmp_path / "out" / "model.safetensors")[NORM].isinf().sum() == 1
    monkeypatch.undo()
    problems = verify.verify(str(tmp_path / "out")).problems
    assert len(problems) == 1 and NORM in problems[0] and "not finite in float16" in problems[0]


# Adapters


def write_adapter(folder: Path, seed: int, **config: Any) -> str:
    """An adapter of one projection."""
    folder.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    name = f"base_model.model.{PROJECTION.removesuffix('.weight')}"
    factors = {f"{name}.lora_{side}.weight": torch.randn(shape, generator=generator) for side, shape in SIDES.items()}
    if config.get("use_dora"):
        factors[f"{name}.lora_magnitude_vector"] = torch.rand(24, generator=generator) + 1
    save_file(factors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings | config))
    return str(folder)


SIDES = {"A": (4, 24), "B": (24, 4)}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("lora_alpha", value) for value in (math.nan, math.inf, -math.inf, 1e300, 10**400, "8", True, None, [8])),
        *(("alpha_pattern", {"q_proj": value}) for value in (math.nan, "8", 1e39)),
        *(("r", value) for value in (0, -4, 4.0, "4", True, None)),
        ("rank_pattern", {"q_proj": "4"}),
        ("alpha_pattern", [8]),
    ],
)
@pytest.mark.parametrize("adapter_output", ["adapter", "merged"])
def test_scales_that_are_no_numbers_are_refused_before_the_merge(
    tmp_path: Path, key: str, value: Any, adapter_output: str
) -> None:
    base, _ = write_family(tmp_path, 2)
    adapters = [write_adapter(tmp_path / "good", 0), write_adapter(tmp_path / "bad", 1, **{key: value})]
    with pytest.raises(CheckpointError, match=rf"/bad': {key}.* in adapter_config.json is .*, expected .* Correct it"):
        build_plan(
            adapters, MergingArguments(output_dir=str(tmp_path / "out"), adapter_output=adapter_output), None, base
        )


def test_negative_and_zero_scales_are_numbers(tmp_path: Path) -> None:
    base, _ = write_family(tmp_path, 2)
    adapters = [write_adapter(tmp_path / f"{alpha}", 0, lora_alpha=alpha) for alpha in (-8, 0)]
    merged = merge(adapters, tmp_path / "out", base, method="linear", adapter_output="merged")[PROJECTION]
    factors = load_file(tmp_path / "0" / "adapter_model.safetensors")
    down, up = (factors[f"base_model.model.{PROJECTION.removesuffix('weight')}lora_{s}.weight"] for s in "AB")
    torch.testing.assert_close(merged, load_file(Path(base) / "model.safetensors")[PROJECTION] - up @ down)


@pytest.mark.parametrize("block", ["tensor", "row"])
@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize(("alpha", "values"), [(400, {"B": 1e37}), (4, {"A": 1e30, "B": 1e30})])  # scaled, multiplied
def test_a_delta_that_float32_cannot_hold_is_refused(
    tmp_path: Path, alpha: int, values: dict[str, float], use_dora: bool, block: str
) -> None:
    base, _ = write_family(tmp_path, 2)
    good, bad = (write_adapter(tmp_path / f"{i}", i, use_dora=use_dora, lora_alpha=alpha) for i in range(2))
    merge([good, bad], tmp_path / "out", base, adapter_output="merged", block=block)
    factors = load_file(Path(bad) / "adapter_model.safetensors")
    for side, value in values.items():
        factors[f"base_model.model.{PROJECTION.removesuffix('weight')}lora_{side}.weight"][0, 0] = value
    save_file(factors, Path(bad) / "adapter_model.safetensors")
    with pytest.raises(NonFiniteError, match=f"q_proj.*{bad}|{bad}.*q_proj"):
        merge([good, bad], tmp_path / "out", base, adapter_output="merged", block=block, overwrite=True)


@pytest.mark.parametrize("output", ["adapter", "merged"])
@pytest.mark.parametrize("method", ["iso_c", "core_ties"])
@pytest.mark.parametrize("values", [{"B": 1e38}, {"A": 1e30, "B": 1e30}])
def test_cores_that_float32_cannot_hold_are_refused(
    tmp_path: Path, values: dict[str, float], method: str, output: str
) -> None:
    base, _ = write_family(tmp_path, 2)
    good, bad = (write_adapter(tmp_path / f"{i}", i, lora_alpha=4) for i in range(2))
    merge([good, bad], tmp_path / "out", base, method=method, adapter_output=output)
    factors = load_file(Path(bad) / "adapter_model.safetensors")
    for side, value in values.items():
        factors[f"base_model.model.{PROJECTION.removesuffix('weight')}lora_{side}.weight"][0] = value
    save_file(factors, Path(bad) / "adapter_model.safetensors")
    with pytest.raises(NonFiniteError, match=f"q_proj.*{bad}|{bad}.*q_proj"):
        merge([good, bad], tmp_path / "out", base, method=method, adapter_output=output, overwrite=True)


@pytest.mark.parametrize("block", ["tensor", "layer"])
def test_adapters_whose_squares_leave_float64_are_refused(tmp_path: Path, block: str) -> None:
    adapters = [write_adapter(tmp_path / f"a{i}", i) for i in range(2)]
    path = tmp_path / "a1" / "adapter_model.safetensors"
    save_file({name: factor.double() * 1e80 for name, factor in load_file(path).items()}, path)
    with pytest.raises(
        NonFiniteError, match=r"layers\.0.*' *: the squares of the values of its experts leave .* lora_alpha"
    ):
        merge(adapters, tmp_path / "out", block=block)


def test_factors_that_the_adapters_dtype_cannot_hold_are_refused(tmp_path: Path) -> None:
    adapters = [write_adapter(tmp_path / f"a{i}", i, lora_alpha=1e9) for i in range(2)]
    with pytest.raises(
        NonFiniteError, match=r"q_proj': a factor of the new adapter holds .*more than float16"
    ) as error:
        merge(adapters, tmp_path / "out", dtype="float16")
    assert "Write it with dtype='bfloat16'" in str(error.value)
    merge(adapters, tmp_path / "out", dtype="bfloat16", overwrite=True)
    for i in range(2):
        write_adapter(tmp_path / f"a{i}", i)
    merge(adapters, tmp_path / "out", dtype="float16", overwrite=True)


def test_the_sentence_names_the_block_that_overflows() -> None:
    ones = np.ones(8).view(np.uint8)
    error = overflow.result_overflows(
        load_kernels(),
        "w",
        [Operand(ones, "F64")] * 2,
        ["expert 'a'", "expert 'b'"],
        np.array([[1, 2], [7e4, 0]]),
        "F16",
    )
    assert "up to 7e+04, which are not finite in float16: it is 7e+04 times expert 'a'. Write" in str(error)
    assert str(error).endswith("dtype='bfloat16'; or choose a smaller scale, or a beta nearer to 0.")
    nothing = overflow.result_overflows(
        load_kernels(), "w", [Operand(ones, "F64")], ["expert 'a'"], np.array([[1e308]]) * 10, "F64"
    )
    assert "beyond float64" in str(nothing) and "Choose a smaller scale" in str(nothing)
