"""Folders as a merge and an evaluation leave them: real small merges, and made-up records of larger ones."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from evaluation_records import make_record
from merge_reference import write_family

sys.path.insert(0, str(Path(__file__).parent))  # for browser.py

from hf_frmerge.evaluation.record import EvaluationRecord, save_record
from hf_frmerge.merging.arguments.merging_arguments import MergingArguments
from hf_frmerge.merging.engine.outcomes import StepObserver
from hf_frmerge.merging.engine.processes import Processes
from hf_frmerge.merging.planning.build_plan import build_plan
from hf_frmerge.merging.run import run_merge


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[str]]:
    return write_family(tmp_path_factory.mktemp("family"), 4)


@pytest.fixture(scope="session")
def merge(tmp_path_factory: pytest.TempPathFactory, family: tuple[str, list[str]]) -> Callable[..., Path]:
    """Merge the first `n` of four experts, and save the record of an evaluation beside the result."""

    def run(n: int = 2, record: EvaluationRecord | None = None, **options: object) -> Path:
        base, experts = family
        weights = [0.5, 0.3, 0.2, 0.1][:n]
        output = tmp_path_factory.mktemp("merge") / "merged"
        args = MergingArguments(output_dir=str(output), **options)  # type: ignore[arg-type]
        run_merge(build_plan(experts[:n], args, weights, base), StepObserver(), Processes())
        if record is not None:
            save_record(output, record)
        return output

    return run


@pytest.fixture(scope="session")
def evaluated(merge: Callable[..., Path]) -> Path:
    """Folder of a merge of two experts with the record of an evaluation; not to be written to."""
    return merge(record=make_record())
