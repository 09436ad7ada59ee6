"""Merges that test_processes.py runs in its own process, and once more on two under a launcher."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

from hf_frmerge import FisherRaoMerger
from hf_frmerge.errors import MergeError
from hf_frmerge.merging.arguments.merging_arguments import MergingArguments
from hf_frmerge.merging.callbacks.callback import MergeCallback
from hf_frmerge.merging.engine import batches
from hf_frmerge.merging.engine.engine import StepObserver
from hf_frmerge.merging.engine.journal import Journal
from hf_frmerge.merging.engine.processes import Processes
from hf_frmerge.merging.planning import blocks
from hf_frmerge.merging.planning.build_plan import build_plan
from hf_frmerge.merging.run import run_merge

BLOCKS = ("tensor", "layer", "model")
SKIPPED = "model.layers.1.mlp.up_proj.weight"


class Skip(StepObserver):
    def begin(self, step: Any) -> bool:
        return step.name != SKIPPED


class Events(MergeCallback):
    """Keeps the names of the tensors it hears about."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.ended: list[str] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begun.append(state.current_tensor)

    def on_step_end(self, args: Any, state: Any, control: Any, result: Any, **kwargs: Any) -> None:
        self.ended.append(result.name)


def merge(
    root: Path,
    out: Path,
    observer: StepObserver | None = None,
    models: str = "",
    base: str | None = None,
    **options: Any,
) -> None:
    """Merge the family below `root`; `models` names another set of experts, `base` a base model."""
    experts = [str(root / f"{models or 'e'}{i}") for i in range(3)]
    with patch.object(blocks, "PIECE_ELEMENTS", 200), patch.object(batches, "BATCH_TENSORS", 3):
        plan = build_plan(experts, MergingArguments(output_dir=str(out), **options), [0.5, 0.3, 0.2], base)
        run_merge(plan, observer or StepObserver(), Processes())


def merge_all(root: Path, out: Path) -> None:
    """Merge in every way that shares work differently."""
    for block in BLOCKS:
        merge(root, out / block, block=block)
        merge(root, out / f"{block}-shards", block=block, max_shard_size="4KB")
        merge(root, out / f"{block}-skip", Skip(), block=block)
    for method in ("ties", "sce"):  # what they count, and what they add up, is of all processes
        merge(root, out / method, base=str(root / "first0"), method=method, block="model")


def merge_and_listen(out: Path) -> Events:
    """Merge models of the Hub with callbacks."""
    events = Events()
    args = MergingArguments(output_dir=str(out), report_to="none")
    FisherRaoMerger(["lab/e0", "lab/e1", "lab/e2"], args, [0.5, 0.3, 0.2], callbacks=[events]).merge()
    return events


def written_paths(root: Path) -> list[str]:
    """Return a list that from now on grows by every path below `root` that this process creates or changes."""
    paths: list[str] = []

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event in ("os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate")
        if event == "open" and isinstance(arguments[2], int):
            writes = bool(arguments[2] & (os.O_WRONLY | os.O_RDWR))
        if writes and str(arguments[0]).startswith(str(root)):
            paths.append(str(arguments[0]))

    sys.addaudithook(audit)
    return paths


def main(root: Path) -> None:
    """Run everything on two processes, and write down what this one saw."""
    processes = Processes()
    assert processes.size == 2, "a test of two processes that runs on one proves nothing"
    paths = written_paths(root / "two")
    merge_all(root, root / "two")
    for block in BLOCKS:
        merge(root, root / "resumed" / block, block=block, resume_from_checkpoint=True)
    events = merge_and_listen(root / "two" / "hub")
    errors = []
    for models in ("first", "last"):
        try:
            merge(root, root / models, models=models)
        except MergeError as error:
            errors.append(str(error))
    try:
        merge(root, root / f"apart{processes.rank}")  # as on two machines that share no disk
    except MergeError as error:
        errors.append(str(error))
    seen = {"begun": events.begun, "ended": events.ended, "errors": errors, "written": paths}
    (root / f"rank{processes.rank}.json").write_text(json.dumps(seen))
    # Last, as nobody survives it: the second process vanishes after its second tensor.
    if processes.rank == 1:
        die_after_writing(2)
    block = sys.argv[2]
    merge(root, root / "killed" / block, block=block)


def die_after_writing(tensors: int) -> None:
    """Kill this process when it has written some tensors."""
    record, left = Journal.record_written, iter(range(tensors - 1))

    def record_or_die(self: Journal, *args: Any) -> None:
        record(self, *args)
        if next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)

    Journal.record_written = record_or_die  # type: ignore[method-assign]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
