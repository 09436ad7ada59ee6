from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from merge_reference import SHAPES, merged_reference, random_model, write_family, write_model
from safetensors.torch import load_file

from hf_frmerge.errors import AmbiguousMeanError, ArgumentError, NonFiniteError
from hf_frmerge.merging.arguments.merging_arguments import MergingArguments
from hf_frmerge.merging.engine.engine import StepObserver, StepOutcome
from hf_frmerge.merging.engine.processes import Processes
from hf_frmerge.merging.planning import blocks
from hf_frmerge.merging.planning.build_plan import build_plan
from hf_frmerge.merging.planning.coefficient_table import read_coefficients
from hf_frmerge.merging.record.manifest import read_manifest
from hf_frmerge.merging.run import MergeOutcome, run_merge
from hf_frmerge.provenance.verify import verify


def merge(
    experts: list[str],
    output: Path,
    weights: list[float] | None = None,
    base: str | None = None,
    observer: StepObserver | None = None,
    **options: Any,
) -> MergeOutcome:
    plan = build_plan(experts, MergingArguments(output_dir=str(output), **options), weights, base)
    return run_merge(plan, observer or StepObserver(), Processes())


def weights_of(folder: Path | str) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


@pytest.mark.parametrize(
    ("method", "space"),
    [(method, space) for method in ("karcher", "slerp", "linear", "nre") for space in ("weights", "deltas")]
    + [("task_arithmetic", "deltas")],
)
def test_every_method_is_the_float64_result_rounded_once(tmp_path: Path, method: str, space: str) -> None:
    n = 2 if method == "slerp" else 3
    weights = [0.5, 0.3, 0.2][:n]
    base, experts = write_family(tmp_path, n)
    merge(experts, tmp_path / "out", weights, base, method=method, space=space)

    merged, sources = weights_of(tmp_path / "out"), [weights_of(e) for e in experts]
    origin = weights_of(base) if space == "deltas" else {}
    for name in SHAPES:
        expected = merged_reference(method, [s[name] for s in sources], weights, origin.get(name))
        np.testing.assert_allclose(merged[name].double().numpy(), expected, rtol=1e-7, atol=1e-9)
        # Rounded once: the nearest float32, so off by at most half a unit in the last place (and 1e-12 of solver).
        distance = np.abs(merged[name].double().numpy() - expected)
        assert (distance <= np.spacing(np.abs(expected).astype(np.float32)) * 0.5001 + 1e-12).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_output_is_the_reference_of_the_same_inputs_in_their_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    _, experts = write_family(tmp_path, 3, dtype)
    merge(experts, tmp_path / "out")
    merged, sources = weights_of(tmp_path / "out"), [weights_of(e) for e in experts]
    for name in SHAPES:
        expected = merged_reference("karcher", [s[name] for s in sources], [1, 1, 1], None)
        # float32 first rounds a second time, but only in ties that 12 digits of solver noise would decide anyhow.
        rounded = torch.from_numpy(expected).to(dtype)
        assert merged[name].dtype == dtype
        if dtype == torch.float64:
            torch.testing.assert_close(merged[name], rounded, rtol=1e-12, atol=1e-12)
        else:
            assert torch.equal(merged[name], rounded)


@pytest.mark.parametrize("block", ["tensor", "row", "head", "layer", "model"])
@pytest.mark.parametrize("space", ["weights", "deltas"])
def test_blocks_are_what_one_sphere_covers(tmp_path: Path, block: str, space: str) -> None:
    base, experts = write_family(tmp_path)
    merge(experts, tmp_path / "out", [0.6, 0.3, 0.1], base, block=block, space=space)
    merged, sources, origin = weights_of(tmp_path / "out"), [weights_of(e) for e in experts], weights_of(base)
    if space == "weights":
        origin = {name: torch.zeros_like(tensor) for name, tensor in origin.items()}

    groups = [[name] for name in SHAPES]
    if block == "model":
        groups = [list(SHAPES)]
    elif block == "layer":
        layers = [[n for n in SHAPES if n.startswith(f"model.layers.{i}.")] for i in range(2)]
        groups = [["model.embed_tokens.weight"], *layers, ["lm_head.weight"]]
    for group in groups:
        flat = [torch.cat([s[name].flatten() for name in group]) for s in sources]
        start = torch.cat([origin[name].flatten() for name in group])
        n_blocks = 1
        if block == "row" and len(SHAPES[group[0]]) == 2:
            n_blocks = SHAPES[group[0]][0]
        elif block == "head" and "q_proj" in group[0]:
            n_blocks = 3  # head_dim 8 of 24 rows
        expected = merged_reference("karcher", flat, [0.6, 0.3, 0.1], start, n_blocks)
        actual = torch.cat([merged[name].flatten() for name in group])
        np.testing.assert_allclose(actual.double().numpy(), expected, rtol=2e-6, atol=1e-7)
        for name in group:
            assert read_coefficients(tmp_path / "out").rows[name].shape == (n_blocks, 3)


