"""`merger.evaluate` on two processes, of streams whose length divides by nothing, against one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluation_processes import evaluate
from tiny_models import save_classifier_family, save_llama_family

WORDS = [f"w{i}" for i in range(20)]
N_ROWS = 11  # with batches of 2 on two processes, the last round has 3 rows


def assert_alike(actual: Any, expected: Any, where: str) -> None:
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys(), where
        for name, value in expected.items():
            assert_alike(actual[name], value, f"{where}.{name}")
    elif isinstance(expected, list):
        assert len(actual) == len(expected), where
        for number, value in enumerate(expected):
            assert_alike(actual[number], value, f"{where}[{number}]")
    elif isinstance(expected, float):
        assert actual == pytest.approx(expected, rel=1e-6, abs=1e-6), where
    else:
        assert actual == expected, where


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    rows = [
        {"text": " ".join(generator.choice(WORDS, generator.integers(2, 12))), "label": int(generator.integers(3))}
        for _ in range(N_ROWS)
    ]
    for kind, save in (("models", save_llama_family), ("classifiers", save_classifier_family)):
        save(tmp_path / kind, WORDS, 0.2)
        (tmp_path / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    program = Path(__file__).parents[2] / "evaluation_processes.py"
    paths = os.pathsep.join([str(Path(__file__).parents[3]), str(Path(__file__).parents[2])])
    environment = os.environ | {"HF_FRMERGE_CACHE": str(tmp_path / "cache2"), "PYTHONPATH": paths}
    subprocess.run([*command, str(program), str(tmp_path)], check=True, timeout=240, env=environment)

    monkeypatch.setenv("HF_FRMERGE_CACHE", str(tmp_path / "cache1"))
    expected = evaluate(tmp_path, tmp_path / "one")
    for rank in range(2):
        actual = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert_alike(actual, json.loads(json.dumps(expected)), f"rank {rank}")
    predictions, labels = expected["classifiers"]["predictions"]
    assert len(predictions) == N_ROWS and labels == [row["label"] for row in rows]
    assert expected["models"]["record"]["scores"][0]["n_samples"] == N_ROWS
