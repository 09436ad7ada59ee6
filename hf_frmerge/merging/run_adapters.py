"""Merge adapters into an adapter: seconds of work for one process, so there is nothing to resume or to share."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from xxhash import xxh3_128_hexdigest

from hf_frmerge.checkpoints.adapters.config import CONFIG_NAME
from hf_frmerge.checkpoints.beside.look_beside import copy_files
from hf_frmerge.checkpoints.resolve import Source
from hf_frmerge.checkpoints.tensors.reader import ADAPTER_FILE, open_checkpoint
from hf_frmerge.errors import ArgumentError
from hf_frmerge.merging.adapters import MergedAdapter, MergedModule, merge_adapters
from hf_frmerge.merging.engine.outcomes import StepObserver, StepOutcome
from hf_frmerge.merging.engine.solve import Solution
from hf_frmerge.merging.output_folder import clear_output_dir
from hf_frmerge.merging.record.manifest import COEFFICIENTS_FILE, write_coefficients, write_manifest
from hf_frmerge.merging.record.summary import MergeOutcome, make_report

if TYPE_CHECKING:
    from collections.abc import Callable

    from hf_frmerge.checkpoints.lock import FolderLock
    from hf_frmerge.merging.engine.processes import Processes
    from hf_frmerge.merging.planning.plan import MergePlan


class _StoppedError(Exception):
    """The observer asked the merge to stop."""


def run_adapter_merge(
    plan: MergePlan, observer: StepObserver, processes: Processes, lock: FolderLock | None
) -> MergeOutcome:
    """
    Merge the adapters of a plan on the main process, which holds the lock, and write the adapter with its record.

    The adapter gets its configuration last, when the record is complete: without it no loader takes it for one.

    Raises:
        MergeError: Whatever stopped the merge; no adapter is left then.
    """
    own = [_merge(plan, observer, processes.size, lock)] if lock is not None else []
    return processes.gather(own)[0]


def _merge(plan: MergePlan, observer: StepObserver, n_processes: int, lock: FolderLock) -> MergeOutcome:
    started = time.perf_counter()
    output = Path(plan.args.output_dir)
    steps = {step.name: step for step in plan.steps}
    skipped = [step.name for step in plan.steps if not observer.begin(step)]
    if skipped:
        raise ArgumentError(f"{skipped[0]!r} cannot be skipped in an adapter. Use adapter_output='merged'.")
    outcomes: list[StepOutcome] = []

    def done(module: MergedModule) -> None:
        solution = Solution(np.array([module.coefficients]), module.geometry)
        outcomes.append(StepOutcome(steps[module.target], "merge", solution, {}, ""))
        if not observer.end(outcomes[-1]):
            raise _StoppedError  # from within the writer, which then leaves no file
        lock.check()  # what follows the last module is publishing

    def record(merged: MergedAdapter, config: Path) -> None:
        plan.notes[:] = dict.fromkeys([*plan.notes, *merged.notes])
        write_coefficients(output, outcomes)
        carried = copy_files(plan.carried, output)
        written = (output / ADAPTER_FILE).stat().st_size
        report.update(make_report(plan, outcomes, "numpy", time.perf_counter() - started, written))
        report["truncation_error"] = merged.truncation_error
        report["max_rank"] = max(module.rank for module in merged.modules)
        write_manifest(
            output,
            plan,
            outcomes,
            report=report,
            n_processes=n_processes,
            small_files={name: output / name for name in (ADAPTER_FILE, COEFFICIENTS_FILE, *carried)}
            | {CONFIG_NAME: config},
            details=_details(merged),
        )

    clear_output_dir(plan.args)
    report: dict[str, Any] = {}
    try:
        _merge_factors(plan, output, done, record)
    except _StoppedError:
        return MergeOutcome(False, make_report(plan, outcomes, "numpy", time.perf_counter() - started, 0))
    return MergeOutcome(True, report)


def _details(merged: MergedAdapter) -> dict[str, dict[str, Any]]:
    """What the record says of a module beside its geometry; the digest is that of its factors, down then up."""
    folder = str(merged.output_dir)
    with open_checkpoint(Source(folder, "adapter", folder)) as written:
        return {
            module.target: {
                "rank": module.rank,
                "truncation_error": module.truncation_error,
                "output_xxh3_128": xxh3_128_hexdigest(b"".join(written.read(key).data for key in module.keys)),
            }
            for module in merged.modules
        }


def _merge_factors(
    plan: MergePlan,
    output: Path,
    done: Callable[[MergedModule], None],
    record: Callable[[MergedAdapter, Path], None],
) -> None:
    weights = {step.name: step.weights for step in plan.steps}
    merge_adapters(
        [expert.adapter for expert in plan.experts if expert.adapter],
        plan.weights,
        output,
        base=plan.base.source if plan.base else None,
        method=plan.args.method,
        options=plan.span_options,
        block=plan.args.block,
        weights_for=weights.__getitem__,
        rank=plan.args.adapter_rank,
        energy=plan.args.adapter_energy,
        dtype=plan.steps[0].dtype,
        strict=plan.args.strict,
        num_workers=plan.args.num_workers,
        on_module=done,
        on_written=record,
    )
