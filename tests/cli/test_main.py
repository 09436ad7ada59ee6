"""The front door: quick help, exit codes, sentences instead of tracebacks, Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from click_runner import click_runner
from merge_reference import write_family
from safetensors.torch import load_file, save_file

from hf_frmerge.cli.main import _COMMANDS, LazyGroup, main
from hf_frmerge.merging.callbacks.progress import ProgressCallback

Frmerge = Callable[..., Result]
SCRIPT = Path(sys.executable).parent / "frmerge"


@pytest.mark.parametrize("command", [[], ["merge"], ["plan"], ["inspect"], ["evaluate"], ["search"], ["demo"]])
def test_help_imports_nothing_heavy(command: list[str]) -> None:
    """Under half a second follows from what is imported; a clock would measure the machine."""
    program = (
        "import sys\nfrom hf_frmerge.cli.main import main\n"
        f"main({[*command, '--help']!r}, standalone_mode=False)\n"
        "heavy = {'torch', 'transformers', 'numpy', 'rich', 'yaml', 'huggingface_hub', 'safetensors'}\n"
        "print('imported:', sorted(heavy & sys.modules.keys()), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr == "imported: []\n"
    assert "Usage: " in done.stdout


# What a merge of two full models, with no other option, has no use for.
NOT_FOR_A_PLAIN_MERGE = [
    "torch",
    "transformers",
    "huggingface_hub",
    "filelock",
    "multiprocessing",
    "numpy.ma",
    "rich.table",
    "hf_frmerge.calibration",
    "hf_frmerge.checkpoints.adapters.adapter",
    "hf_frmerge.checkpoints.quantised",
    "hf_frmerge.checkpoints.vocabularies.union",
    "hf_frmerge.comparison",
    "hf_frmerge.evaluation",
    "hf_frmerge.extraction",
    "hf_frmerge.merging.inspection",
    "hf_frmerge.merging.operands.factor_inputs",
    "hf_frmerge.merging.operands.row_mapped",
    "hf_frmerge.methods.sparse",
    "hf_frmerge.provenance",
    "hf_frmerge.report",
    "hf_frmerge.weighting.checkpoint_soup",
    "hf_frmerge.weighting.continual",
    "hf_frmerge.weighting.norm_aware",
]


def test_a_plain_merge_imports_nothing_of_other_merges(tmp_path: Path) -> None:
    """Imports are most of what a small merge takes."""
    experts = write_family(tmp_path, 2)[1]
    program = (
        "import sys, numpy, rich.console\n"  # what these bring depends on their version
        "own = set(sys.modules)\nfrom hf_frmerge.cli.main import main\n"
        f"main({['merge', *experts, '--output-dir', str(tmp_path / 'out')]!r}, standalone_mode=False)\n"
        f"print('imported:', sorted({set(NOT_FOR_A_PLAIN_MERGE)!r} & (sys.modules.keys() - own)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "imported: []"


def test_the_installed_command_runs() -> None:
    done = subprocess.run([SCRIPT, "--help"], capture_output=True, text=True, check=True)
    assert all(command in done.stdout for command in _COMMANDS)
    done = subprocess.run(
        [SCRIPT, "merge", "one", "two", "--weights", "1"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("Error: `weights` needs one number per expert") and "Traceback" not in done.stderr


@pytest.mark.parametrize("name", _COMMANDS)
def test_every_command_is_there_and_has_debug(frmerge: Frmerge, name: str) -> None:
    assert isinstance(main, LazyGroup)
    result = frmerge(name, "--help")
    assert result.exit_code == 0 and "--debug" in result.stdout


def test_an_unknown_command_is_refused(frmerge: Frmerge) -> None:
    assert frmerge("mrege").exit_code == 2


USAGE = {
    "one expert": (["merge", "{math}"], "at least two experts"),
    "no expert": (["merge"], "No experts were named"),
    "unknown option": (["merge", "{math}", "{code}", "--methd", "karcher"], "--method"),
    "unknown method": (["merge", "{math}", "{code}", "--method", "avg"], "'avg' is not one of"),
    "weights of the wrong length": (["merge", "{math}", "{code}", "--weights", "1,2,3"], "one number per expert"),
    "a weight that is no number": (["merge", "{math}", "{code}", "--weights", "1,x"], "`weights[1]`"),
    "a negative weight": (["merge", "{math}", "{code}", "--weights", "1,-1"], "must not be negative"),
    "an output folder in use": (["merge", "{math}", "{code}", "--output-dir", "{base}"], "--overwrite"),
    "an output folder that is an input": (["merge", "{math}", "{code}", "--output-dir", "{math}"], "also an input"),
    "adapters without a base": (["merge", "{adapter}", "{math}", "--output-dir", "{out}"], "base_model"),
    "no data": (["evaluate", "{math}"], "--data"),
}


@pytest.mark.parametrize(("arguments", "sentence"), USAGE.values(), ids=USAGE)
def test_wrong_usage_exits_with_2(
    frmerge: Frmerge, models, tmp_path: Path, arguments: list[str], sentence: str
) -> None:
    result = frmerge(*(argument.format(**vars(models), out=tmp_path / "out") for argument in arguments))
    assert result.exit_code == 2
    assert sentence in result.stderr and result.stdout == ""
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


FAILURES = {
    "a folder that is not there": (["plan", "{math}", "./nowhere"], "no folder './nowhere'"),
    "a folder without a merge": (["verify", "{math}"], "merge_manifest.json"),
    "a card without a merge": (["card", "{math}"], "merge_manifest.json"),
    "a push without a merge": (["push", "{math}", "alice/math"], "merge_manifest.json"),
}


@pytest.mark.parametrize(("arguments", "sentence"), FAILURES.values(), ids=FAILURES)
def test_failures_exit_with_1(frmerge: Frmerge, models, arguments: list[str], sentence: str) -> None:
    result = frmerge(*(argument.format(**vars(models)) for argument in arguments))
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ") and sentence in result.stderr and result.stdout == ""


def test_nan_is_named_and_nothing_looks_finished(frmerge: Frmerge, models, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    bad.mkdir()
    for file in Path(models.code).iterdir():
        (bad / file.name).write_bytes(file.read_bytes())
    tensors = load_file(bad / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, bad / "model.safetensors", metadata={"format": "pt"})
    result = frmerge("merge", models.math, bad, "--output-dir", tmp_path / "out")
    assert result.exit_code == 1
    error = result.stderr[result.stderr.index("Error: ") :]
    assert "model.norm.weight" in error and str(bad) in error
    assert not (tmp_path / "out" / "config.json").exists()
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_debug_shows_the_traceback(models) -> None:
    result = click_runner().invoke(main, ["merge", models.math, "--debug"])
    assert type(result.exception).__name__ == "ArgumentError"


def test_a_surprise_is_one_sentence_and_a_hint(frmerge: Frmerge, models, tmp_path: Path, monkeypatch) -> None:
    def break_down(*_args: object, **_kwargs: object) -> None:
        raise ZeroDivisionError("float division by zero")

    monkeypatch.setattr(ProgressCallback, "on_step_end", break_down)
    result = frmerge("merge", *models.experts, "--output-dir", tmp_path / "out")
    assert result.exit_code == 1
    assert "ZeroDivisionError: float division by zero" in result.stderr and "--debug" in result.stderr
    assert "Traceback" not in result.stderr


def test_ctrl_c_says_how_to_go_on_and_resume_does(frmerge: Frmerge, models, tmp_path: Path, monkeypatch) -> None:
    """A real SIGINT, sent from within the third tensor."""
    advance, calls = ProgressCallback.on_step_end, []

    def interrupt(*args: object, **kwargs: object) -> None:
        calls.append(advance(*args, **kwargs))  # type: ignore[arg-type,func-returns-value]
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)

    merge = ["merge", *models.experts, "--output-dir", tmp_path / "out"]
    with monkeypatch.context() as patch:
        patch.setattr(ProgressCallback, "on_step_end", interrupt)
        stopped = frmerge(*merge)
    assert stopped.exit_code == 130
    assert "--resume" in stopped.stderr and "Traceback" not in stopped.stderr
    assert not (tmp_path / "out" / "config.json").exists()

    again = frmerge(*merge)
    assert again.exit_code == 2 and "--resume" in again.stderr
    assert frmerge(*merge, "--resume").exit_code == 0
    assert frmerge("merge", *models.experts, "--output-dir", tmp_path / "straight").exit_code == 0
    resumed, straight = (tmp_path / name / "model.safetensors" for name in ("out", "straight"))
    assert resumed.read_bytes() == straight.read_bytes()


def test_warnings_are_plain_lines(models, tmp_path: Path) -> None:
    """A note of the plan arrives on stderr without a file name or a line number, and `--json` stays clean."""
    other = tmp_path / "other"
    other.mkdir()
    for file in Path(models.code).iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    result = click_runner().invoke(
        main, ["merge", models.math, str(other), "--output-dir", str(tmp_path / "o"), "--json"]
    )
    assert result.exit_code == 0
    assert "rms_norm_eps" in result.stderr and "callbacks.py" not in result.stderr
    assert json.loads(result.stdout)["complete"]


@pytest.mark.parametrize(
    "command", [("plan", "a", "b"), ("merge", "a", "b", "--output-dir", "out"), ("verify", "out")]
)
def test_closed_and_narrow_outputs_are_no_errors(tmp_path: Path, command: tuple[str, ...]) -> None:
    """The one is `>&-` of a shell, the other an old locale."""
    experts = write_family(tmp_path, 2)[1]
    Path(experts[0]).rename(tmp_path / "a")
    Path(experts[1]).rename(tmp_path / "b")
    if command[0] == "verify":
        subprocess.run(
            [SCRIPT, "merge", "a", "b", "--output-dir", "out"], cwd=tmp_path, check=True, capture_output=True
        )
    closed = subprocess.run(
        ["sh", "-c", f"exec {SCRIPT} {' '.join(command)} >&-"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert closed.returncode == 0, closed.stderr
    again = [*command, "--overwrite"] if command[0] == "merge" else command
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii"}
    narrow = subprocess.run([SCRIPT, *again], cwd=tmp_path, capture_output=True, env=ascii_only, check=False)
    assert narrow.returncode == 0, narrow.stderr
    assert narrow.stdout.isascii()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("command", [["--help"], ["plan", "a", "b"]])
def test_a_full_disk_under_the_output_is_a_sentence(tmp_path: Path, command: list[str]) -> None:
    experts = write_family(tmp_path, 2)[1]
    command = [experts.pop() if part in ("a", "b") else part for part in command]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([SCRIPT, *command], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert "No space left" in done.stderr
    assert "Traceback" not in done.stderr and "not expected" not in done.stderr
