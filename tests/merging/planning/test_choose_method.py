"""`method="auto"`: which method stands for it, and that nothing downstream knows."""

from __future__ import annotations

import re
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from click_runner import click_runner
from merge_reference import random_model, write_family, write_model
from peft import LoraConfig, get_peft_model
from tiny_models import save_llama_family
from transformers import LlamaForCausalLM

from hf_frmerge import FisherRaoMerger, MergingArguments
from hf_frmerge.cli.main import main
from hf_frmerge.errors import ArgumentError
from hf_frmerge.merging.planning.build_plan import build_plan
from hf_frmerge.merging.record.manifest import read_manifest
from hf_frmerge.provenance.verify import verify


def write_adapters(folder: Path) -> list[str]:
    """Two adapters of `folder/base`."""
    save_llama_family(folder, ["a", "b", "c"], 0.1, eos_token="</s>")
    for number in range(2):
        torch.manual_seed(number)
        config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        get_peft_model(LlamaForCausalLM.from_pretrained(folder / "base"), config).save_pretrained(
            folder / f"a{number}"
        )
    return [str(folder / f"a{number}") for number in range(2)]


@pytest.mark.parametrize(
    ("kinds", "has_base", "space", "chosen"),
    [
        ("full", True, None, ("swudi", "deltas")),
        ("full", True, "deltas", ("swudi", "deltas")),
        ("full", True, "weights", ("linear", "weights")),
        ("full", False, None, ("linear", "weights")),
        ("adapter", True, None, ("linear", "deltas")),
        ("adapter", False, None, ("linear", "deltas")),
        ("both", True, None, ("linear", "deltas")),
        ("one adapter", True, None, ("linear", "deltas")),
    ],
)
def test_the_kind_of_the_experts_decides(
    tmp_path: Path, kinds: str, has_base: bool, space: str | None, chosen: tuple[str, str]
) -> None:
    adapters = write_adapters(tmp_path)
    full = [str(tmp_path / name) for name in ("math", "code")]
    experts = {"full": full, "adapter": adapters, "both": [full[0], adapters[0]], "one adapter": adapters[:1]}[kinds]
    args = MergingArguments(method="auto", space=space)
    with closing(build_plan(experts, args, base_model=str(tmp_path / "base") if has_base else None)) as plan:
        assert (plan.args.method, plan.space) == chosen
        assert plan.chooses_method and plan.args.beta == 0
        assert sum(note.startswith(f"method='auto' is {chosen[0]} here: ") for note in plan.notes) == 1
    assert args.method == "auto"


@pytest.mark.parametrize(
    "options",
    [{"memory_budget": "1KiB"}, {"block": "row"}, {"norm": "max"}, {"scale": 0.7}, {"on_ambiguous": "linear"}],
)
def test_what_takes_no_matrices_gets_a_mean(tmp_path: Path, options: dict[str, Any]) -> None:
    base, experts = write_family(tmp_path)
    with closing(build_plan(experts, MergingArguments(method="auto", **options), base_model=base)) as plan:
        assert (plan.args.method, plan.space) == ("nre", "deltas")
        told = " ".join(plan.notes)
    assert ("swudi has kept more still, but it merges" in told) == ("memory_budget" in options)
    if "memory_budget" in options:  # what it says to set is enough
        enough = re.search(r"memory_budget=(\w+)", told)
        assert enough is not None
        args = MergingArguments(method="auto", memory_budget=enough[1])
        with closing(build_plan(experts, args, base_model=base)) as plan:
            assert plan.args.method == "swudi"


def test_prompts_choose_among_means(tmp_path: Path) -> None:
    base, experts = write_family(tmp_path)
    merger = FisherRaoMerger(
        experts, MergingArguments(method="auto"), base_model=base, calibration_dataset=[{"text": "a"}]
    )
    with closing(merger.plan()) as plan:
        assert plan.args.method == "nre"


def test_a_post_step_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    base, experts = write_family(tmp_path)
    args = MergingArguments(method="auto", post_step="svc", memory_budget="1KiB")
    with pytest.raises(ArgumentError, match=r"post_step='svc' merges .* as one matrix"):
        build_plan(experts, args, base_model=base)


def test_the_record_has_what_it_was_and_checks(tmp_path: Path) -> None:
    base, experts = write_family(tmp_path)
    options = ("--base-model", base, "--output-dir")
    run = click_runner()
    plan = run.invoke(main, ["plan", *experts, "--method", "auto", *options, str(tmp_path / "out")])
    assert plan.exit_code == 0, plan.stderr
    shown = " ".join(plan.stdout.split())
    assert "(swudi, deltas, block tensor)" in shown and "method='auto' is swudi here: of full fine-tunes" in shown
    for name, method in (("out", ["auto"]), ("named", ["swudi", "--space", "deltas"])):
        merged = run.invoke(main, ["merge", *experts, "--method", *method, *options, str(tmp_path / name)])
        assert merged.exit_code == 0, merged.stderr
    out, named = tmp_path / "out", tmp_path / "named"
    assert (out / "model.safetensors").read_bytes() == (named / "model.safetensors").read_bytes()
    manifest = read_manifest(out)
    assert (manifest.method, manifest.arguments["method"], manifest.space) == ("swudi", "swudi", "deltas")
    assert verify(str(out)).problems == []
    assert "--method swudi" in (out / "README.md").read_text()
    again = run.invoke(main, ["reproduce", str(out), "--output-dir", str(tmp_path / "again")])
    assert again.exit_code == 0, again.stderr


def test_one_more_expert_and_weights_by_name_go_on_with_it(tmp_path: Path) -> None:
    base, experts = write_family(tmp_path)
    args = MergingArguments(output_dir=str(tmp_path / "out"), method="auto", disable_tqdm=True)
    merger = FisherRaoMerger(experts, args, "nan", base).merge()
    another = write_model(tmp_path / "e3", random_model(9))
    merger.add_expert(another, str(tmp_path / "next"))
    assert read_manifest(tmp_path / "next").method == "swudi"


def test_beta_is_chosen_with_it() -> None:
    with pytest.raises(ArgumentError, match=r"chooses beta, too, but got 0.5. Leave out one of the two"):
        MergingArguments(method="auto", beta=0.5)
    MergingArguments(method="auto")
    MergingArguments(beta=0.5)
