"""Run tests/evaluation/two_process_evaluation.py under torchrun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def run_on_two_processes(what: str, folder: Path) -> list[Any]:
    """Return what each of the two ranks got from the inputs in `folder`."""
    program = HERE / "evaluation" / "two_process_evaluation.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"PYTHONPATH": str(HERE.parent)}  # this checkout, whatever is installed
    subprocess.run([*command, str(program), what, str(folder)], check=True, timeout=240, env=environment)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]
