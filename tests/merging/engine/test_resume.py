"""A merge that dies anywhere leaves no model, and goes on to the same bits."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from merge_reference import SHAPES, write_family, write_model
from xxhash import xxh3_128_hexdigest

from hf_frmerge.checkpoints.tensors.writer import STAGING, CheckpointWriter
from hf_frmerge.errors import ArgumentError, CheckpointError, MergeError, ResumeError
from hf_frmerge.merging.arguments.merging_arguments import MergingArguments
from hf_frmerge.merging.engine.engine import StepObserver, StepOutcome
from hf_frmerge.merging.engine.processes import Processes
from hf_frmerge.merging.planning import blocks
from hf_frmerge.merging.planning.build_plan import build_plan
from hf_frmerge.merging.run import run_merge


class Killed(Exception):
    """Stands for whatever ends a process between two tensors."""


class KillAfter(StepObserver):
    def __init__(self, tensors: int) -> None:
        self.left = tensors

    def end(self, outcome: StepOutcome) -> bool:
        self.left -= 1
        if self.left < 0:
            raise Killed
        return True


def merge(experts: list[str], out: Path, observer: StepObserver | None = None, **options: Any) -> None:
    args = MergingArguments(output_dir=str(out), space="deltas", **options)
    plan = build_plan(experts[1:], args, [0.5, 0.3, 0.2], experts[0])
    run_merge(plan, observer or StepObserver(), Processes())


def output(folder: Path) -> dict[str, bytes]:
    names = ("model.safetensors", "merge_coefficients.safetensors", "config.json")
    return {name: (folder / name).read_bytes() for name in names}


def assert_no_model(folder: Path) -> None:
    """Nothing a loader would accept, and nothing that looks like weights."""
    names = {path.name for path in folder.iterdir()} if folder.exists() else set()
    assert not {n for n in names if n.endswith(".safetensors") and n != "merge_coefficients.safetensors"}
    assert "config.json" not in names


@pytest.fixture
def experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(blocks, "PIECE_ELEMENTS", 200)
    base, experts = write_family(tmp_path, dtype=torch.bfloat16)
    return [base, *experts]


@pytest.mark.parametrize("block", ["tensor", "row", "layer", "model"])
def test_resuming_after_any_tensor_gives_the_same_bits(experts: list[str], tmp_path: Path, block: str) -> None:
    merge(experts, tmp_path / "whole", block=block)
    for after in range(len(SHAPES)):
        out = tmp_path / f"killed{after}"
        with pytest.raises(Killed):
            merge(experts, out, KillAfter(after), block=block)
        assert_no_model(out)
        merge(experts, out, block=block, resume_from_checkpoint=True)
        assert output(out) == output(tmp_path / "whole")
        assert not (out / STAGING).exists()


@pytest.mark.parametrize("block", ["tensor", "model"])
def test_resuming_within_a_tensor_gives_the_same_bits(
    experts: list[str], tmp_path: Path, block: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge(experts, tmp_path / "whole", block=block)
    write = CheckpointWriter.write
    for calls in (1, 7, 16, 29):
        out, seen = tmp_path / f"killed{calls}", iter(range(10_000))

        def full_disk(self: CheckpointWriter, *args: Any, seen: Any = seen, calls: int = calls) -> None:
            if next(seen) >= calls:
                raise MergeError("no space left")
            write(self, *args)

        monkeypatch.setattr(CheckpointWriter, "write", full_disk)
        with pytest.raises(MergeError, match="no space left"):
            merge(experts, out, block=block)
        monkeypatch.setattr(CheckpointWriter, "write", write)
        assert_no_model(out)
        merge(experts, out, block=block, resume_from_checkpoint=True)
        assert output(out) == output(tmp_path / "whole")


def interrupted(experts: list[str], out: Path) -> None:
    with pytest.raises(Killed):
        merge(experts, out, KillAfter(5))


def test_a_changed_input_is_refused_by_name_even_with_its_old_time(experts: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    interrupted(experts, out)
    path = Path(experts[2]) / "model.safetensors"
    stat, data = path.stat(), bytearray(path.read_bytes())
    data[8 + int.from_bytes(data[:8], "little")] ^= 1  # one bit of one number of the first tensor
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(ResumeError, match=r"Tensor .* of expert '.*e1' is not what it was"):
        merge(experts, out, resume_from_checkpoint=True)
    assert_no_model(out)


def test_a_rewritten_input_is_warned_about(
    experts: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Tensors that were not merged yet cannot be compared with anything, so a new time is all there is to tell."""
    out = tmp_path / "out"
    interrupted(experts, out)
    path = Path(experts[2]) / "model.safetensors"
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    merge(experts, out, resume_from_checkpoint=True)
    assert [r.message for r in caplog.records if "e1" in r.message and "rewritten" in r.message]


