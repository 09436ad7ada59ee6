"""Agreement with mergekit, where an environment that has it is named."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "compare_mergekit.py"
MERGEKIT = os.environ.get("FRMERGE_MERGEKIT_PYTHON")


@pytest.mark.skipif(MERGEKIT is None, reason="FRMERGE_MERGEKIT_PYTHON names no python with mergekit")
def test_all_methods_agree_with_mergekit() -> None:
    command = [sys.executable, str(SCRIPT), "--mergekit-python", str(MERGEKIT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + 17
