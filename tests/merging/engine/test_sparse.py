"""Sparse methods through the engine: against naive float64 versions, and the same bits whatever happens on the way."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from merge_reference import SHAPES, random_model, write_family, write_model
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from sparse_reference import naive
from transformers import LlamaConfig, LlamaForCausalLM

from hf_frmerge.errors import ArgumentError, NonFiniteError
from hf_frmerge.kernels.native import NativeKernels
from hf_frmerge.kernels.torch_backend import TorchKernels
from hf_frmerge.merging.arguments.merging_arguments import MergingArguments
from hf_frmerge.merging.engine.outcomes import StepObserver, StepOutcome
from hf_frmerge.merging.engine.processes import Processes
from hf_frmerge.merging.planning import blocks
from hf_frmerge.merging.planning.build_plan import build_plan
from hf_frmerge.merging.planning.corrections import CORRECTIONS_FILE, read_corrections
from hf_frmerge.merging.run import run_merge
from hf_frmerge.methods.table import METHODS
from hf_frmerge.provenance.merge_again import reproduce
from hf_frmerge.provenance.verify import verify

WEIGHTS = [0.5, 0.3, 0.2]
SPARSE = [method.name for method in METHODS.values() if method.kind == "sparse"]
CASES = [
    ("ties", "tensor", {"density": 0.2, "scale": 0.7}),
    ("ties", "tensor", {"density": 1.0}),
    ("ties", "layer", {"density": 0.3}),
    ("ties", "model", {"density": 0.05}),
    ("localize_and_stitch", "tensor", {}),
    ("localize_and_stitch", "model", {"density": 0.02}),
    ("breadcrumbs", "tensor", {"scale": 0.4}),
    ("breadcrumbs", "layer", {"density": 0.95, "gamma": 0.2}),  # too little is left: fewer large ones are dropped
    ("breadcrumbs", "model", {"density": 0.3, "gamma": 0.0}),
    ("sce", "tensor", {"scale": 0.7}),
    ("sce", "model", {"density": 0.4}),
    ("dare_linear", "tensor", {"seed": 3, "scale": 0.4}),
    ("dare_ties", "layer", {"density": 0.3}),
    ("della", "tensor", {"scale": 1.1}),
    ("della", "model", {"density": 0.5, "epsilon": 0.3, "seed": 0}),
    ("consensus", "tensor", {"scale": 0.3}),
    ("consensus", "tensor", {"agreement": 0.9}),
    ("ram", "tensor", {"min_change": 0.7}),
]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "PIECE_ELEMENTS", 300)


def merge(
    experts: Sequence[str],
    base: str,
    out: Path,
    observer: StepObserver | None = None,
    method: str = "ties",
    **options: Any,
) -> Path:
    args = MergingArguments(output_dir=str(out), method=method, **options)
    run_merge(build_plan(experts, args, WEIGHTS[: len(experts)], base), observer or StepObserver(), Processes())
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("method", "block", "options"), CASES)
def test_a_sparse_method_is_the_naive_version(
    tmp_path: Path, method: str, block: str, options: dict[str, Any], dtype: torch.dtype
) -> None:
    base, experts = write_family(tmp_path, dtype=dtype)
    is_the_naive_version(tmp_path / "out", base, experts, method, block, options)


@pytest.mark.parametrize(("method", "block", "options"), CASES)
def test_tensors_that_all_experts_have_alike(tmp_path: Path, method: str, block: str, options: dict[str, Any]) -> None:
    # A method may know all it asks of some tensors of a batch rounds before it knows enough of the others.
    base, experts = write_family(tmp_path, dtype=torch.bfloat16)
    origin, first = (load_file(Path(folder) / "model.safetensors") for folder in (base, experts[0]))
    alike = {name: origin[name] for name in SHAPES if "norm" in name or "embed" in name}
    alike["model.layers.1.mlp.up_proj.weight"] = first["model.layers.1.mlp.up_proj.weight"]
    for folder in experts:
        file = Path(folder) / "model.safetensors"
        save_file(load_file(file) | alike, file, {"format": "pt"})
    is_the_naive_version(tmp_path / "out", base, experts, method, block, options)


def is_the_naive_version(
    out: Path, base: str, experts: Sequence[str], method: str, block: str, options: dict[str, Any]
) -> None:
    """Merge, and assert that every element is the naive version's, rounded, and that the record says so."""
    merge(experts, base, out, method=method, block=block, **options)
    tensors = [load_file(Path(folder) / "model.safetensors") for folder in [base, *experts]]
    groups: dict[str, list[str]] = {}
    for name in SHAPES:
        layer = ".".join(name.split(".")[:3]) if "layers" in name else name
        groups.setdefault({"tensor": name, "layer": layer, "model": ""}[block], []).append(name)
    merged = load_file(out / "model.safetensors")
    for names in groups.values():
        origin, *others = (np.concatenate([t[n].double().numpy().ravel() for n in names]) for t in tensors)
        places = [(name, int(np.prod(SHAPES[name])), SHAPES[name][-1]) for name in names]
        expected = origin + naive(method, np.stack(others) - origin, WEIGHTS, places, **options)
        actual = np.concatenate([merged[n].double().numpy().ravel() for n in names])
        rounding = 2.0**-24 if merged[names[0]].dtype == torch.float32 else 2.0**-8
        assert np.all(np.abs(actual - expected) <= rounding * np.abs(expected) * 1.0001 + 1e-13)
    assert verify(str(out)).problems == []


