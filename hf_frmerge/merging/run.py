"""Run one merge from plan to finished folder: staging, engine, record, final names."""

from __future__ import annotations

import logging
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hf_frmerge.checkpoints.disk import rename
from hf_frmerge.checkpoints.lock import sole_writer
from hf_frmerge.checkpoints.tensors.reader import unchanged
from hf_frmerge.checkpoints.tensors.writer import remove_staging
from hf_frmerge.errors import MergeError
from hf_frmerge.kernels.load import load_kernels
from hf_frmerge.merging.arguments.checks import check_prompts
from hf_frmerge.merging.engine.engine import Engine
from hf_frmerge.merging.engine.journal import Journal, NoJournal, fingerprint, modification_marks
from hf_frmerge.merging.engine.outcomes import StepObserver
from hf_frmerge.merging.engine.output import Output
from hf_frmerge.merging.engine.shared_observer import SharedObserver
from hf_frmerge.merging.output_folder import check_output_dir, clear_output_dir
from hf_frmerge.merging.outputs.blas_threads import one_blas_thread
from hf_frmerge.merging.outputs.shard_output import ShardOutput
from hf_frmerge.merging.planning.coefficient_table import COEFFICIENTS_FILE, write_coefficients
from hf_frmerge.merging.planning.corrections import CORRECTIONS_FILE, keep_corrections
from hf_frmerge.merging.record.summary import make_report
from hf_frmerge.merging.record.write_manifest import write_manifest
from hf_frmerge.methods.table import METHODS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from hf_frmerge.checkpoints.lock import FolderLock
    from hf_frmerge.kernels.interface import Kernels
    from hf_frmerge.merging.engine.outcomes import StepOutcome
    from hf_frmerge.merging.engine.processes import Processes
    from hf_frmerge.merging.engine.rules import Rule
    from hf_frmerge.merging.outputs.memory_output import MemoryOutput
    from hf_frmerge.merging.planning.corrections import CalibrationRecord
    from hf_frmerge.merging.planning.plan import MergePlan
    from hf_frmerge.merging.record.manifest import Manifest
    from hf_frmerge.merging.record.summary import MergeReport

    # Fits a merge, given the folder of unfinished files and the processes that share the work. The main process writes
    # coefficients or corrections there, unless it finds none that help, and returns how they were found.
    Calibrate = Callable[[Path, Processes], CalibrationRecord | None]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MergeOutcome:
    """
    A merge that ended.

    Attributes:
        complete: whether its output is: an observer may have stopped it before.
        report: totals.
        manifest: the record of a complete merge, in the main process.
    """

    complete: bool
    report: MergeReport
    manifest: Manifest | None


def run_merge(
    plan: MergePlan,
    observer: StepObserver,
    processes: Processes,
    on_complete: Callable[[Manifest], None] | None = None,
    calibrate: Calibrate | None = None,
) -> MergeOutcome:
    """
    Run a plan and write its output folder, holding the lock of the folder.

    Until the last moment the folder has no `config.json` (or `adapter_config.json`) and its weights have temporary
    names, so that no loader takes an unfinished merge for a model. After an error or an interruption, the same call
    with `resume_from_checkpoint` continues.

    Args:
        plan: Plan of the merge.
        observer: Notified of every tensor.
        processes: Processes that share the merge.
        on_complete: Called by the main process with the record of a complete merge, while it still holds the lock.
        calibrate: Called by all processes before anything is merged.

    Raises:
        MergeError: Whatever stopped the merge.
    """
    _check_prompts(plan, calibrate)
    with processes.sharing_errors():
        # Until all processes have planned: the files created below would look to the others like another merge.
        processes.wait()
        if not processes.is_main:
            return _run(plan, observer, processes, None, calibrate)
        with sole_writer(plan.args.output_dir) as lock:
            # Checked again, under the lock: another merge may have begun and ended since this one was planned.
            check_output_dir(plan.args, plan.input_paths)
            outcome = _run(plan, observer, processes, lock, calibrate)
            if outcome.manifest is not None and on_complete is not None:
                on_complete(outcome.manifest)
            return outcome


def merge_into_memory(plan: MergePlan, output: MemoryOutput, rule: Rule | None = None) -> None:
    """
    Run a plan of a full model without writing anything: its tensors, of the same bits, are then in `output`.

    Args:
        plan: Plan of the merge.
        output: Memory for the tensors; what is in it is replaced.
        rule: Measures and decides; by default the rule of the plan's method.

    Raises:
        MergeError: Whatever stopped the merge.
    """
    _check_prompts(plan)
    kernels = load_kernels(plan.args.device)
    inputs = plan.opened
    with unchanged(inputs), one_blas_thread(plan):
        Engine(plan, kernels, output, NoJournal(), StepObserver(), rule=rule).run(plan.steps)
    for checkpoint in inputs:
        checkpoint.check_unchanged()