@pytest.mark.parametrize("block", ["tensor", "row", "model"])
def test_bits_do_not_depend_on_threads_or_memory(tmp_path: Path, block: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "PIECE_ELEMENTS", 100)  # several pieces a tensor, rows cut unevenly
    base, experts = write_family(tmp_path, dtype=torch.bfloat16)
    outputs = []
    for workers, budget in ((1, "64MiB"), (2, "512MiB"), (5, "1GiB")):
        out = tmp_path / f"out{workers}"
        merge(experts, out, base=base, space="deltas", block=block, num_workers=workers, memory_budget=budget)
        outputs.append([(out / f).read_bytes() for f in ("model.safetensors", "merge_coefficients.safetensors")])
    assert outputs[0] == outputs[1] == outputs[2]


def test_one_hot_weights_return_that_expert_bit_for_bit(tmp_path: Path) -> None:
    _, experts = write_family(tmp_path, dtype=torch.bfloat16)
    third = weights_of(experts[2])
    third["lm_head.weight"][0, :3] = torch.tensor([-0.0, 0.0, 1e-40])
    third["lm_head.weight"][1] = -0.0  # a lost sign of zero shows, whatever the signs of the other experts
    write_model(Path(experts[2]), third)
    merge(experts, tmp_path / "out", [0, 0, 1])
    merged = weights_of(tmp_path / "out")
    for name in SHAPES:
        assert torch.equal(merged[name].view(torch.int16), third[name].view(torch.int16))


def test_identical_experts_return_themselves(tmp_path: Path) -> None:
    model = random_model(3, torch.bfloat16)
    experts = [write_model(tmp_path / f"e{i}", model) for i in range(3)]
    base = write_model(tmp_path / "base", random_model(4, torch.bfloat16))
    for space in ("weights", "deltas"):
        merge(experts, tmp_path / space, base=base, space=space)
        merged = weights_of(tmp_path / space)
        assert all(torch.equal(merged[name], model[name]) for name in SHAPES)


def test_tensors_equal_to_the_base_stay_so_in_delta_space(tmp_path: Path) -> None:
    base = random_model(0, torch.bfloat16)
    write_model(tmp_path / "base", base)
    frozen = "model.embed_tokens.weight"
    experts = []
    for i in range(2):
        expert = random_model(i + 1, torch.bfloat16, base=base)
        experts.append(write_model(tmp_path / f"e{i}", expert | {frozen: base[frozen]}))
    merge(experts, tmp_path / "out", base=str(tmp_path / "base"), space="deltas")
    assert torch.equal(weights_of(tmp_path / "out")[frozen], base[frozen])


def test_dtype_option_rounds_the_float64_result_once(tmp_path: Path) -> None:
    _, experts = write_family(tmp_path)
    merge(experts, tmp_path / "wide")
    merge(experts, tmp_path / "narrow", dtype="bfloat16")
    wide, narrow = weights_of(tmp_path / "wide"), weights_of(tmp_path / "narrow")
    for name in SHAPES:
        assert narrow[name].dtype == torch.bfloat16
        assert torch.equal(narrow[name], wide[name].bfloat16())
    assert '"dtype": "bfloat16"' in (tmp_path / "narrow" / "config.json").read_text()


