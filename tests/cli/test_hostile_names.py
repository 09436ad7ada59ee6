"""What strangers named reaches the terminal as text: no control, no direction character of theirs is sent to it."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from safetensors.numpy import save_file

from hf_frmerge.errors import CheckpointError
from hf_frmerge.merging.callbacks.progress import ProgressCallback

Frmerge = Callable[..., Result]

# Title of the window, colour, cleared screen; the same as one C1 character; right to left; a line written over.
HOSTILE = "\x1b]0;owned\x07\x1b[31m\x1b[2J\x9b2Jab\u202ecd\u2066\rname"


def is_clean(result: Result) -> bool:
    """Whether all that was printed is text; tqdm's bars go back to the start of their line."""
    printed = result.stdout + result.stderr
    return all(c.isprintable() or c in "\n\r" for c in printed) and ("⟨U+001B⟩" in printed or "\\x1b" in printed)


def write_model(folder: Path, seed: int, **changes: object) -> Path:
    folder.mkdir(parents=True)
    values = np.random.default_rng(seed).standard_normal((4, 4)).astype(np.float32)
    save_file({HOSTILE: values, "b": values + 1}, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "x", "rms_norm_eps": 1.0, **changes}))
    return folder


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("hostile")
    return [write_model(root / "one", 1), write_model(root / f"two{HOSTILE}", 2, rms_norm_eps=HOSTILE)]


@pytest.mark.parametrize(
    "options", [["inspect", "--all"], ["plan", "--output-dir", "nowhere"]], ids=["inspect", "plan"]
)
def test_tables(frmerge: Frmerge, experts: list[Path], options: list[str]) -> None:
    result = frmerge(*options, *experts)
    assert result.exit_code == 0 and is_clean(result)


def test_a_merge_and_what_follows(frmerge: Frmerge, experts: list[Path], tmp_path: Path) -> None:
    output = tmp_path / f"out{HOSTILE}"
    merged = frmerge("merge", *experts, "--output-dir", output, "--disable-tqdm", "--logging-steps", "1")
    assert merged.exit_code == 0 and is_clean(merged)
    assert "rms_norm_eps" in merged.stderr  # the note on the configurations, which differ
    card = frmerge("card", output)
    assert card.exit_code == 0 and is_clean(card)
    (experts[0] / "model.safetensors").touch()
    assert is_clean(frmerge("verify", output))
    other = tmp_path / "other"
    assert frmerge("merge", *experts, "--output-dir", other, "--method", "linear").exit_code == 0
    assert is_clean(frmerge("diff", output, other))


def test_errors(frmerge: Frmerge, experts: list[Path], tmp_path: Path) -> None:
    other = write_model(tmp_path / "other", 3)
    save_file({HOSTILE: np.zeros((2, 2), np.float32), "b": np.ones((4, 4), np.float32)}, other / "model.safetensors")
    result = frmerge("merge", *experts, other, "--output-dir", tmp_path / "out")
    assert result.exit_code == 1 and is_clean(result)


def test_errors_of_the_command_line_itself(frmerge: Frmerge) -> None:
    """A shell puts the names of files where `*` is."""
    result = frmerge("verify", "one", HOSTILE)
    assert result.exit_code == 2 and is_clean(result)


def test_log_warnings_and_unexpected_errors(
    frmerge: Frmerge, experts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_down(*_args: object, **_kwargs: object) -> None:
        logging.getLogger("hf_frmerge.merging").warning("in the log: %s", HOSTILE)
        warnings.warn(f"a warning: {HOSTILE}", stacklevel=1)
        raise ZeroDivisionError(HOSTILE)

    monkeypatch.setattr(ProgressCallback, "on_step_end", break_down)
    result = frmerge("merge", *experts, "--output-dir", tmp_path / "out")
    assert result.exit_code == 1 and is_clean(result)
    for start in ("in the log: ", "Warning: a warning: ", "Error: ZeroDivisionError: "):
        assert f"{start}⟨U+001B⟩]0;owned⟨U+0007⟩" in result.stderr


def test_errors_that_a_traceback_prints() -> None:
    assert str(CheckpointError(f"{HOSTILE}:\n    code")).isprintable() is False  # the line of code stays a line
    assert str(CheckpointError(HOSTILE)).isprintable()
    assert "⟨U+009B⟩2Jab⟨U+202E⟩cd" in str(CheckpointError(HOSTILE))