def test_all_sparse_methods_are_tried() -> None:
    assert {method for method, _, _ in CASES} == {*SPARSE}


class Stop(StepObserver):
    """Stops after some tensors."""

    def __init__(self, after: int) -> None:
        self._left = after

    def end(self, outcome: StepOutcome) -> bool:
        self._left -= 1
        return self._left > 0


@pytest.mark.parametrize(
    ("method", "block"), [(m, "tensor") for m in SPARSE] + [("ties", "model"), ("della", "model")]
)
def test_the_bits_do_not_depend_on_cuts_threads_kernels_or_a_resume(
    tmp_path: Path, method: str, block: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, experts = write_family(tmp_path, dtype=torch.bfloat16)
    first = merge(experts, base, tmp_path / "first", method=method, block=block, num_workers=1)
    expected = (first / "model.safetensors").read_bytes()
    for after in (1, 4):
        out = tmp_path / f"stopped{after}"
        merge(experts, base, out, Stop(after), method=method, block=block)
        assert not (out / "config.json").exists()
        merge(experts, base, out, method=method, block=block, resume_from_checkpoint=True)
        assert (out / "model.safetensors").read_bytes() == expected
    if method != "sce":  # whose weights are sums over pieces
        monkeypatch.setattr(blocks, "PIECE_ELEMENTS", 77)
    other = merge(experts, base, tmp_path / "other", method=method, block=block, num_workers=3)
    assert (other / "model.safetensors").read_bytes() == expected
    args = MergingArguments(output_dir=str(tmp_path / "numpy"), method=method, block=block)
    plan = build_plan(experts, args, WEIGHTS, base)
    for name in ("count_keys", "energies", "merge_elements"):
        monkeypatch.setattr(NativeKernels, name, getattr(TorchKernels, name))
    run_merge(plan, StepObserver(), Processes())
    assert (tmp_path / "numpy" / "model.safetensors").read_bytes() == expected


def test_the_record_is_the_thresholds_and_is_verified(tmp_path: Path) -> None:
    base, experts = write_family(tmp_path)
    out = merge(experts, base, tmp_path / "out", density=0.25)
    assert not (out / "merge_coefficients.safetensors").exists()
    manifest = json.loads((out / "merge_manifest.json").read_text())
    entry = manifest["tensors"]["lm_head.weight"]
    delta = load_file(Path(experts[0]) / "model.safetensors")["lm_head.weight"].double()
    delta -= load_file(Path(base) / "model.safetensors")["lm_head.weight"].double()
    size = delta.abs().float().flatten().sort(descending=True).values[delta.numel() // 4 - 1].item()
    assert entry["decision"]["keep"]["kind"] == "band" and entry["decision"]["keep"]["lower"][0] == size
    report = verify(str(out))
    assert report.problems == [] and report.checked_tensors == len(SHAPES)
    again = reproduce(str(out))
    assert again.identical

    lower = entry["decision"]["keep"]["lower"]
    earlier = {"kind": "trimming", "thresholds": lower, "weights": entry["decision"]["weights"], "scale": 1.0}
    manifest["tensors"]["lm_head.weight"]["decision"] = earlier  # as it was recorded when TIES was the only one
    (out / "merge_manifest.json").write_text(json.dumps(manifest))
    assert verify(str(out)).problems == []

    manifest["tensors"]["lm_head.weight"]["decision"] = earlier | {"thresholds": [2 * lower[0], *lower[1:]]}
    (out / "merge_manifest.json").write_text(json.dumps(manifest))
    (problem,) = verify(str(out)).problems
    assert problem.startswith("Tensor 'lm_head.weight' differs from what its experts and decision give in")


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


def test_another_seed_is_another_merge_and_the_record_has_it(tmp_path: Path) -> None:
    base, experts = write_family(tmp_path)
    files = []
    for seed in (0, 1, 0):
        out = merge(experts, base, tmp_path / f"out{len(files)}", method="dare_linear", seed=seed)
        files.append((out / "model.safetensors").read_bytes())
        manifest = json.loads((out / "merge_manifest.json").read_text())
        keep = {"kind": "dropout", "seed": seed, "density": 0.8}
        assert manifest["tensors"]["lm_head.weight"]["decision"]["keep"] == keep
        assert reproduce(str(out)).identical
    assert files[0] == files[2] != files[1]


def test_dare_is_task_arithmetic_on_average_over_the_seeds(tmp_path: Path) -> None:
    base, experts = write_family(tmp_path)
    whole = load_file(merge(experts, base, tmp_path / "sum", method="task_arithmetic") / "model.safetensors")
    name, total = "lm_head.weight", torch.zeros(SHAPES["lm_head.weight"], dtype=torch.float64)
    for seed in range(40):
        out = merge(experts, base, tmp_path / "out", method="dare_linear", density=0.5, seed=seed, overwrite=True)
        total += load_file(out / "model.safetensors")[name].double()
    tensors = [load_file(Path(folder) / "model.safetensors")[name].double() for folder in [base, *experts]]
    deltas = torch.stack(tensors[1:]) - tensors[0]
    # Variance of an element kept with chance p and divided by it: (1 - p) / p times its square.
    deviation = ((torch.tensor(WEIGHTS)[:, None, None] * deltas) ** 2).sum(dim=0).sqrt() / np.sqrt(40)
    wrong = ((total / 40 - whole[name].double()) / deviation).flatten()
    assert abs(wrong.mean()) < 5 / np.sqrt(wrong.numel()) and 0.9 < wrong.std() < 1.1


def test_experts_that_agree_everywhere_come_out_of_sce_as_they_are(tmp_path: Path) -> None:
    base, experts = write_family(tmp_path, 1)
    out = merge(experts * 3, base, tmp_path / "out", method="sce")
    merged, expert = load_file(out / "model.safetensors"), load_file(Path(experts[0]) / "model.safetensors")
    for name in SHAPES:
        torch.testing.assert_close(merged[name], expert[name], rtol=1e-6, atol=1e-7)


def test_an_expert_that_changed_nothing_in_a_tensor_is_a_zero_delta(tmp_path: Path) -> None:
    base, experts = write_family(tmp_path)
    plain = [load_file(Path(folder) / "model.safetensors") for folder in [base, *experts]]
    for method in SPARSE:
        same = write_model(tmp_path / "same", plain[0])
        out = merge([experts[0], experts[1], same], base, tmp_path / method, method=method)
        places = [(name, int(np.prod(shape)), shape[-1]) for name, shape in SHAPES.items()]
        for place in places:
            origin, first, second = (tensors[place[0]].double().numpy().ravel() for tensors in plain[:3])
            deltas = np.stack([first - origin, second - origin, 0 * origin])
            actual = load_file(out / "model.safetensors")[place[0]].double().numpy().ravel()
            np.testing.assert_allclose(actual, origin + naive(method, deltas, WEIGHTS, [place]), rtol=1e-6, atol=1e-6)


def test_a_result_beyond_the_dtype_is_refused(tmp_path: Path) -> None:
    base, experts = write_family(tmp_path)
    options: dict[str, Any] = {"method": "dare_linear", "scale": 1e6}
    with pytest.raises(NonFiniteError, match=r"would hold values up to .* not finite in float16.*dtype='bfloat16'"):
        merge(experts, base, tmp_path / "out", dtype="float16", **options)
    merge(experts, base, tmp_path / "wide", dtype="bfloat16", **options)  # as the message says


def test_what_cannot_be_done_is_refused(tmp_path: Path) -> None:
    base, experts = write_family(tmp_path)
    with pytest.raises(ArgumentError, match=r"`method='ties'` takes block=tensor or layer or model, but got 'row'"):
        MergingArguments(method="ties", block="row")
    with pytest.raises(ArgumentError, match=r"`density` must be above 0 and at most 1"):
        MergingArguments(method="ties", density=0.0)
    with pytest.raises(ArgumentError, match=r"a chance outside of 0 to 1. Choose a density between 0.2 and 0.8"):
        MergingArguments(method="della", density=0.9, epsilon=0.2)
    MergingArguments(method="della", density=0.8, epsilon=0.2)  # as the message says
    with pytest.raises(ArgumentError, match=r'ties is made of deltas: it needs space="deltas" and a base_model'):
        merge(experts, base, tmp_path / "out", space="weights")
    with pytest.raises(ArgumentError, match=r"needs base_model"):
        build_plan(experts, MergingArguments(method="ties"))
    bad = random_model(5)
    bad["lm_head.weight"][0, 0] = float("nan")
    bad_expert = write_model(tmp_path / "bad", bad)
    for method in SPARSE:
        with pytest.raises(NonFiniteError, match=r"'lm_head.weight' of expert '.*bad'"):
            merge([experts[0], bad_expert], base, tmp_path / f"{method}-out", method=method)


def test_options_that_a_method_does_not_obey_are_named(tmp_path: Path) -> None:
    base, experts = write_family(tmp_path)
    plan = build_plan(experts, MergingArguments(method="ties", beta=1.0, tol=1e-6), base_model=base)
    assert "`beta` changes nothing with method='ties'." in plan.notes
    assert "`tol` changes nothing with method='ties'." in plan.notes
    assert not any("changes nothing" in note for note in build_plan(experts, MergingArguments(beta=1.0)).notes)


@pytest.mark.parametrize("method", ["ties", "della"])
def test_a_correction_is_added_to_what_a_sparse_method_gives(tmp_path: Path, method: str) -> None:
    base, experts = write_family(tmp_path)
    plan = build_plan(experts, MergingArguments(output_dir=str(tmp_path / "out"), method=method), WEIGHTS, base)
    save_file({"lm_head.weight": torch.full(SHAPES["lm_head.weight"], 0.5)}, tmp_path / CORRECTIONS_FILE)
    plan.corrections = read_corrections(str(tmp_path))
    run_merge(plan, StepObserver(), Processes())
    plain = merge(experts, base, tmp_path / "plain", method=method)
    actual, without = (load_file(path / "model.safetensors") for path in (tmp_path / "out", plain))
    for name in SHAPES:
        expected = without[name].double() + (0.5 if name == "lm_head.weight" else 0.0)
        torch.testing.assert_close(actual[name].double(), expected, rtol=1e-6, atol=1e-6)
