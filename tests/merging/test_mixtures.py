"""Mixtures of experts that are stored as stacks in one model and one by one in another, against float64 means."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from hf_frmerge.checkpoints.alignment.align import align
from hf_frmerge.checkpoints.resolve import Source
from hf_frmerge.checkpoints.tensors.reader import open_checkpoint
from hf_frmerge.merging.arguments.merging_arguments import MergingArguments
from hf_frmerge.merging.engine.engine import StepObserver
from hf_frmerge.merging.engine.processes import Processes
from hf_frmerge.merging.planning import blocks
from hf_frmerge.merging.planning.build_plan import build_plan
from hf_frmerge.merging.run import run_merge
from hf_frmerge.provenance.merge_again import reproduce
from hf_frmerge.provenance.verify import verify

SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 2}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("MixtralForCausalLM", {"num_local_experts": 11}),  # more than ten: 10 must not come before 2
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        {"num_experts": 4, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8, "mlp_only_layers": [1]},
    ),
}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "PIECE_ELEMENTS", 100)


def save(folder: Path, case: str, seed: int, *, one_by_one: bool) -> Any:
    """Save a mixture in either form; return the model."""
    architecture, extra = CASES[case]
    config = transformers.AutoConfig.for_model(case, **SIZES, **extra)
    torch.manual_seed(0)
    model = getattr(transformers, architecture)(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder, save_original_format=one_by_one)
    names = load_file(folder / "model.safetensors").keys()
    if any("experts.0." in name for name in names) != one_by_one:
        pytest.skip("this version of transformers saves mixtures in one form")
    return model


def merge(experts: list[Path], out: Path, base: Path | None = None, **options: Any) -> Any:
    args = MergingArguments(str(out), **options)
    plan = build_plan(list(map(str, experts)), args, None, str(base) if base else None)
    run_merge(plan, StepObserver(), Processes())
    return plan


@pytest.mark.parametrize("first", [True, False], ids=["one by one first", "stack first"])
@pytest.mark.parametrize("case", CASES)
def test_stacks_and_single_experts_have_one_mean(tmp_path: Path, case: str, first: bool) -> None:
    one, two = (save(tmp_path / n, case, seed, one_by_one=w) for n, seed, w in (("a", 1, first), ("b", 2, not first)))
    out = tmp_path / "out"
    plan = merge([tmp_path / "a", tmp_path / "b"], out, method="linear")
    merged, info = type(one).from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    theirs = two.state_dict()
    for name, tensor in one.state_dict().items():
        wanted = ((tensor.double() + theirs[name].double()) / 2).float()
        assert torch.equal(merged.state_dict()[name], wanted), name
    stored = [load_file(folder / "model.safetensors").keys() for folder in (tmp_path / "a", tmp_path / "b", out)]
    assert stored[2] == stored[0] != stored[1]  # the names of the donor, on disk
    (note,) = [note for note in plan.notes if "stores experts" in note]
    assert f"'{tmp_path}/b' stores experts {'in stacks' if first else 'one by one'} and" in note
    accounts = json.loads((out / "merge_manifest.json").read_text())["report"]["accounts"]
    assert [(each["n_tensors"], each["n_merged"]) for each in accounts] == [(len(n), len(n)) for n in stored[:2]]
    assert verify(str(out)).ok and reproduce(str(out)).identical


@pytest.mark.parametrize("base_one_by_one", [True, False])
def test_deltas_of_either_form(tmp_path: Path, base_one_by_one: bool) -> None:
    base = save(tmp_path / "base", "mixtral", 0, one_by_one=base_one_by_one)
    models = [save(tmp_path / name, "mixtral", seed, one_by_one=seed == 1) for seed, name in ((1, "a"), (2, "b"))]
    options = {"method": "task_arithmetic", "space": "deltas", "scale": 0.5}
    merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out", tmp_path / "base", **options)
    merged = type(base).from_pretrained(tmp_path / "out").state_dict()
    for name, origin in base.state_dict().items():
        deltas = [model.state_dict()[name].double() - origin.double() for model in models]
        torch.testing.assert_close(merged[name], (origin.double() + 0.5 * sum(deltas)).float())


def test_any_range_of_a_stack_is_what_transformers_loads(tmp_path: Path) -> None:
    model = save(tmp_path / "stack", "mixtral", 1, one_by_one=False)
    save(tmp_path / "single", "mixtral", 1, one_by_one=True)
    opened = [open_checkpoint(Source(name, "full", str(tmp_path / name))) for name in ("stack", "single")]
    align(opened)
    reference, other = opened
    assert reference.tensors.keys() == other.tensors.keys()
    generator = torch.Generator().manual_seed(0)
    loaded = model.state_dict()
    for name in (name for name in loaded if "experts" in name and "gate" in name):
        raw = loaded[name].numpy().tobytes()
        for _ in range(20):
            start, stop = sorted(torch.randint(0, len(raw) + 1, (2,), generator=generator).tolist())
            for each in (other, reference):
                assert each.read(name, start, stop).tobytes() == raw[start:stop]