def _check_prompts(plan: MergePlan, calibrate: Calibrate | None = None) -> None:
    """Check that what a merge asks prompts for is found by a calibration, or was found by one before."""
    has_prompts = calibrate is not None or plan.corrections is not None or plan.fitted is not None
    check_prompts(METHODS[plan.args.method], plan.args.fisher, has_prompts=has_prompts)


def _run(
    plan: MergePlan,
    observer: StepObserver,
    processes: Processes,
    lock: FolderLock | None,
    calibrate: Calibrate | None,
) -> MergeOutcome:
    kernels = load_kernels(plan.args.device)
    output = _output(plan)
    with closing(output), closing(_prepare(plan, output, kernels, processes, calibrate)) as journal:
        started = time.perf_counter()  # a calibration is not what the engine's speed is about
        if processes.size > 1:
            observer = SharedObserver(observer, plan, processes)
        # With block="model" the tensors of all processes share one decision.
        together = plan.layout is not None and plan.args.block == "model" and processes.size > 1
        engine = Engine(plan, kernels, output, journal, observer, processes.gather if together else None)
        inputs = plan.opened
        inputs += [plan.corrections.checkpoint] if plan.corrections is not None else []
        with unchanged(inputs):
            outcomes, complete = engine.run(processes.share(plan))
        if isinstance(observer, SharedObserver):
            outcomes = observer.all_outcomes(outcomes)
            complete = all(processes.gather([complete and observer.go_on]))
        if complete:
            output.sync()
            # The last check before the result gets its name.
            for checkpoint in inputs:
                checkpoint.check_unchanged()
    report = make_report(plan, outcomes, kernels.name, time.perf_counter() - started, output.notes)
    processes.wait()  # until all have synced their part of the shards, which the main process now renames
    manifest = None
    if complete and lock is not None:
        lock.check()
        manifest = _finish(plan, output, outcomes, report, processes.size)
    processes.wait()  # no process returns before the output has its final names
    return MergeOutcome(complete, report, manifest)


def _output(plan: MergePlan) -> Output:
    if plan.layout is not None:
        return ShardOutput(plan)
    from hf_frmerge.merging.outputs.factor_output import FactorOutput  # brings modules that full models do not need

    return FactorOutput(plan)


def _prepare(
    plan: MergePlan,
    output: Output,
    kernels: Kernels,
    processes: Processes,
    calibrate: Calibrate | None,
) -> Journal:
    """Clear the folder, read the journal and lay out the files: the main process creates, the others only open."""
    resume = plan.args.resume_from_checkpoint
    if processes.is_main:
        clear_output_dir(plan.args)
    processes.wait()  # the folder is cleared before any process looks for journals in it
    if calibrate is not None:
        record = calibrate(output.staging, processes)
        (plan.calibration,) = processes.gather([record] if processes.is_main else [])
        plan.take_fit(output.staging)
    header, marks = fingerprint(plan, kernels.name), modification_marks(plan)
    journal = Journal(output.staging, processes.rank, header, marks, resume=resume)
    processes.wait()  # all have read all journals before `start` rewrites any
    if processes.is_main:
        output.begin()
    processes.wait()  # the main process has created the files that the others open
    if not processes.is_main and output.begin():
        raise MergeError(
            f"Process {processes.rank} does not see the files that the main process made in {plan.args.output_dir!r}. "
            "Choose an output_dir on a file system that all processes share."
        )
    journal.start()
    return journal


def _finish(
    plan: MergePlan, output: Output, outcomes: Sequence[StepOutcome], report: MergeReport, n_processes: int
) -> Manifest:
    """Rename staged files and write the record; the config comes last, as no loader takes a folder without it."""
    folder = Path(plan.args.output_dir)
    small = output.publish()
    table = {outcome.step.name: outcome.solution.coefficients for outcome in outcomes if outcome.solution is not None}
    if table:  # not all methods give a sum of the experts, and copied tensors are none
        write_coefficients(folder, table, plan.space)
        small[COEFFICIENTS_FILE] = folder / COEFFICIENTS_FILE
    if plan.corrections is not None:
        keep_corrections(plan.corrections, folder / CORRECTIONS_FILE)
        small[CORRECTIONS_FILE] = folder / CORRECTIONS_FILE
    config = output.write_config()
    small[config.name] = config
    manifest = write_manifest(folder, plan, outcomes, report=report, n_processes=n_processes, small_files=small)
    rename(config, folder / config.name)
    remove_staging(output.staging)
    return manifest
