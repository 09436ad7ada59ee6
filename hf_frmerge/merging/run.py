"""One merge from plan to finished folder: staging, engine, record, and names given last."""

from __future__ import annotations

import logging
import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from hf_frmerge.checkpoints.disk import rename
from hf_frmerge.checkpoints.lock import sole_writer
from hf_frmerge.checkpoints.tensors.reader import unchanged
from hf_frmerge.checkpoints.tensors.writer import remove_staging
from hf_frmerge.errors import MergeError
from hf_frmerge.kernels.load import load_kernels
from hf_frmerge.merging.engine.engine import Engine
from hf_frmerge.merging.engine.journal import Journal, fingerprint, modification_marks
from hf_frmerge.merging.engine.output import Output
from hf_frmerge.merging.engine.shared_observer import SharedObserver
from hf_frmerge.merging.output_folder import check_output_dir, clear_output_dir
from hf_frmerge.merging.outputs.factor_output import FactorOutput
from hf_frmerge.merging.outputs.shard_output import ShardOutput
from hf_frmerge.merging.planning.coefficient_table import COEFFICIENTS_FILE
from hf_frmerge.merging.record.summary import MergeOutcome, make_report
from hf_frmerge.merging.record.write_manifest import write_coefficients, write_manifest

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from hf_frmerge.checkpoints.lock import FolderLock
    from hf_frmerge.kernels.interface import Kernels
    from hf_frmerge.merging.engine.outcomes import StepObserver, StepOutcome
    from hf_frmerge.merging.engine.processes import Processes
    from hf_frmerge.merging.planning.plan import MergePlan
    from hf_frmerge.merging.record.summary import MergeReport

logger = logging.getLogger(__name__)


def run_merge(
    plan: MergePlan, observer: StepObserver, processes: Processes, on_complete: Callable[[], None] | None = None
) -> MergeOutcome:
    """
    Compute a plan into its output folder, alone in it.

    Until the last moment the folder has no `config.json` (no `adapter_config.json` for an adapter) and its weights
    have temporary names, so that nothing takes a torn merge for a model. After an error or an interruption, the same
    call with `resume_from_checkpoint` goes on.

    Args:
        plan: What to do.
        observer: Told about every tensor.
        processes: Who takes part.
        on_complete: Called by the main process on a complete merge, before another may write to the folder.

    Raises:
        MergeError: Whatever stopped the merge.
    """
    with processes.sharing_errors():
        processes.wait()  # until all have planned: what is created here must not look to them like another merge
        if not processes.is_main:
            return _run(plan, observer, processes, None)
        with sole_writer(plan.args.output_dir) as lock:
            # Once more: another merge may have begun and ended since this one was planned.
            check_output_dir(plan.args, [model.source.path for model in plan.models])
            outcome = _run(plan, observer, processes, lock)
            if outcome.complete and on_complete is not None:
                on_complete()
            return outcome


def _run(plan: MergePlan, observer: StepObserver, processes: Processes, lock: FolderLock | None) -> MergeOutcome:
    started = time.perf_counter()
    kernels = load_kernels(plan.args.device)
    output = ShardOutput(plan) if plan.layout is not None else FactorOutput(plan)
    with closing(output), closing(_prepare(plan, output, kernels, processes)) as journal:
        if processes.size > 1:
            observer = SharedObserver(observer, plan, processes)
        together = plan.layout is not None and plan.args.block == "model" and processes.size > 1
        engine = Engine(plan, kernels, output, journal, observer, processes.gather if together else None)
        inputs = [model.weights for model in plan.models]
        with unchanged(inputs):
            own, complete = engine.run(processes.share(plan))
        outcomes = own
        if isinstance(observer, SharedObserver):
            outcomes = observer.all_outcomes(own)
            complete = all(processes.gather([complete and observer.go_on]))
        if complete:
            output.sync()
            for checkpoint in inputs:  # until here: files that are copied from the donor are read after this
                checkpoint.check_unchanged()
    report = make_report(plan, outcomes, kernels.name, time.perf_counter() - started, output.notes)
    processes.wait()
    if complete and lock is not None:
        lock.check()
        _finish(plan, output, outcomes, report, processes.size)
    processes.wait()
    return MergeOutcome(complete, report)


def _prepare(plan: MergePlan, output: Output, kernels: Kernels, processes: Processes) -> Journal:
    """Check what is there, then lay out the files: the main process removes and creates, the others only open."""
    resume = plan.args.resume_from_checkpoint
    if processes.is_main:
        clear_output_dir(plan.args)
    processes.wait()
    header, marks = fingerprint(plan, kernels.name), modification_marks(plan)
    journal = Journal(output.staging, processes.rank, header, marks, resume=resume)
    processes.wait()
    if processes.is_main:
        output.begin()
    processes.wait()
    if not processes.is_main and output.begin():
        raise MergeError(
            f"Process {processes.rank} does not see the files that the main process made in {plan.args.output_dir!r}. "
            "Choose an output_dir on a file system that all processes share."
        )
    journal.start()
    return journal


def _finish(
    plan: MergePlan, output: Output, outcomes: Sequence[StepOutcome], report: MergeReport, n_processes: int
) -> None:
    """Give everything its name, the config last: without it no loader takes the folder for a model."""
    folder = Path(plan.args.output_dir)
    small = output.publish()
    if write_coefficients(folder, outcomes, plan.space):
        small[COEFFICIENTS_FILE] = folder / COEFFICIENTS_FILE
    config = output.write_config()
    small[config.name] = config
    write_manifest(folder, plan, outcomes, report=report, n_processes=n_processes, small_files=small)
    rename(config, folder / config.name)
    remove_staging(output.staging)
