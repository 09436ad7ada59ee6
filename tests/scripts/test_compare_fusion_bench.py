"""Agreement with FusionBench, where an environment that has it beside this package is named."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = os.environ.get("FRMERGE_FUSION_BENCH_PYTHON")


@pytest.mark.skipif(PYTHON is None, reason="FRMERGE_FUSION_BENCH_PYTHON names no python with fusion-bench")
def test_all_methods_agree_with_fusion_bench_or_differ_for_a_reason() -> None:
    command = [str(PYTHON), str(ROOT / "scripts" / "compare_fusion_bench.py")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + 12