def test_tiny_and_huge_values_keep_their_geometry(tmp_path: Path) -> None:
    """Float32 products of 1e-25 vanish and of 1e25 overflow; the mean must not notice."""
    models = [random_model(i) for i in range(3)]
    experts = []
    for i, model in enumerate(models):
        scaled = {name: t * scale for (name, t), scale in zip(model.items(), [1e-25, 1e25] * 4, strict=True)}
        experts.append(write_model(tmp_path / f"e{i}", scaled))
    merge(experts, tmp_path / "out")
    merged, sources = weights_of(tmp_path / "out"), [weights_of(e) for e in experts]
    for name in SHAPES:
        expected = merged_reference("karcher", [s[name] for s in sources], [1, 1, 1], None)
        np.testing.assert_allclose(
            merged[name].double().numpy(), expected, rtol=1e-6, atol=np.abs(expected).max() * 1e-8
        )


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_tiny_and_huge_values_of_long_16_bit_tensors_keep_their_geometry(tmp_path: Path, scale: float) -> None:
    """Too long for products in float64 from the start: those in float32 have to be noticed and taken again."""
    name, weights = "model.embed_tokens.weight", [0.6, 0.3, 0.1]
    experts = []
    for i in range(3):
        large = torch.randn(160, 160, generator=torch.Generator().manual_seed(i)) * scale
        experts.append(write_model(tmp_path / f"e{i}", {name: large.bfloat16()}))
    merge(experts, tmp_path / "out", weights, dtype="float64")
    merged, sources = weights_of(tmp_path / "out")[name], [weights_of(e)[name] for e in experts]
    expected = merged_reference("karcher", sources, weights, None)
    np.testing.assert_allclose(merged.numpy() / scale, expected / scale, rtol=1e-9, atol=1e-9)


def test_mixed_dtypes_merge_and_are_noted(tmp_path: Path) -> None:
    dtypes = [torch.bfloat16, torch.float16, torch.float32]
    experts = [write_model(tmp_path / f"e{i}", random_model(i, dtype)) for i, dtype in enumerate(dtypes)]
    outcome = merge(experts, tmp_path / "out", dtype="float32")
    assert any("F16" in note for note in outcome.report.notes)
    merged, sources = weights_of(tmp_path / "out"), [weights_of(e) for e in experts]
    for name in SHAPES:
        expected = merged_reference("karcher", [s[name] for s in sources], [1, 1, 1], None)
        np.testing.assert_allclose(merged[name].double().numpy(), expected, rtol=1e-7, atol=1e-9)


def test_integers_are_copied_and_empty_tensors_survive(tmp_path: Path) -> None:
    experts = []
    for i in range(2):
        extra = {"position_ids": torch.arange(7), "empty": torch.zeros(0, 4), "scalar": torch.tensor(float(i + 1))}
        experts.append(write_model(tmp_path / f"e{i}", random_model(i) | extra))
    merge(experts, tmp_path / "out")
    merged = weights_of(tmp_path / "out")
    assert torch.equal(merged["position_ids"], torch.arange(7))
    assert merged["empty"].shape == (0, 4)
    assert merged["scalar"].item() == 1.5  # two points on one ray: their mean norm


