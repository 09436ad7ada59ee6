"""TIES through the engine: against a naive float64 version, and the same bits whatever happens on the way."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from merge_reference import SHAPES, random_model, write_family, write_model
from numpy.typing import NDArray
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from hf_frmerge.errors import ArgumentError, NonFiniteError
from hf_frmerge.merging.arguments.merging_arguments import MergingArguments
from hf_frmerge.merging.engine.outcomes import StepObserver, StepOutcome
from hf_frmerge.merging.engine.processes import Processes
from hf_frmerge.merging.planning import blocks
from hf_frmerge.merging.planning.build_plan import build_plan
from hf_frmerge.merging.run import run_merge
from hf_frmerge.provenance.merge_again import reproduce
from hf_frmerge.provenance.verify import verify

WEIGHTS = [0.5, 0.3, 0.2]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "PIECE_ELEMENTS", 300)


def merge(experts: Sequence[str], base: str, out: Path, observer: StepObserver | None = None, **options: Any) -> Path:
    args = MergingArguments(output_dir=str(out), method="ties", **options)
    run_merge(build_plan(experts, args, WEIGHTS[: len(experts)], base), observer or StepObserver(), Processes())
    return out


def naive(deltas: NDArray[np.float64], weights: Sequence[float], density: float) -> NDArray[np.float64]:
    """Trim, elect and merge of `(N, D)` deltas; the share that stays is that of all D elements."""
    kept = max(1, int(density * deltas.shape[1]))
    magnitudes = np.abs(deltas.astype(np.float32))
    trimmed = np.where(magnitudes >= np.sort(magnitudes, axis=1)[:, -kept, None], deltas, 0.0)
    weights = np.asarray(weights)[:, None]
    sign = np.where((weights * trimmed).sum(axis=0) >= 0, 1.0, -1.0)
    agree = trimmed * sign > 0
    share = (weights * agree).sum(axis=0)
    return np.where(share > 0, (weights * trimmed * agree).sum(axis=0) / np.where(share > 0, share, 1.0), 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("block", "density"), [("tensor", 0.2), ("tensor", 1.0), ("layer", 0.3), ("model", 0.05)])
def test_ties_is_the_naive_version(tmp_path: Path, dtype: torch.dtype, block: str, density: float) -> None:
    base, experts = write_family(tmp_path, dtype=dtype)
    out = merge(experts, base, tmp_path / "out", block=block, density=density, scale=0.7)
    tensors = [load_file(Path(folder) / "model.safetensors") for folder in [base, *experts]]
    groups: dict[str, list[str]] = {}
    for name in SHAPES:
        layer = ".".join(name.split(".")[:3]) if "layers" in name else name
        groups.setdefault({"tensor": name, "layer": layer, "model": ""}[block], []).append(name)
    merged = load_file(out / "model.safetensors")
    for names in groups.values():
        origin, *others = (np.concatenate([t[n].double().numpy().ravel() for n in names]) for t in tensors)
        expected = origin + 0.7 * naive(np.stack(others) - origin, np.array(WEIGHTS) / sum(WEIGHTS), density)
        found = np.concatenate([merged[n].double().numpy().ravel() for n in names])
        rounding = 2.0**-24 if dtype == torch.float32 else 2.0**-8
        assert np.all(np.abs(found - expected) <= rounding * np.abs(expected) * 1.0001 + 1e-300)


class Stop(StepObserver):
    """Stops after some tensors."""

    def __init__(self, after: int) -> None:
        self._left = after

    def end(self, outcome: StepOutcome) -> bool:
        self._left -= 1
        return self._left > 0


@pytest.mark.parametrize("block", ["tensor", "model"])
def test_the_bits_do_not_depend_on_cuts_threads_or_a_resume(
    tmp_path: Path, block: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, experts = write_family(tmp_path, dtype=torch.bfloat16)
    first = merge(experts, base, tmp_path / "first", block=block, num_workers=1)
    expected = (first / "model.safetensors").read_bytes()
    monkeypatch.setattr(blocks, "PIECE_ELEMENTS", 77)
    other = merge(experts, base, tmp_path / "other", block=block, num_workers=3)
    assert (other / "model.safetensors").read_bytes() == expected
    for after in (1, 4):
        out = tmp_path / f"stopped{after}"
        merge(experts, base, out, Stop(after), block=block)
        assert not (out / "config.json").exists()
        merge(experts, base, out, block=block, resume_from_checkpoint=True)
        assert (out / "model.safetensors").read_bytes() == expected


def test_the_record_is_the_thresholds_and_is_verified(tmp_path: Path) -> None:
    base, experts = write_family(tmp_path)
    out = merge(experts, base, tmp_path / "out", density=0.25)
    assert not (out / "merge_coefficients.safetensors").exists()
    manifest = json.loads((out / "merge_manifest.json").read_text())
    entry = manifest["tensors"]["lm_head.weight"]
    delta = load_file(Path(experts[0]) / "model.safetensors")["lm_head.weight"].double()
    delta -= load_file(Path(base) / "model.safetensors")["lm_head.weight"].double()
    size = delta.abs().float().flatten().sort(descending=True).values[delta.numel() // 4 - 1].item()
    assert entry["decision"]["kind"] == "trimming" and entry["decision"]["thresholds"][0] == size
    report = verify(str(out))
    assert report.problems == [] and report.checked_tensors == len(SHAPES)
    again = reproduce(str(out))
    assert again.identical

    entry["decision"]["thresholds"][0] *= 2
    (out / "merge_manifest.json").write_text(json.dumps(manifest))
    (problem,) = verify(str(out)).problems
    assert problem.startswith("Tensor 'lm_head.weight' differs from what its experts and thresholds give in")


def test_an_adapter_among_the_experts_is_its_dense_delta(tmp_path: Path) -> None:
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=32
    )
    base = LlamaForCausalLM(config)
    base.save_pretrained(tmp_path / "base")
    full = LlamaForCausalLM(config)
    full.save_pretrained(tmp_path / "full")
    lora = get_peft_model(base, LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=False))
    lora.save_pretrained(tmp_path / "lora")
    dense = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "lora")
    dense.merge_and_unload().save_pretrained(tmp_path / "dense")
    names = [str(tmp_path / name) for name in ("full", "lora", "dense")]
    mixed = merge(names[:2], str(tmp_path / "base"), tmp_path / "mixed", density=1.0)
    whole = merge([names[0], names[2]], str(tmp_path / "base"), tmp_path / "whole", density=1.0)
    expected = load_file(whole / "model.safetensors")
    for name, tensor in load_file(mixed / "model.safetensors").items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6)


def test_what_ties_cannot_do_is_refused(tmp_path: Path) -> None:
    base, experts = write_family(tmp_path)
    with pytest.raises(ArgumentError, match=r"`method='ties'` takes block=tensor or layer or model, but got 'row'"):
        MergingArguments(method="ties", block="row")
    with pytest.raises(ArgumentError, match=r"`density` must be above 0 and at most 1"):
        MergingArguments(method="ties", density=0.0)
    with pytest.raises(ArgumentError, match=r'ties is made of deltas: it needs space="deltas" and a base_model'):
        merge(experts, base, tmp_path / "out", space="weights")
    with pytest.raises(ArgumentError, match=r"needs base_model"):
        build_plan(experts, MergingArguments(method="ties"))
    bad = random_model(5)
    bad["lm_head.weight"][0, 0] = float("nan")
    bad_expert = write_model(tmp_path / "bad", bad)
    with pytest.raises(NonFiniteError, match=r"'lm_head.weight' of expert '.*bad'"):
        merge([experts[0], bad_expert], base, tmp_path / "out")


def test_options_that_a_method_does_not_obey_are_named(tmp_path: Path) -> None:
    base, experts = write_family(tmp_path)
    plan = build_plan(experts, MergingArguments(method="ties", beta=1.0, tol=1e-6), base_model=base)
    assert "`beta` changes nothing with method='ties'." in plan.notes
    assert "`tol` changes nothing with method='ties'." in plan.notes
    assert not any("changes nothing" in note for note in build_plan(experts, MergingArguments(beta=1.0)).notes)
