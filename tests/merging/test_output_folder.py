"""What may not be in an output folder, who may write to it, and what of an earlier model may not stay."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from click_runner import click_runner
from merge_reference import SHAPES, write_family
from safetensors.torch import save_file

from hf_frmerge import FisherRaoMerger
from hf_frmerge.checkpoints.adapters import writer as adapter_writer
from hf_frmerge.checkpoints.lock import LOCK_FILE, sole_writer
from hf_frmerge.checkpoints.resolve import Source
from hf_frmerge.checkpoints.tensors.reader import open_checkpoint
from hf_frmerge.checkpoints.tensors.writer import STAGING
from hf_frmerge.cli.main import main
from hf_frmerge.errors import ArgumentError, MergeError, ResumeError
from hf_frmerge.evaluation.record import EvaluationRecord
from hf_frmerge.extraction.extract_lora import ExtractOptions, extract_lora
from hf_frmerge.merging import run
from hf_frmerge.merging.arguments.merging_arguments import MergingArguments
from hf_frmerge.merging.callbacks.callback import MergeCallback

TAKEN = "Another merge or push is at work in"


def write_adapter(folder: Path, seed: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (rows, columns) in {n: s for n, s in SHAPES.items() if "q_proj" in n}.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        tensors[f"{module}.lora_A.weight"] = torch.randn(4, columns, generator=generator)
        tensors[f"{module}.lora_B.weight"] = torch.randn(rows, 4, generator=generator)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "org/base"}))
    return str(folder)


@pytest.fixture
def full(tmp_path: Path) -> list[str]:
    return write_family(tmp_path, 2)[1]


@pytest.fixture
def adapters(tmp_path: Path) -> list[str]:
    return [write_adapter(tmp_path / f"lora{seed}", seed) for seed in (1, 2)]


def merge(experts: list[str], out: Path, *callbacks: MergeCallback, **options: Any) -> FisherRaoMerger:
    args = MergingArguments(output_dir=str(out), report_to="none", disable_tqdm=True, **options)
    return FisherRaoMerger(experts, args=args, callbacks=list(callbacks)).merge()


def read(folder: str | Path) -> Any:
    return open_checkpoint(Source(str(folder), "full", str(folder)))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Stop(Exception):
    """Ends a merge in mid-air."""


class AtTensor(MergeCallback):
    """Does something once, when a tensor is done."""

    def __init__(self, act: Callable[[], Any]) -> None:
        self.act, self.was_called = act, False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.was_called:
            self.was_called = True
            self.act()


# Inputs under another name


def hard_links(expert: Path, out: Path) -> None:
    shutil.copytree(expert, out, copy_function=os.link)


def soft_links(expert: Path, out: Path) -> None:
    out.mkdir()
    for path in expert.iterdir():
        (out / path.name).symlink_to(path)


def one_file(expert: Path, out: Path) -> None:
    out.mkdir()
    config = next(expert.glob("*config.json"))
    (out / config.name).hardlink_to(config)


def folder_link(expert: Path, out: Path) -> None:
    out.mkdir()
    (expert / "figures").mkdir()
    (out / "figures").symlink_to(expert / "figures")


def whole_folder(expert: Path, out: Path) -> None:
    out.symlink_to(expert)


@pytest.mark.parametrize("flag", ["overwrite", "resume_from_checkpoint"])
@pytest.mark.parametrize("plant", [hard_links, soft_links, one_file, folder_link, whole_folder])
@pytest.mark.parametrize("kind", ["full", "adapters"])
def test_an_input_under_another_name_is_refused_by_name(
    tmp_path: Path, request: pytest.FixtureRequest, kind: str, plant: Callable[[Path, Path], None], flag: str
) -> None:
    experts, out = request.getfixturevalue(kind), tmp_path / "out"
    plant(Path(experts[1]), out)
    before = contents(Path(experts[1]))
    with pytest.raises(ArgumentError, match=r"is also an input|one and the same under two names") as refused:
        merge(experts, out, **{flag: True})
    assert contents(Path(experts[1])) == before
    if "Remove" in str(refused.value):  # the advice, as often as it is given
        for _ in range(9):
            named = Path(str(refused.value).split("Remove ")[1].split(", which")[0])
            named.unlink()
            try:
                merge(experts, out, overwrite=True)
                break
            except ArgumentError as error:
                refused = pytest.ExceptionInfo.from_exception(error)
        merge(experts, tmp_path / "whole")
        assert contents(Path(experts[1])) == before
        name = "model.safetensors" if kind == "full" else "adapter_model.safetensors"
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_extract_lora_refuses_an_input_under_another_name(full: list[str], tmp_path: Path) -> None:
    before = contents(Path(full[0]))
    with pytest.raises(ArgumentError, match="is also an input"):
        extract_lora(read(full[0]), read(full[1]), full[0], ExtractOptions(rank=2, target_modules=["q_proj"]))
    soft_links(Path(full[0]), tmp_path / "out")
    with pytest.raises(ArgumentError, match="one and the same under two names"):
        extract_lora(
            read(full[0]),
            read(full[1]),
            tmp_path / "out",
            ExtractOptions(2, target_modules=["q_proj"]),
            overwrite=True,
        )
    assert contents(Path(full[0])) == before


def test_a_copy_of_the_model_is_not_written_through_links(full: list[str], tmp_path: Path) -> None:
    merger = merge(full, tmp_path / "out")
    soft_links(Path(full[0]), tmp_path / "copy")
    before = contents(Path(full[0]))
    merger.save_model(str(tmp_path / "copy"))
    assert contents(Path(full[0])) == before
    assert contents(tmp_path / "copy") == contents(tmp_path / "out")


# One writer


@pytest.mark.parametrize("kind", ["full", "adapters"])
@pytest.mark.parametrize("options", [{}, {"overwrite": True}, {"resume_from_checkpoint": True}])
def test_a_second_merge_is_refused_and_changes_nothing(
    tmp_path: Path, request: pytest.FixtureRequest, kind: str, options: dict[str, bool]
) -> None:
    experts, out = request.getfixturevalue(kind), tmp_path / "out"
    merge(experts, tmp_path / "whole")

    def outside_staging() -> dict[str, bytes]:  # where the first merge goes on while the second is refused
        return {name: data for name, data in contents(out).items() if not name.startswith(f"{STAGING}/")}

    def second() -> None:
        before = outside_staging()
        with pytest.raises(MergeError, match=TAKEN):
            merge(experts, out, method="linear", **options)
        assert outside_staging() == before

    merge(experts, out, AtTensor(second))
    weights = [path.name for path in out.glob("*.safetensors")]
    assert {name: (out / name).read_bytes() for name in weights} == {
        name: (tmp_path / "whole" / name).read_bytes() for name in weights
    }
    assert not (out / LOCK_FILE).exists() and not (out / STAGING).exists()


def test_a_merge_planned_before_another_began_and_ended_is_refused(full: list[str], tmp_path: Path) -> None:
    """Between its look at an empty folder and its lock, another merge may have come and gone."""
    out = tmp_path / "out"

    class Begun(MergeCallback):
        def on_merge_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            merge(full, out, method="linear")

    with pytest.raises(ArgumentError, match="is not empty"):
        merge(full, out, Begun())
    assert json.loads((out / "merge_manifest.json").read_text())["method"] == "linear"


@pytest.mark.parametrize("kind", ["full", "adapters"])
def test_a_merge_whose_folder_was_made_anew_leaves_it_alone(
    tmp_path: Path, request: pytest.FixtureRequest, kind: str
) -> None:
    experts, out = request.getfixturevalue(kind), tmp_path / "out"

    def removed_and_merged_again() -> None:
        shutil.rmtree(out)
        merge(experts, out, method="linear")

    with pytest.raises(MergeError, match="was removed or replaced while this merge was writing to it"):
        merge(experts, out, AtTensor(removed_and_merged_again))
    merge(experts, tmp_path / "linear", method="linear")
    name = "model.safetensors" if kind == "full" else "adapter_model.safetensors"
    assert (out / name).read_bytes() == (tmp_path / "linear" / name).read_bytes()


def test_the_card_is_written_before_another_may_begin(
    full: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, describe = tmp_path / "out", FisherRaoMerger._describe

    def refused_meanwhile(self: FisherRaoMerger, **kwargs: Any) -> None:
        monkeypatch.setattr(FisherRaoMerger, "_describe", describe)
        with pytest.raises(MergeError, match=TAKEN):
            merge(full, out, overwrite=True)
        describe(self, **kwargs)

    monkeypatch.setattr(FisherRaoMerger, "_describe", refused_meanwhile)
    merge(full, out)
    assert (out / "README.md").exists()


@pytest.mark.parametrize(
    "command",
    [
        ["card", "OUT"],
        ["report", "OUT"],
        ["push", "OUT", "me/merged"],
        ["evaluate", "OUT", "--data", "t=TEXT"],
        ["plan", "E0", "E1", "--output-dir", "OUT"],
        ["merge", "E0", "E1", "--output-dir", "OUT", "--overwrite"],
        ["extract-lora", "E0", "--base-model", "E1", "--output-dir", "OUT", "--overwrite"],
    ],
    ids=lambda command: command[0],
)
def test_commands_refuse_a_folder_that_is_written_to(full: list[str], tmp_path: Path, command: list[str]) -> None:
    out = tmp_path / "out"
    merge(full, out)
    (tmp_path / "text").write_text("some words\n")
    names = {"OUT": str(out), "E0": full[0], "E1": full[1], "t=TEXT": f"t={tmp_path / 'text'}"}
    with sole_writer(out):
        before = contents(out)
        result = click_runner().invoke(main, [names.get(word, word) for word in command])
        assert contents(out) == before
    assert result.exit_code == 1
    assert TAKEN in result.stderr


def test_measurements_of_a_model_replaced_meanwhile_are_not_kept(
    full: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    merge(full, out)
    (tmp_path / "text").write_text("some words\n")

    def replaced(*args: Any, **kwargs: Any) -> EvaluationRecord:
        merge(full, out, method="linear", overwrite=True)
        return EvaluationRecord()

    monkeypatch.setattr(import_module("hf_frmerge.cli.evaluate"), "_measure", replaced)
    result = click_runner().invoke(main, ["evaluate", str(out), "--data", f"t={tmp_path / 'text'}"])
    assert result.exit_code == 1
    assert "was replaced while it was measured" in result.stderr
    assert not (out / "merge_evaluation.json").exists()


def test_what_a_dead_merge_left_of_its_lock_is_no_model(full: list[str], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / LOCK_FILE).touch()
    merge(full, tmp_path / "out")
    assert not (tmp_path / "out" / LOCK_FILE).exists()


# What was there before


def test_a_model_and_an_adapter_replace_each_other(full: list[str], adapters: list[str], tmp_path: Path) -> None:
    """A loader that finds an adapter loads it, whatever else is there."""
    out = tmp_path / "out"
    for experts, ours, theirs in ((full, "", "adapter_"), (adapters, "adapter_", ""), (full, "", "adapter_")):
        merge(experts, out, overwrite=True)
        assert (out / f"{ours}config.json").exists() and (out / f"{ours}model.safetensors").exists()
        assert not (out / f"{theirs}config.json").exists() and not (out / f"{theirs}model.safetensors").exists()


def test_a_finished_adapter_has_nothing_to_resume(adapters: list[str], tmp_path: Path) -> None:
    merge(adapters, tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(ResumeError, match="is complete"):
        merge(adapters, tmp_path / "out", method="linear", resume_from_checkpoint=True)
    assert contents(tmp_path / "out") == before


def test_a_resume_does_not_replace_an_adapter_that_is_no_merge(adapters: list[str], tmp_path: Path) -> None:
    write_adapter(tmp_path / "mine", 7)
    before = contents(tmp_path / "mine")
    with pytest.raises(ResumeError, match="no interrupted merge"):
        merge(adapters, tmp_path / "mine", resume_from_checkpoint=True)
    assert contents(tmp_path / "mine") == before


# Adapters are whole or no adapters


@pytest.mark.parametrize("place", ["publish", "write_file", "write_coefficients", "write_manifest", "rename"])
def test_an_adapter_cannot_be_loaded_before_its_record_is_there(
    adapters: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    out = tmp_path / "out"
    merge(adapters, tmp_path / "whole")

    def stops(*args: Any, **kwargs: Any) -> None:
        assert not (out / "adapter_config.json").exists()
        raise Stop

    owner: Any = adapter_writer if place == "write_file" else run
    with monkeypatch.context() as patch:
        patch.setattr(adapter_writer.CheckpointWriter if place == "publish" else owner, place, stops)
        with pytest.raises(Stop):
            merge(adapters, out)
    assert not (out / "adapter_config.json").exists()
    assert (out / "adapter_model.safetensors").exists() == (place != "publish")
    merge(adapters, out, resume_from_checkpoint=True)
    for name in ("adapter_model.safetensors", "adapter_config.json", "merge_coefficients.safetensors"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize(
    ("make", "out", "named"),
    [
        (Path.touch, "x", "is a file"),
        (Path.touch, "x/deep/below", "is in '.*/x', which is a file"),
        (lambda path: path.symlink_to("nowhere"), "x", "is a link to nowhere, which is not there"),
        (lambda path: path.symlink_to("nowhere"), "x/below", "is in '.*/x', which is a link to nowhere"),
    ],
)
def test_output_where_there_can_be_no_folder(tmp_path: Path, full: list[str], make: Any, out: str, named: str) -> None:
    make(tmp_path / "x")
    with pytest.raises(ArgumentError, match=named):
        merge(full, tmp_path / out)
    assert not (tmp_path / "nowhere").exists()


def test_names_that_are_not_utf8_are_refused_before_the_merge(tmp_path: Path, full: list[str]) -> None:
    strange = os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe")
    with pytest.raises(ArgumentError, match=r"The name of .* is not UTF-8"):
        merge(full, Path(strange))
    shutil.copytree(full[0], strange)
    with pytest.raises(MergeError, match=r"The name of .* is not UTF-8"):
        merge([strange, full[1]], tmp_path / "out")
    Path(strange).rename(tmp_path / "plain")  # the advice
    merge([str(tmp_path / "plain"), full[1]], tmp_path / "out")


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "README.md", "generation_config.json"])
def test_a_cache_that_lost_a_file_is_named(tmp_path: Path, full: list[str], file: str) -> None:
    (Path(full[0]) / file).unlink(missing_ok=True)
    (Path(full[0]) / file).symlink_to("../blobs/lost")
    with pytest.raises(MergeError, match=f"{file} is a link to ../blobs/lost, which is not there"):
        merge(full, tmp_path / "out")