@pytest.mark.parametrize("wrapper", ["_orig_mod.", "module.", "module._orig_mod."])
def test_experts_saved_inside_a_wrapper_merge_under_the_names_of_the_model(tmp_path: Path, wrapper: str) -> None:
    _, experts = write_family(tmp_path, 2)
    # Copies: before safetensors 0.8 what was loaded is the file, which is written anew in the next line.
    sources = [{name: tensor.clone() for name, tensor in weights_of(expert).items()} for expert in experts]
    write_model(Path(experts[0]), {wrapper + name: tensor for name, tensor in sources[0].items()})
    outcome = merge(experts, tmp_path / "out")
    assert any("saved inside a wrapper" in note for note in outcome.report.notes)
    merged = weights_of(tmp_path / "out")
    assert list(merged) == list(weights_of(experts[1]))
    for name in SHAPES:
        expected = merged_reference("karcher", [s[name] for s in sources], [1, 1], None)
        np.testing.assert_allclose(merged[name].double().numpy(), expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nonfinite_input_is_named_and_leaves_no_model(tmp_path: Path, value: float) -> None:
    _, experts = write_family(tmp_path)
    bad = weights_of(experts[1])
    bad["model.layers.1.mlp.up_proj.weight"][3, :5] = value
    write_model(Path(experts[1]), bad)
    with pytest.raises(
        NonFiniteError, match=r"found 5 NaN or infinite values in tensor 'model.layers.1.mlp.up_proj"
    ) as e:
        merge(experts, tmp_path / "out")
    assert experts[1] in str(e.value)
    assert not (tmp_path / "out" / "config.json").exists()
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_antipodal_experts_raise_or_fall_back_as_declared(tmp_path: Path) -> None:
    model = random_model(1)
    opposite = model | {"lm_head.weight": -model["lm_head.weight"]}
    experts = [write_model(tmp_path / "plus", model), write_model(tmp_path / "minus", opposite)]
    with pytest.raises(AmbiguousMeanError, match=r"lm_head.weight.*plus.*minus.*3\.1416"):
        merge(experts, tmp_path / "out")
    outcome = merge(experts, tmp_path / "linear", on_ambiguous="linear")
    assert outcome.report.geometry.n_ambiguous == 1
    assert torch.count_nonzero(weights_of(tmp_path / "linear")["lm_head.weight"]) == 0


@pytest.mark.parametrize("method", ["karcher", "slerp", "nre"])
@pytest.mark.parametrize("space", ["weights", "deltas"])
def test_single_numbers_have_their_plain_mean(tmp_path: Path, method: str, space: str) -> None:
    values = [[0.1, -0.1], [3.0, 2.0]]
    folders = [
        write_model(tmp_path / f"e{i}", random_model(i) | {"bias": torch.tensor([one]), "scale": torch.tensor(two)})
        for i, (one, two) in enumerate(zip(*values))
    ]
    base = write_model(tmp_path / "base", random_model(9) | {"bias": torch.zeros(1), "scale": torch.tensor(2.5)})
    args = MergingArguments(output_dir=str(tmp_path / "out"), method=method, space=space, block="row")
    plan = build_plan(folders, args, [0.6, 0.4], base if space == "deltas" else None)
    assert any("bias, scale the plain weighted mean is taken" in note for note in plan.notes)
    run_merge(plan, StepObserver(), Processes())
    merged = weights_of(tmp_path / "out")
    assert merged["bias"].item() == pytest.approx(0.6 * 0.1 - 0.4 * 0.1, rel=1e-6)
    assert merged["scale"].item() == pytest.approx(0.6 * 3 + 0.4 * 2, rel=1e-6)
    assert verify(tmp_path / "out").ok


def test_a_merge_that_met_opposites_is_resumed_with_linear(tmp_path: Path) -> None:
    model = random_model(1)
    names = list(model)
    opposite = random_model(2) | {names[-1]: -model[names[-1]]}
    experts = [write_model(tmp_path / "plus", model), write_model(tmp_path / "minus", opposite)]
    with pytest.raises(AmbiguousMeanError, match=r'on_ambiguous="linear".*can be resumed'):
        merge(experts, tmp_path / "out", num_workers=1)
    merge(experts, tmp_path / "out", on_ambiguous="linear", resume_from_checkpoint=True)
    merge(experts, tmp_path / "anew", on_ambiguous="linear")
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "anew/model.safetensors").read_bytes()


def test_weight_rules_change_single_tensors(tmp_path: Path) -> None:
    _, experts = write_family(tmp_path)
    rules = ["mlp=1,0,0", "q_proj=0:1,1:0,0"]
    merge(experts, tmp_path / "out", weight_rules=rules)
    merged, sources = weights_of(tmp_path / "out"), [weights_of(e) for e in experts]
    assert torch.equal(merged["model.layers.0.mlp.up_proj.weight"], sources[0]["model.layers.0.mlp.up_proj.weight"])
    assert torch.equal(
        merged["model.layers.0.self_attn.q_proj.weight"], sources[1]["model.layers.0.self_attn.q_proj.weight"]
    )
    assert torch.equal(
        merged["model.layers.1.self_attn.q_proj.weight"], sources[0]["model.layers.1.self_attn.q_proj.weight"]
    )
    head = merged_reference("karcher", [s["lm_head.weight"] for s in sources], [1, 1, 1], None)
    np.testing.assert_allclose(merged["lm_head.weight"].double().numpy(), head, rtol=1e-7, atol=1e-9)


def test_rules_may_not_divide_a_sphere(tmp_path: Path) -> None:
    _, experts = write_family(tmp_path)
    with pytest.raises(ArgumentError, match=r"different weights, but both lie on one sphere"):
        merge(experts, tmp_path / "out", weight_rules=["mlp=1,0,0"], block="layer")


class SkipHead(StepObserver):
    def begin(self, step: Any) -> bool:
        return step.name != "lm_head.weight"


