"""`inspect_experts` against naive float64 geometry on whole vectors."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from merge_reference import SHAPES, naive_mean, random_model, write_family, write_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from hf_frmerge.errors import ArgumentError, NonFiniteError
from hf_frmerge.merging.arguments.merging_arguments import MergingArguments
from hf_frmerge.merging.inspection import Inspection, SpaceView, inspect_experts
from hf_frmerge.merging.planning import blocks
from hf_frmerge.merging.planning.build_plan import build_plan
from hf_frmerge.wording.inspection import inspection_verdict


def inspect(
    experts: list[str], tmp_path: Path, weights: list[float] | None = None, base: str | None = None, **options: Any
) -> Inspection:
    args = MergingArguments(output_dir=str(tmp_path / "out"), **options)
    actual = inspect_experts(build_plan(experts, args, weights, base))
    assert not (tmp_path / "out").exists()
    return actual


def angle(a: np.ndarray, b: np.ndarray) -> float:
    """By the chord, which is right for small angles too."""
    u, v = a / np.linalg.norm(a), b / np.linalg.norm(b)
    return 2 * np.arctan2(np.linalg.norm(u - v), np.linalg.norm(u + v))


def expected_view(points: np.ndarray, weights: list[float]) -> dict[str, Any]:
    """A `SpaceView` of one block, from full float64 vectors `(N, D)`."""
    norms = np.linalg.norm(points, axis=1)
    angles = [angle(a, b) for a, b in itertools.combinations(points, 2)]
    karcher, nre = naive_mean("karcher", points, weights), naive_mean("nre", points, weights)
    return {
        "norms": norms,
        "max_angle": max(angles),
        "mean_angle": np.mean(angles),
        "karcher_nre_gap": angle(karcher, nre),
        "linear_norm_ratio": np.linalg.norm(np.asarray(weights) @ points) / (norms @ weights),
    }


def assert_view(actual: SpaceView, expected: dict[str, Any], rtol: float = 1e-6) -> None:
    for name in ("norms", "max_angle", "mean_angle", "linear_norm_ratio"):
        np.testing.assert_allclose(getattr(actual, name), expected[name], rtol=rtol, err_msg=name)
    # A gap is a difference of two means, each known to 1e-9 or so.
    np.testing.assert_allclose(actual.karcher_nre_gap, expected["karcher_nre_gap"], rtol=1e-3, atol=1e-8)


def vectors(folders: list[str], name: str) -> np.ndarray:
    return np.stack([load_file(Path(f) / "model.safetensors")[name].double().numpy().ravel() for f in folders])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_angles_norms_and_gap_in_both_spaces(
    tmp_path: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "PIECE_ELEMENTS", 300)
    base, experts = write_family(tmp_path, dtype=dtype)
    weights = [0.5, 0.3, 0.2]
    actual = inspect(experts, tmp_path, weights, base)
    assert sorted(view.name for view in actual.tensors) == sorted(SHAPES)
    assert actual.experts == experts
    for view in actual.tensors:
        assert view.shape == SHAPES[view.name]
        points, origin = vectors(experts, view.name), vectors([base], view.name)
        assert_view(view.weights, expected_view(points, weights))
        assert view.deltas is not None
        assert_view(view.deltas, expected_view(points - origin, weights))


def test_the_whole_model_is_one_long_vector(tmp_path: Path) -> None:
    base, experts = write_family(tmp_path)
    actual = inspect(experts, tmp_path, base=base).total
    points = np.concatenate([vectors(experts, name) for name in SHAPES], axis=1)
    origin = np.concatenate([vectors([base], name) for name in SHAPES], axis=1)
    assert actual.shape == (points.shape[1],)
    assert_view(actual.weights, expected_view(points, [1 / 3] * 3))
    assert actual.deltas is not None
    assert_view(actual.deltas, expected_view(points - origin, [1 / 3] * 3))


def test_without_a_base_there_are_no_deltas(tmp_path: Path) -> None:
    _, experts = write_family(tmp_path)
    actual = inspect(experts, tmp_path)
    assert all(view.deltas is None for view in [*actual.tensors, actual.total])
    verdict = inspection_verdict(actual)
    assert "delta space" not in verdict
    assert verdict.endswith("Pass the base model to see the deltas, where angles are wide.")


@pytest.mark.parametrize("spread", [1e-3, 1e-5])
def test_siblings_are_seen_but_said_to_make_no_difference(tmp_path: Path, spread: float) -> None:
    """Angles far below what a float32 cosine can tell, from float32 weights."""
    base = random_model(0)
    experts = [write_model(tmp_path / f"e{i}", random_model(i + 1, base=base, spread=spread)) for i in range(3)]
    origin = write_model(tmp_path / "base", base)
    actual = inspect(experts, tmp_path, base=origin)
    for view in actual.tensors:
        points = vectors(experts, view.name)
        assert_view(view.weights, expected_view(points, [1 / 3] * 3), rtol=1e-5)
        assert view.weights.max_angle < 4 * spread
        assert view.deltas is not None
        assert_view(view.deltas, expected_view(points - vectors([origin], view.name), [1 / 3] * 3), rtol=1e-5)
        assert view.deltas.max_angle > 1
    weights, deltas = inspection_verdict(actual).split(" In delta space ")
    for part in (weights, deltas):
        assert "expect the same model from both" in part
        assert "less than rounding to bf16 costs (0.0015)" in part
    assert f"up to {max(v.weights.max_angle for v in actual.tensors):.2g} rad apart" in weights


def test_wide_experts_are_worth_a_comparison(tmp_path: Path) -> None:
    # Equal weights and equal pairwise angles give Karcher and NRE one direction; uneven weights do not.
    base, experts = write_family(tmp_path)
    actual = inspect(experts, tmp_path, [0.6, 0.3, 0.1], base)
    gap = max(view.weights.karcher_nre_gap for view in actual.tensors)
    kept = min(view.weights.linear_norm_ratio for view in actual.tensors)
    assert gap > 2.0**-9  # half a unit in the last place of bf16
    weights, deltas = inspection_verdict(actual).split(" In delta space ")
    for part in (weights, deltas):
        assert "more than rounding to bf16 costs (0.0015): only an evaluation of both can tell" in part
    assert f"keeps at least {kept:.1%} of their norm" in weights
    assert f"at most {gap:.1g} rad from the norm-rescaled mean" in weights


def test_rows_are_blocks_of_their_own(tmp_path: Path) -> None:
    base, experts = write_family(tmp_path, 2)
    actual = inspect(experts, tmp_path, block="row", base=base)
    view = actual.tensors[0]
    points = vectors(experts, view.name).reshape(2, 48, 24)
    angles = [angle(points[0, row], points[1, row]) for row in range(48)]
    np.testing.assert_allclose(
        [view.weights.max_angle, view.weights.mean_angle], [max(angles), np.mean(angles)], rtol=1e-6
    )
    # Tensors of different numbers of blocks still add up to one model.
    whole = np.concatenate([vectors(experts, name) for name in SHAPES], axis=1)
    np.testing.assert_allclose(actual.total.weights.max_angle, angle(*whole), rtol=1e-6)


def test_identical_and_opposite_experts_need_no_mean(tmp_path: Path) -> None:
    model = random_model(1)
    experts = [write_model(tmp_path / "a", model), write_model(tmp_path / "b", model)]
    same = inspect(experts, tmp_path)
    assert (same.total.weights.max_angle, same.total.weights.karcher_nre_gap) == (0.0, 0.0)
    assert same.total.weights.linear_norm_ratio == pytest.approx(1.0, rel=1e-12)
    write_model(tmp_path / "b", {name: -tensor for name, tensor in model.items()})
    opposite = inspect(experts, tmp_path)  # a merge would refuse; an inspection shows why
    assert opposite.total.weights.max_angle == pytest.approx(np.pi, abs=1e-7)
    assert opposite.total.weights.linear_norm_ratio == pytest.approx(0.0, abs=1e-12)


def test_it_can_be_written_as_json(tmp_path: Path) -> None:
    _, experts = write_family(tmp_path, 2)
    actual = inspect(experts, tmp_path)
    read = json.loads(json.dumps(actual.to_dict()))
    assert read["experts"] == actual.experts
    assert read["tensors"][0]["weights"]["max_angle"] == actual.tensors[0].weights.max_angle


def test_progress_counts_every_merged_byte_and_nan_is_named(tmp_path: Path) -> None:
    _, experts = write_family(tmp_path, 2)
    plan = build_plan(experts, MergingArguments(output_dir=str(tmp_path / "out")))
    steps: list[int] = []
    inspect_experts(plan, progress=steps.append)
    assert sum(steps) == 4 * sum(int(np.prod(shape)) for shape in SHAPES.values())
    bad = load_file(Path(experts[1]) / "model.safetensors")
    bad["lm_head.weight"][0, :2] = float("nan")
    write_model(Path(experts[1]), bad)
    with pytest.raises(NonFiniteError, match=r"2 NaN or infinite values in tensor 'lm_head.weight' of expert .*e1"):
        inspect(experts, tmp_path)


def test_adapters_are_measured_beside_the_weights_they_change(tmp_path: Path) -> None:
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=32
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    deltas: list[dict[str, np.ndarray]] = []
    for seed in range(2):
        torch.manual_seed(seed)
        lora = LoraConfig(r=2 + seed, lora_alpha=6, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        model = get_peft_model(LlamaForCausalLM.from_pretrained(tmp_path / "base"), lora)
        model.save_pretrained(tmp_path / f"a{seed}")
        factors = {n: p.detach().double().numpy() for n, p in model.named_parameters() if "lora_" in n}
        deltas.append(
            {
                name.split("self_attn.")[1].split(".")[0]: 6 / (2 + seed) * factors[name.replace("_A", "_B")] @ down
                for name, down in factors.items()
                if "lora_A" in name
            }
        )
    adapters = [str(tmp_path / "a0"), str(tmp_path / "a1")]
    actual = inspect(adapters, tmp_path, base=str(tmp_path / "base"))
    assert len(actual.tensors) == 2
    origin = load_file(tmp_path / "base" / "model.safetensors")
    for view in actual.tensors:
        module = next(name for name in ("q_proj", "v_proj") if name in view.name)
        points = np.stack([delta[module].ravel() for delta in deltas])
        assert view.deltas is not None
        assert_view(view.deltas, expected_view(points, [0.5, 0.5]), rtol=1e-5)
        start = origin[f"model.layers.0.self_attn.{module}.weight"].double().numpy().ravel()
        assert_view(view.weights, expected_view(start + points, [0.5, 0.5]), rtol=1e-5)
    with pytest.raises(ArgumentError, match=r"a0' is an adapter: pass the model it was trained from as base_model"):
        inspect(adapters, tmp_path)
