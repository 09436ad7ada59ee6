"""Ctrl-C on the command line, in the midst of a merge that lasts seconds."""

from __future__ import annotations

import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from merge_reference import write_model


def start(experts: list[str], out: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", "from hf_frmerge.cli.main import main; main()", "merge", *experts]
    return subprocess.Popen(
        [*command, "--output-dir", str(out), "--block", "row", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_ctrl_c_stops_within_a_second_and_says_how_to_go_on(tmp_path: Path) -> None:
    # A sphere for every eight numbers: much to compute, little to write.
    tensors = {f"layers.{i}.weight": torch.randn(100_000, 8) for i in range(12)}
    experts = [
        write_model(tmp_path / f"e{k}", {n: t + 0.5 * torch.randn_like(t) for n, t in tensors.items()}) for k in "ab"
    ]
    journal = tmp_path / "out" / ".frmerge" / "journal-0.jsonl"
    seconds, options = [], []
    for lines in (1, 4, 12):
        process = start(experts, tmp_path / "out", *options)
        while not journal.exists() or journal.read_bytes().count(b"\n") < lines:
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        interrupted = time.perf_counter()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        seconds.append(time.perf_counter() - interrupted)
        assert process.returncode == 130, errors
        assert "Run the same command with --resume to go on." in errors and "Traceback" not in errors
        assert not (tmp_path / "out" / "config.json").exists()
        assert not list((tmp_path / "out").glob("*.safetensors"))
        options = ["--resume"]
    print(seconds)
    assert statistics.median(seconds) < 1, seconds

    for folder, extra in (("out", options), ("straight", [])):
        assert start(experts, tmp_path / folder, *extra).wait() == 0
    resumed, straight = (tmp_path / name / "model.safetensors" for name in ("out", "straight"))
    assert resumed.read_bytes() == straight.read_bytes()
