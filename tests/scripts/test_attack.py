"""The script of attacks runs, counts what it tried, and says what failed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts" / "attack.py"


def test_it_prints_a_line_for_every_kind_of_attack() -> None:
    numbers = ["--doors", "14", "--files", "3", "--faults", "2", "--kills", "1", "--pairs", "1", "--options", "2"]
    done = subprocess.run([sys.executable, SCRIPT, *numbers], capture_output=True, text=True, check=False)
    lines = [line.split("  ") for line in done.stdout.splitlines()]
    assert done.returncode == 0, done.stdout + done.stderr
    kinds = ["faults", "kills", "pairs of merges", "damaged files", "hostile bytes", "random options"]
    assert [line[0] for line in lines[1:]] == kinds
    assert [int(next(part for part in line[1:] if part.strip())) for line in lines[1:]] == [2, 1, 1, 3, 14, 2]