def test_a_skipped_tensor_comes_from_the_base(tmp_path: Path) -> None:
    base, experts = write_family(tmp_path)
    outcome = merge(experts, tmp_path / "out", base=base, observer=SkipHead())
    assert torch.equal(weights_of(tmp_path / "out")["lm_head.weight"], weights_of(base)["lm_head.weight"])
    assert (outcome.report.n_skipped, outcome.report.n_merged) == (1, len(SHAPES) - 1)


def test_a_skipped_tensor_is_checked_like_a_merged_one(tmp_path: Path) -> None:
    base, experts = write_family(tmp_path)
    bad = weights_of(base)
    bad["lm_head.weight"][0, :3] = float("nan")
    write_model(Path(base), bad)
    with pytest.raises(NonFiniteError, match=r"3 NaN or infinite values in tensor 'lm_head.weight' of base model"):
        merge(experts, tmp_path / "out", base=base, observer=SkipHead())
    assert not (tmp_path / "out" / "config.json").exists()


class Recorder(StepObserver):
    def __init__(self) -> None:
        self.seen: list[str] = []

    def end(self, outcome: StepOutcome) -> bool:
        self.seen.append(outcome.step.name)
        return True


def test_observers_hear_of_tensors_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "PIECE_ELEMENTS", 64)
    _, experts = write_family(tmp_path)
    recorder = Recorder()
    plan = build_plan(experts, MergingArguments(output_dir=str(tmp_path / "out"), num_workers=4))
    run_merge(plan, recorder, Processes())
    assert recorder.seen == [step.name for step in plan.steps]


def test_statistics_are_those_of_the_tensors(tmp_path: Path) -> None:
    _, experts = write_family(tmp_path)
    merge(experts, tmp_path / "out", [0.2, 0.3, 0.5], method="linear")
    name = "lm_head.weight"
    x = np.stack([weights_of(e)[name].double().numpy().ravel() for e in experts])
    norms = np.linalg.norm(x, axis=1)
    cosines = (x @ x.T) / np.outer(norms, norms)
    angles = np.arccos(cosines[np.triu_indices(3, 1)])
    linear = np.array([0.2, 0.3, 0.5]) @ x
    nre_gap = 0.0  # the plain mean and the norm-rescaled mean point the same way
    actual = vars(read_manifest(tmp_path / "out").tensors[name].geometry)
    np.testing.assert_allclose(actual["norms"], norms, rtol=1e-7)
    np.testing.assert_allclose([actual["max_angle"], actual["mean_angle"]], [angles.max(), angles.mean()], rtol=1e-6)
    np.testing.assert_allclose(actual["pair_angles"], angles, rtol=1e-3)  # recorded to four digits
    np.testing.assert_allclose(actual["norm_ratio"], np.linalg.norm(linear) / (norms @ [0.2, 0.3, 0.5]), rtol=1e-7)
    np.testing.assert_allclose(actual["gap_to_nre"], nre_gap, atol=1e-7)
    np.testing.assert_allclose(read_coefficients(tmp_path / "out").rows[name], [[0.2, 0.3, 0.5]], rtol=1e-15)


def test_angles_of_pairs_are_medians_over_the_blocks_that_have_one(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    models = [random_model(seed) for seed in (1, 2, 3)]
    models[1][name][:30] = 0  # 30 of 40 rows of the second expert have no direction
    models[2][name] = torch.zeros(40, 24)
    experts = [write_model(tmp_path / f"e{i}", model) for i, model in enumerate(models)]
    merge(experts, tmp_path / "out", block="row", on_ambiguous="linear")
    first, second = (model[name][30:].double().numpy() for model in models[:2])
    cosines = (first * second).sum(1) / np.linalg.norm(first, axis=1) / np.linalg.norm(second, axis=1)
    actual = read_manifest(tmp_path / "out").tensors[name].geometry.pair_angles
    assert actual[1:] == (None, None)
    np.testing.assert_allclose(actual[0], np.median(np.arccos(cosines)), rtol=1e-3)


def test_a_budget_too_small_for_one_piece_is_refused(tmp_path: Path) -> None:
    _, experts = write_family(tmp_path)
    with pytest.raises(ArgumentError, match=r"memory_budget is 1MiB, but one worker needs"):
        merge(experts, tmp_path / "out", memory_budget="1MiB")
