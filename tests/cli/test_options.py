"""Options are the fields of the dataclasses, and a config file says the same as the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import click
import pytest
import yaml
from click.testing import Result
from click_runner import click_runner

from hf_frmerge.cli.merge import merge
from hf_frmerge.cli.options import (
    CALIBRATION,
    EXPERTS,
    HUB,
    MEAN,
    OUTPUT,
    PROGRESS,
    RUNNING,
    VOCABULARY,
    arguments_from,
    options_from,
)
from hf_frmerge.errors import ArgumentError
from hf_frmerge.merging.arguments.expert_arguments import ExpertArguments
from hf_frmerge.merging.arguments.merging_arguments import MergingArguments

GROUPS = (EXPERTS, VOCABULARY, MEAN, CALIBRATION, OUTPUT, RUNNING, PROGRESS, HUB)
Arguments = tuple[ExpertArguments, MergingArguments]


def parse(*arguments: str) -> Arguments:
    """What `frmerge merge ARGUMENTS` would merge."""
    seen: list[Arguments] = []

    @click.command()
    @click.argument("experts", nargs=-1)
    @click.option("--config")
    @options_from(*GROUPS)
    def command(experts: tuple[str, ...], config: str | None, **options: object) -> None:
        seen.append(arguments_from(experts, config, options))

    click_runner().invoke(command, arguments, catch_exceptions=False)
    return seen[0]


OPTIONS = [
    ("--method slerp", {"method": "slerp"}),
    ("--space deltas --base-model b", {"space": "deltas", "base_model": "b"}),
    ("--weights 0.5,0.3", {"weights": [0.5, 0.3]}),
    ("--beta -0.5 --scale 2 --tol 1e-6 --max-iter 7", {"beta": -0.5, "scale": 2.0, "tol": 1e-6, "max_iter": 7}),
    ("--weight-rules mlp=1,0 --weight-rules attn=0:1,1:0", {"weight_rules": ["mlp=1,0", "attn=0:1,1:0"]}),
    ("--overwrite --no-strict", {"overwrite": True, "strict": False}),
    ("--resume", {"resume_from_checkpoint": True}),
    ("--adapter-rank 8 --adapter-output adapter", {"adapter_rank": 8, "adapter_output": "adapter"}),
    ("--no-hub-private-repo --disable-tqdm", {"hub_private_repo": False, "disable_tqdm": True}),
    ("--calibration a=a.txt --calibration b=b.txt", {"calibration": ["a=a.txt", "b=b.txt"]}),
    ("--calibration self --num-calibration-samples 16", {"calibration": ["self"], "num_calibration_samples": 16}),
    ("--calibration self:chat", {"calibration": ["self:chat"]}),
    ("--fisher kfac --fisher-labels exact", {"fisher": "kfac", "fisher_labels": "exact"}),
    ("--refine 30 --refine-loss fisher_rao", {"refine_steps": 30, "refine_loss": "fisher_rao"}),
    ("--refine-steps 30 --refine-learning-rate 1e-5", {"refine_steps": 30, "refine_learning_rate": 1e-5}),
    (
        "--refine 30 --refine-loss jsd --refine-beta 0.1",
        {"refine_steps": 30, "refine_loss": "jsd", "refine_beta": 0.1},
    ),
    (
        "--refine 30 --refine-teacher barycentre --refine-lmbda 0.5",
        {"refine_steps": 30, "refine_teacher": "barycentre", "refine_lmbda": 0.5},
    ),
    ("--refine 30 --refine-written-samples 192", {"refine_steps": 30, "refine_written_samples": 192}),
    ("--refine 30 --refine-rho 0.05", {"refine_steps": 30, "refine_rho": 0.05}),
    (
        "--max-calibration-length 64 --calibration-batch-size 2",
        {"max_calibration_length": 64, "calibration_batch_size": 2},
    ),
    ("--max-shard-size 5GB --memory-budget 1GiB", {"max_shard_size": "5GB", "memory_budget": "1GiB"}),
]


@pytest.mark.parametrize("suffix", ["yml", "json"])
@pytest.mark.parametrize(("options", "values"), OPTIONS, ids=[options for options, _ in OPTIONS])
def test_command_line_and_file_say_the_same(tmp_path: Path, options: str, values: dict, suffix: str) -> None:
    file = tmp_path / f"merge.{suffix}"
    config = {"experts": ["a", "b"], **values}
    file.write_text(json.dumps(config) if suffix == "json" else yaml.safe_dump(config))
    from_options = parse("a", "b", *options.split())
    assert from_options == parse(str(file)) == parse("--config", str(file))
    chosen = vars(from_options[0]) | vars(from_options[1])
    assert {name: chosen[name] for name in values} == values


def test_the_command_line_overrides_the_file(tmp_path: Path) -> None:
    file = tmp_path / "merge.yml"
    file.write_text("experts: [a, b]\nmethod: linear\ntol: 1e-6\noverwrite: true\n")
    experts, args = parse("--config", str(file), "c", "d", "e", "--method", "nre", "--no-overwrite")
    assert experts.experts == ["c", "d", "e"]
    assert (args.method, args.tol, args.overwrite) == ("nre", 1e-6, False)


def test_what_is_not_given_is_the_default_of_the_dataclass() -> None:
    assert parse("a", "b") == (ExpertArguments(["a", "b"]), MergingArguments())


def test_a_file_with_an_unknown_key_is_refused(frmerge: Callable[..., Result], tmp_path: Path) -> None:
    file = tmp_path / "merge.yml"
    file.write_text("experts: [a, b]\nmehtod: karcher\n")
    result = frmerge("merge", file)
    assert result.exit_code == 2
    assert "'mehtod'" in result.stderr and "Did you mean 'method'" in result.stderr


def test_a_file_without_experts_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "merge.yml"
    file.write_text("method: karcher\n")
    with pytest.raises(ArgumentError, match="No experts"):
        parse(str(file))


def test_every_field_is_an_option_or_left_out_on_purpose() -> None:
    offered = {name for group in GROUPS for names in group.values() for name in names}
    known = {field.name for arguments in (ExpertArguments, MergingArguments) for field in fields(arguments)}
    evaluation = {name for name in known if "eval" in name} | {"use_cpu", "dataloader_num_workers"}
    assert known - offered - evaluation == {"experts"}


def test_help_shows_choices_and_defaults_of_the_fields() -> None:
    help_text = " ".join(merge.get_help(click.Context(merge, terminal_width=1000)).split())
    for field in fields(MergingArguments):
        if field.name in MEAN["The mean"]:
            assert field.metadata["help"] in help_text
            assert all(choice in help_text for choice in field.metadata.get("choices", []))
    assert "[default: karcher]" in help_text and "[default: 1e-12]" in help_text
