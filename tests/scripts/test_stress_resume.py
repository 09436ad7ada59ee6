from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "stress_resume.py"


@pytest.mark.slow
def test_ten_kills_at_random_moments(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, str(SCRIPT), "--kills", "10", "--layers", "1", "--seed", "3", "--work-dir", str(tmp_path)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    actual = [
        int(line.split("|")[2]) for line in run.stdout.splitlines() if line.startswith("| ") and line[-3].isdigit()
    ]
    kills = sum(actual)
    assert kills >= 10 and sum(actual[:-1]) > 0  # a merge killed for the tenth time may be killed again before its end
    merges = int(run.stdout.split(f"{kills} kills in ")[1].split()[0])
    assert f"bit-identical: {merges} of {merges}." in run.stdout
    assert f"asks for: 0 of {sum(actual[:-1])}." in run.stdout
    assert "transformers loaded: 0 of " in run.stdout and "0 of 0 tried" not in run.stdout