def test_a_changed_option_is_refused_by_name(experts: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    interrupted(experts, out)
    with pytest.raises(ResumeError, match=r"option beta was 0.0 and is now 0.5"):
        merge(experts, out, beta=0.5, resume_from_checkpoint=True)
    merge(experts, out, resume_from_checkpoint=True, num_workers=1, memory_budget="1GiB")  # these change no bit


def test_damaged_results_are_computed_again(experts: list[str], tmp_path: Path) -> None:
    merge(experts, tmp_path / "whole")
    out = tmp_path / "out"
    interrupted(experts, out)
    staged = next((out / STAGING).glob("*.partial"))
    data = bytearray(staged.read_bytes())
    data[-4000:] = bytes(4000)
    staged.write_bytes(data)
    merge(experts, out, resume_from_checkpoint=True)
    assert output(out) == output(tmp_path / "whole")


def test_a_torn_last_line_of_the_journal_is_dropped(experts: list[str], tmp_path: Path) -> None:
    merge(experts, tmp_path / "whole")
    out = tmp_path / "out"
    interrupted(experts, out)
    journal = next((out / STAGING).glob("journal-*.jsonl"))
    journal.write_bytes(journal.read_bytes()[:-9])
    merge(experts, out, resume_from_checkpoint=True)
    assert output(out) == output(tmp_path / "whole")


def test_a_journal_torn_once_can_be_interrupted_again(experts: list[str], tmp_path: Path) -> None:
    merge(experts, tmp_path / "whole")
    out = tmp_path / "out"
    interrupted(experts, out)
    journal = next((out / STAGING).glob("journal-*.jsonl"))
    journal.write_bytes(journal.read_bytes()[:-9])
    with pytest.raises(Killed):  # the torn line must be gone before the next one is written
        merge(experts, out, KillAfter(6), resume_from_checkpoint=True)
    merge(experts, out, resume_from_checkpoint=True)
    assert output(out) == output(tmp_path / "whole")


@pytest.mark.parametrize("number", [0, 1, 2, -1])
def test_an_altered_line_of_the_journal_is_not_believed(
    experts: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    """One bit of a coefficient would make another model; as would a digit of what was merged."""
    merge(experts, tmp_path / "whole")
    out = tmp_path / "out"
    interrupted(experts, out)
    journal = next((out / STAGING).glob("journal-*.jsonl"))
    lines = journal.read_bytes().splitlines(keepends=True)
    place = lines[number].find(b'"float64": "') + 12 if b'"float64": "' in lines[number] else len(lines[number]) // 2
    altered = bytearray(lines[number])
    altered[place] = ord("B") if altered[place] != ord("B") else ord("C")
    lines[number] = bytes(altered)
    journal.write_bytes(b"".join(lines))
    merge(experts, out, resume_from_checkpoint=True)
    assert output(out) == output(tmp_path / "whole")
    told = [r.message for r in caplog.records if "is damaged" in r.message]
    assert len(told) == (number != -1)  # a kill damages the last, which nobody need be told


@pytest.mark.parametrize("text", [b'{"kind": "mer "x"]}', b'{"kind": "decided"}', b"[1]", b'{"kind": "written"}'])
def test_a_signed_line_of_something_else_is_answered(experts: list[str], tmp_path: Path, text: bytes) -> None:
    """The digest tells damage, and not who wrote a line."""
    out = tmp_path / "out"
    interrupted(experts, out)
    journal = next((out / STAGING).glob("journal-*.jsonl"))
    lines = journal.read_bytes().splitlines(keepends=True)
    signed = b'[%b, "%b"]\n' % (text, xxh3_128_hexdigest(text).encode())
    journal.write_bytes(b"".join([*lines[:2], signed, *lines[2:]]))
    if b"mer " in text:  # no JSON, so it counts as damaged
        merge(experts, out, resume_from_checkpoint=True)
        return
    with pytest.raises(ResumeError, match=r"Line 3 of .* is not what a merge writes .*Pass --overwrite"):
        merge(experts, out, resume_from_checkpoint=True)
    merge(experts, out, overwrite=True)


@pytest.mark.parametrize("link", [os.symlink, os.link])
@pytest.mark.parametrize("name", ["model.safetensors.partial", "journal-0.jsonl", "journal-0.jsonl.partial"])
def test_links_among_unfinished_files_are_not_written_through(
    experts: list[str], tmp_path: Path, link: Any, name: str
) -> None:
    merge(experts, tmp_path / "whole")
    out, input_file = tmp_path / "out", Path(experts[1]) / "model.safetensors"
    interrupted(experts, out)
    before = input_file.read_bytes()
    (out / STAGING / name).unlink(missing_ok=True)
    link(input_file, out / STAGING / name)
    merge(experts, out, resume_from_checkpoint=True)
    assert input_file.read_bytes() == before
    assert output(out) == output(tmp_path / "whole")


def test_a_linked_folder_of_unfinished_files_is_refused_and_overwritten(experts: list[str], tmp_path: Path) -> None:
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    interrupted(experts, out)
    (out / STAGING).rename(elsewhere)
    (out / STAGING).symlink_to(elsewhere)
    before = {path.name: path.read_bytes() for path in elsewhere.iterdir()}
    with pytest.raises(ResumeError, match=r"\.frmerge is a link.*Start anew with --overwrite and without --resume"):
        merge(experts, out, resume_from_checkpoint=True)
    merge(experts, out, overwrite=True)
    merge(experts, tmp_path / "whole")
    assert output(out) == output(tmp_path / "whole")
    assert {path.name: path.read_bytes() for path in elsewhere.iterdir()} == before


def test_an_interrupted_folder_asks_what_to_do_and_overwrite_starts_anew(experts: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    interrupted(experts, out)
    with pytest.raises(ArgumentError, match=r"holds an interrupted merge. Pass --resume"):
        merge(experts, out)
    merge(experts, out, overwrite=True, method="linear")
    merge(experts, tmp_path / "linear", method="linear")
    assert output(out) == output(tmp_path / "linear")


def test_a_finished_merge_has_nothing_to_resume(experts: list[str], tmp_path: Path) -> None:
    merge(experts, tmp_path / "out")
    with pytest.raises(ResumeError, match="is complete"):
        merge(experts, tmp_path / "out", resume_from_checkpoint=True)


def test_overwriting_leaves_no_file_of_the_old_merge(experts: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    merge(experts, out, max_shard_size="2KB")
    assert len(list(out.glob("model-*.safetensors"))) > 3
    told = [out / name for name in ("merge_evaluation.json", "merge_report.html")]
    for file in told:
        file.write_text("of the merge before")
    merge(experts, out, overwrite=True)
    assert not any(file.exists() for file in told)
    assert [p.name for p in out.glob("model*")] == ["model.safetensors"]


def test_overwriting_makes_the_old_model_unloadable_at_once(experts: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    merge(experts, out)
    with pytest.raises(Killed):
        merge(experts, out, KillAfter(3), overwrite=True)
    assert_no_model(out)
    merge(experts, out, resume_from_checkpoint=True)
    merge(experts, tmp_path / "whole")
    assert output(out) == output(tmp_path / "whole")


def test_a_finished_merge_that_died_while_it_cleaned_up_is_finished(experts: list[str], tmp_path: Path) -> None:
    interrupted(experts, tmp_path / "interrupted")
    out = tmp_path / "out"
    merge(experts, out)
    shutil.copytree(tmp_path / "interrupted" / STAGING, out / STAGING)
    before = output(out)
    with pytest.raises(ResumeError, match="is complete"):
        merge(experts, out, resume_from_checkpoint=True)
    assert output(out) == before
    assert not (out / STAGING).exists()


def test_resuming_does_not_replace_a_model_that_is_no_merge(experts: list[str], tmp_path: Path) -> None:
    out = tmp_path / "other"
    write_model(out, {"a": torch.ones(3)})
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(ResumeError, match="no interrupted merge"):
        merge(experts, out, resume_from_checkpoint=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_refused_resume_loses_nothing(experts: list[str], tmp_path: Path) -> None:
    """Another dtype means files of another size: they must not be laid out before the record has been read."""
    out = tmp_path / "out"
    interrupted(experts, out)
    before = {path.name: path.read_bytes() for path in (out / STAGING).iterdir()}
    with pytest.raises(ResumeError, match="option dtype"):
        merge(experts, out, dtype="float32", resume_from_checkpoint=True)
    assert {path.name: path.read_bytes() for path in (out / STAGING).iterdir()} == before


@pytest.mark.parametrize("kept", [0, 5])
def test_a_kill_in_the_first_line_of_the_journal_is_no_obstacle(experts: list[str], tmp_path: Path, kept: int) -> None:
    merge(experts, tmp_path / "whole")
    out = tmp_path / "out"
    interrupted(experts, out)
    os.truncate(next((out / STAGING).glob("journal-*.jsonl")), kept)
    merge(experts, out, resume_from_checkpoint=True)
    assert output(out) == output(tmp_path / "whole")


def test_a_vanished_input_is_named_and_the_merge_can_go_on(experts: list[str], tmp_path: Path) -> None:
    merge(experts, tmp_path / "whole")
    out, path = tmp_path / "out", Path(experts[1]) / "model.safetensors"
    data = path.read_bytes()
    args = MergingArguments(output_dir=str(out), space="deltas")
    plan = build_plan(experts[1:], args, [0.5, 0.3, 0.2], experts[0])
    os.truncate(path, len(data) // 2)  # behind the back of the plan, which has read the header
    with pytest.raises(CheckpointError, match=r"e0"):
        run_merge(plan, StepObserver(), Processes())
    assert_no_model(out)
    path.write_bytes(data)
    merge(experts, out, resume_from_checkpoint=True)
    assert output(out) == output(tmp_path / "whole")


def test_an_input_cut_short_within_its_last_page_is_named(experts: list[str], tmp_path: Path) -> None:
    """What is missing of a page reads as zeros, in silence."""
    merge(experts, tmp_path / "whole")
    out, path = tmp_path / "out", Path(experts[1]) / "model.safetensors"
    data = path.read_bytes()

    class CutShort(StepObserver):
        def end(self, outcome: StepOutcome) -> bool:
            os.truncate(path, len(data) - 1)
            return True

    with pytest.raises(CheckpointError, match=rf"e0.* had {len(data)} bytes and now has {len(data) - 1}\b"):
        merge(experts, out, observer=CutShort())
    assert_no_model(out)
    path.write_bytes(data)
    merge(experts, out, overwrite=True)
    assert output(out) == output(tmp_path / "whole")


MERGE = """
import sys
from hf_frmerge.merging.arguments.merging_arguments import MergingArguments
from hf_frmerge.merging.engine.engine import StepObserver
from hf_frmerge.merging.planning.build_plan import build_plan
from hf_frmerge.merging.engine.processes import Processes
from hf_frmerge.merging.run import run_merge
args = MergingArguments(output_dir=sys.argv[1], resume_from_checkpoint=True)
print("ready", flush=True)
run_merge(build_plan(sys.argv[2:], args), StepObserver(), Processes())
"""

FULL_DISK = """
import resource, sys
from hf_frmerge.errors import MergeError
from hf_frmerge.merging.engine.engine import Engine
from hf_frmerge.merging.engine.journal import Journal
run, when = Engine.run, sys.argv.pop(1)
def full():
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY))
def run_on_full_disk(self, steps):
    full()
    if when == "journal":
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, resource.RLIM_INFINITY))
        self._output._writer.write = lambda *args: None  # only the record is written
    return run(self, steps)
if when == "start":
    full()
Engine.run = run_on_full_disk
try:
    exec(open(sys.argv.pop(1)).read())
except MergeError as error:
    sys.exit(str(error))
"""


@pytest.mark.parametrize(
    ("when", "sentence"),
    [
        ("start", "model.safetensors.partial could not be created: File too large."),
        ("data", "model.safetensors.partial could not be written: File too large. What was written so far is kept"),
        ("journal", "journal-0.jsonl could not be written: File too large. What was written so far is kept"),
    ],
)
def test_a_full_disk_is_named_and_the_merge_can_go_on(tmp_path: Path, when: str, sentence: str) -> None:
    """The kernel refuses to write: a file size limit stands for a full disk, which only root could make."""
    large = {f"layers.{i}.weight": torch.randn(300, 300) for i in range(10)}
    experts = [write_model(tmp_path / f"e{k}", {n: t + k for n, t in large.items()}) for k in range(2)]
    out, merge_script = tmp_path / "out", tmp_path / "merge.py"
    merge_script.write_text(MERGE)
    failed = subprocess.run(
        [sys.executable, "-c", FULL_DISK, when, str(merge_script), str(out), *experts],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert failed.returncode == 1 and failed.stderr.startswith(f"{out / STAGING}/{sentence}"), failed.stderr
    assert_no_model(out)
    for folder in (out, tmp_path / "whole"):
        subprocess.run([sys.executable, "-c", MERGE, str(folder), *experts], check=True, capture_output=True)
    assert output(out) == output(tmp_path / "whole")


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_process_leaves_no_model_and_resumes_to_the_same_bits(tmp_path: Path, signum: int) -> None:
    large = {f"layers.{i}.weight": torch.randn(600, 600) for i in range(40)}
    experts = [write_model(tmp_path / f"e{k}", {n: t + k for n, t in large.items()}) for k in range(3)]
    run = [sys.executable, "-c", MERGE]
    subprocess.run([*run, str(tmp_path / "whole"), *experts], check=True, capture_output=True)
    out = tmp_path / "out"
    for delay in (0.0, 0.01, 0.03, 0.06):
        process = subprocess.Popen(
            [*run, str(out), *experts], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(delay)
        process.send_signal(signum)
        process.communicate(timeout=60)
        if process.returncode != 0:
            assert_no_model(out)
    if not (out / "config.json").exists():
        subprocess.run([*run, str(out), *experts], check=True, capture_output=True)
    assert output(out) == output(tmp_path / "whole")
