"""One merge from plan to finished folder: staging, engine, record, and names given last."""

from __future__ import annotations

import logging
import shutil
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_frmerge.checkpoints.donor import CONFIG_FILE, copy_donor_files, write_config
from hf_frmerge.checkpoints.reader import ADAPTER_FILE
from hf_frmerge.checkpoints.writer import CheckpointWriter, check_free_space
from hf_frmerge.errors import ArgumentError, MergeError, ResumeError
from hf_frmerge.kernels import load_kernels
from hf_frmerge.kernels.blas import one_blas_thread
from hf_frmerge.merging.adapters import MergedModule, merge_adapters
from hf_frmerge.merging.engine import Engine, StepObserver, StepOutcome
from hf_frmerge.merging.journal import Journal, fingerprint, modification_marks
from hf_frmerge.merging.manifest import COEFFICIENTS_FILE, MANIFEST_FILE, write_coefficients, write_manifest
from hf_frmerge.merging.shared import SharedObserver
from hf_frmerge.merging.solve import Solution
from hf_frmerge.merging.summary import summary

if TYPE_CHECKING:
    from hf_frmerge.checkpoints.layout import ShardLayout
    from hf_frmerge.kernels import Kernels
    from hf_frmerge.merging.plan import MergePlan
    from hf_frmerge.merging.processes import Processes

logger = logging.getLogger(__name__)

ADAPTER_CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class MergeOutcome:
    """
    A merge that ended.

    Attributes:
        complete: whether the output was finished; an observer may have stopped the merge before.
        report: totals: tensors, bytes, seconds, angles, norm ratios, convergence, kernels, notes.
    """

    complete: bool
    report: dict[str, Any]


class _StoppedError(Exception):
    """The observer asked a merge of adapters to stop."""


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
            return _run_adapter_merge(plan, observer, processes)
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
            writer.sync()
    seconds = time.perf_counter() - started
    report = _report(plan, outcomes, kernels.name, seconds)
    processes.wait()
    if complete and processes.is_main:
        _finish(plan, writer, outcomes, report, processes.size)
    processes.wait()
    return MergeOutcome(complete, report)


def _run_adapter_merge(plan: MergePlan, observer: StepObserver, processes: Processes) -> MergeOutcome:
    """Merge adapters into an adapter: seconds of work for one process, so there is nothing to resume or to share."""
    own = [_merge_adapters_here(plan, observer, processes.size)] if processes.is_main else []
    return processes.gather(own)[0]


def _merge_adapters_here(plan: MergePlan, observer: StepObserver, n_processes: int) -> MergeOutcome:
    started = time.perf_counter()
    output, args = Path(plan.args.output_dir), plan.args
    outcomes: list[StepOutcome] = []
    steps = {step.name: step for step in plan.steps}
    skipped = [step.name for step in plan.steps if not observer.begin(step)]
    if skipped:
        raise ArgumentError(f"{skipped[0]!r} cannot be skipped in an adapter. Use adapter_output='merged'.")

    def done(module: MergedModule) -> None:
        solution = Solution(np.array([module.coefficients]), module.geometry)
        outcomes.append(StepOutcome(steps[module.target], "merge", solution, {}, ""))
        if not observer.end(outcomes[-1]):
            raise _StoppedError  # from within the writer, which then leaves no file

    for stale in (MANIFEST_FILE, *(shard.name for shard in output.glob("adapter_model*.safetensors"))):
        (output / stale).unlink(missing_ok=True)
    try:
        merged = merge_adapters(
            [expert.adapter for expert in plan.experts if expert.adapter],
            plan.weights,
            output,
            method=args.method,
            options=plan.span_options,
            block=args.block,
            weights_for=lambda name: steps[name].weights,
            rank=args.adapter_rank,
            energy=args.adapter_energy,
            dtype=plan.steps[0].dtype,
            strict=args.strict,
            num_workers=args.num_workers,
            on_module=done,
        )
    except _StoppedError:
        return MergeOutcome(False, _report(plan, outcomes, "numpy", time.perf_counter() - started))
    plan.notes[:] = dict.fromkeys([*plan.notes, *merged.notes])
    write_coefficients(output, outcomes)
    report = _report(plan, outcomes, "numpy", time.perf_counter() - started)
    report |= {"truncation_error": merged.truncation_error}
    report |= {"max_rank": max(module.rank for module in merged.modules)}
    small = {name: output / name for name in (ADAPTER_FILE, ADAPTER_CONFIG, COEFFICIENTS_FILE)}
    write_manifest(output, plan, outcomes, report=report, n_processes=n_processes, small_files=small)
    return MergeOutcome(True, report)


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
    for stale in (CONFIG_FILE, MANIFEST_FILE):
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
    config = small[CONFIG_FILE] = write_config(donor, writer.staging, dtype=plan.args.dtype)
    write_manifest(output, plan, outcomes, report=report, n_processes=n_processes, small_files=small)
    config.replace(output / CONFIG_FILE)
    shutil.rmtree(writer.staging)


def _report(plan: MergePlan, outcomes: list[StepOutcome], kernels: str, seconds: float) -> dict[str, Any]:
    read = sum(model.nbytes for model in plan.models)
    return {
        "method": plan.args.method,
        "space": plan.space,
        "block": plan.args.block,
        "output_dir": plan.args.output_dir,
        **summary(outcomes),
        "input_bytes": read,
        "output_bytes": sum(outcome.step.nbytes for outcome in outcomes),
        "seconds": seconds,
        "bytes_per_second": read / seconds,
        "kernels": kernels,
        "notes": plan.notes,
    }
