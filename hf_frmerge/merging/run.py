"""One merge from plan to finished folder: staging, engine, record, and names given last."""

from __future__ import annotations

import logging
import shutil
import time
from contextlib import closing
from typing import TYPE_CHECKING, Any

from hf_frmerge.checkpoints.donor import CONFIG_FILE, copy_donor_files, write_config
from hf_frmerge.checkpoints.reader import ADAPTER_FILE, INDEX_FILE
from hf_frmerge.checkpoints.remote_output import check_vacant
from hf_frmerge.checkpoints.writer import CheckpointWriter, check_free_space
from hf_frmerge.errors import ArgumentError, MergeError, ResumeError
from hf_frmerge.kernels import load_kernels
from hf_frmerge.kernels.blas import one_blas_thread
from hf_frmerge.merging.engine import Engine
from hf_frmerge.merging.journal import Journal, fingerprint, modification_marks
from hf_frmerge.merging.manifest import (
    COEFFICIENTS_FILE,
    MANIFEST_FILE,
    STALE_FILES,
    write_coefficients,
    write_manifest,
)
from hf_frmerge.merging.run_adapters import ADAPTER_CONFIG, run_adapter_merge
from hf_frmerge.merging.shared import SharedObserver
from hf_frmerge.merging.summary import MergeOutcome, make_report

if TYPE_CHECKING:
    from hf_frmerge.checkpoints.layout import ShardLayout
    from hf_frmerge.kernels import Kernels
    from hf_frmerge.merging.outcomes import StepObserver, StepOutcome
    from hf_frmerge.merging.plan import MergePlan
    from hf_frmerge.merging.processes import Processes

logger = logging.getLogger(__name__)


def run_merge(plan: MergePlan, observer: StepObserver, processes: Processes) -> MergeOutcome:
    """
    Compute a plan into its output folder.

    Until the last moment the folder has no `config.json` and its weights have temporary names, so that nothing takes
    a torn merge for a model. After an error or an interruption, the same call with `resume_from_checkpoint` goes on.

    Raises:
        MergeError: Whatever stopped the merge.
    """
    with processes.sharing_errors():
        if plan.layout is None:
            return run_adapter_merge(plan, observer, processes)
        return _run_full_merge(plan, plan.layout, observer, processes)


def _run_full_merge(
    plan: MergePlan, layout: ShardLayout, observer: StepObserver, processes: Processes
) -> MergeOutcome:
    started = time.perf_counter()
    kernels = load_kernels(plan.args.device)
    writer = CheckpointWriter(layout, plan.args.output_dir)
    with closing(writer), closing(_prepare(plan, writer, kernels, processes)) as journal:
        if processes.size > 1:
            observer = SharedObserver(observer, plan, processes)
        share = _gram_sharing(processes) if plan.args.block == "model" and processes.size > 1 else None
        engine = Engine(plan, kernels, writer, journal, observer, share)
        with one_blas_thread():  # rows of low-rank deltas are formed on our own threads
            own, complete = engine.run(processes.share(plan.steps, plan.args.block))
        outcomes = own
        if isinstance(observer, SharedObserver):
            outcomes = observer.all_outcomes(own)
            complete = all(processes.gather([complete and observer.go_on]))
        if complete:
            for model in plan.models:
                model.weights.check_sizes()
            writer.sync()
    seconds = time.perf_counter() - started
    written = sum(outcome.step.nbytes for outcome in outcomes)
    report = make_report(plan, outcomes, kernels.name, seconds, written)
    processes.wait()
    if complete and processes.is_main:
        _finish(plan, writer, outcomes, report, processes.size)
    processes.wait()
    return MergeOutcome(complete, report)


def _prepare(plan: MergePlan, writer: CheckpointWriter, kernels: Kernels, processes: Processes) -> Journal:
    """Check what is there, then lay out the files: the main process removes and creates, the others only open."""
    resume = plan.args.resume_from_checkpoint
    processes.wait()  # until all have planned: what is created here must not look to them like another merge
    if processes.is_main:
        _clear(plan, writer)
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


def _clear(plan: MergePlan, writer: CheckpointWriter) -> None:
    """Refuse what cannot be resumed, and remove what would make an unfinished merge look finished."""
    args, output, staging = plan.args, writer.output_dir, writer.staging
    if output.exists() and not output.is_dir():
        raise ArgumentError(f"The output folder {args.output_dir!r} is a file. Choose another output_dir.")
    if not args.resume_from_checkpoint:
        if not args.overwrite:
            check_vacant(output)
        shutil.rmtree(staging, ignore_errors=True)
    elif not args.overwrite:
        if (output / MANIFEST_FILE).exists() and (output / CONFIG_FILE).exists():
            shutil.rmtree(staging, ignore_errors=True)  # left by a process that died while it cleaned up
            raise ResumeError(f"The merge in {args.output_dir!r} is complete; there is nothing to resume.")
        if not staging.exists() and output.exists() and any(output.iterdir()):
            raise ResumeError(
                f"{args.output_dir!r} holds files, but no interrupted merge. Choose another output_dir, or pass "
                "--overwrite (overwrite=True) to replace the model in it."
            )
    if args.resume_from_checkpoint and not staging.exists():
        logger.info("Nothing to resume in %s: starting a new merge.", args.output_dir)
    for stale in (CONFIG_FILE, *STALE_FILES):
        (output / stale).unlink(missing_ok=True)


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
    small = {name: output / name for name in [*copy_donor_files(donor, output), COEFFICIENTS_FILE]}
    writer.publish()
    if writer.layout.index_json() is not None:
        small[INDEX_FILE] = output / INDEX_FILE
    config = small[CONFIG_FILE] = write_config(donor, writer.staging, dtype=plan.args.dtype)
    write_manifest(output, plan, outcomes, report=report, n_processes=n_processes, small_files=small)
    for stale in (ADAPTER_CONFIG, ADAPTER_FILE):  # transformers would load the new model with an old adapter on it
        (output / stale).unlink(missing_ok=True)
    config.replace(output / CONFIG_FILE)
    shutil.rmtree(writer.staging)
