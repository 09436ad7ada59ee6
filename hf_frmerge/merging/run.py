"""One merge from plan to finished folder: staging, engine, record, and names given last."""

from __future__ import annotations

import logging
import time
from contextlib import closing
from typing import TYPE_CHECKING, Any

from hf_frmerge.checkpoints.beside.donor import CONFIG_FILE, write_config
from hf_frmerge.checkpoints.beside.look_beside import copy_files
from hf_frmerge.checkpoints.disk import rename
from hf_frmerge.checkpoints.lock import sole_writer
from hf_frmerge.checkpoints.tensors.reader import INDEX_FILE, unchanged
from hf_frmerge.checkpoints.tensors.writer import CheckpointWriter, check_free_space, remove_staging
from hf_frmerge.errors import MergeError
from hf_frmerge.kernels import load_kernels
from hf_frmerge.merging.engine.engine import Engine
from hf_frmerge.merging.engine.journal import Journal, fingerprint, modification_marks
from hf_frmerge.merging.engine.shared_observer import SharedObserver
from hf_frmerge.merging.output_folder import check_output_dir, clear_output_dir
from hf_frmerge.merging.record.manifest import COEFFICIENTS_FILE, write_coefficients, write_manifest
from hf_frmerge.merging.record.summary import MergeOutcome, make_report
from hf_frmerge.merging.run_adapters import run_adapter_merge

if TYPE_CHECKING:
    from collections.abc import Callable

    from hf_frmerge.checkpoints.lock import FolderLock
    from hf_frmerge.checkpoints.tensors.layout import ShardLayout
    from hf_frmerge.kernels import Kernels
    from hf_frmerge.merging.engine.outcomes import StepObserver, StepOutcome
    from hf_frmerge.merging.engine.processes import Processes
    from hf_frmerge.merging.planning.plan import MergePlan

logger = logging.getLogger(__name__)


def run_merge(
    plan: MergePlan, observer: StepObserver, processes: Processes, on_complete: Callable[[], None] | None = None
) -> MergeOutcome:
    """
    Compute a plan into its output folder, alone in it.

    Until the last moment the folder has no `config.json` and its weights have temporary names, so that nothing takes
    a torn merge for a model. After an error or an interruption, the same call with `resume_from_checkpoint` goes on.

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
    if plan.layout is None:
        return run_adapter_merge(plan, observer, processes, lock)
    return _run_full_merge(plan, plan.layout, observer, processes, lock)


def _run_full_merge(
    plan: MergePlan, layout: ShardLayout, observer: StepObserver, processes: Processes, lock: FolderLock | None
) -> MergeOutcome:
    started = time.perf_counter()
    kernels = load_kernels(plan.args.device)
    writer = CheckpointWriter(layout, plan.args.output_dir)
    with closing(writer), closing(_prepare(plan, writer, kernels, processes)) as journal:
        if processes.size > 1:
            observer = SharedObserver(observer, plan, processes)
        share = _gram_sharing(processes) if plan.args.block == "model" and processes.size > 1 else None
        engine = Engine(plan, kernels, writer, journal, observer, share)
        inputs = [model.weights for model in plan.models]
        with unchanged(inputs):
            own, complete = engine.run(processes.share(plan.steps, plan.args.block))
        outcomes = own
        if isinstance(observer, SharedObserver):
            outcomes = observer.all_outcomes(own)
            complete = all(processes.gather([complete and observer.go_on]))
        if complete:
            writer.sync()
            for checkpoint in inputs:  # until here: files that are copied from the donor are read after this
                checkpoint.check_unchanged()
    seconds = time.perf_counter() - started
    written = sum(outcome.step.nbytes for outcome in outcomes)
    report = make_report(plan, outcomes, kernels.name, seconds, written)
    processes.wait()
    if complete and lock is not None:
        lock.check()
        _finish(plan, writer, outcomes, report, processes.size)
    processes.wait()
    return MergeOutcome(complete, report)


def _prepare(plan: MergePlan, writer: CheckpointWriter, kernels: Kernels, processes: Processes) -> Journal:
    """Check what is there, then lay out the files: the main process removes and creates, the others only open."""
    resume = plan.args.resume_from_checkpoint
    if processes.is_main:
        clear_output_dir(plan.args)
    processes.wait()
    header, marks = fingerprint(plan, kernels.name), modification_marks(plan)
    journal = Journal(writer.staging, processes.rank, header, marks, resume=resume)
    processes.wait()
    if processes.is_main:
        if not writer.staging.exists():
            check_free_space(writer.output_dir, writer.layout.file_bytes)
        writer.reopen()
    processes.wait()
    if not processes.is_main and writer.reopen():
        raise MergeError(
            f"Process {processes.rank} does not see the files that the main process made in {plan.args.output_dir!r}. "
            "Choose an output_dir on a file system that all processes share."
        )
    journal.start()
    return journal


def _gram_sharing(processes: Processes) -> Any:
    def share(grams: dict[str, Any]) -> dict[str, Any]:
        return {name: gram for part in processes.gather([grams]) for name, gram in part.items()}

    return share


def _finish(
    plan: MergePlan, writer: CheckpointWriter, outcomes: list[StepOutcome], report: dict[str, Any], n_processes: int
) -> None:
    """Give everything its name, the config last: without it no loader takes the folder for a model."""
    output, donor = writer.output_dir, plan.donor.source
    write_coefficients(output, outcomes)
    small = {name: output / name for name in [*copy_files(plan.carried, output), COEFFICIENTS_FILE]}
    writer.publish()
    if writer.layout.index_json() is not None:
        small[INDEX_FILE] = output / INDEX_FILE
    config = small[CONFIG_FILE] = write_config(donor, writer.staging, dtype=plan.args.dtype)
    write_manifest(output, plan, outcomes, report=report, n_processes=n_processes, small_files=small)
    rename(config, output / CONFIG_FILE)
    remove_staging(writer.staging)
