"""How a merge ended, and totals over its tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from hf_frmerge.checkpoints.tensors.reader import some

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hf_frmerge.merging.engine.outcomes import StepOutcome
    from hf_frmerge.merging.planning.plan import MergePlan


# Angle, in radians, by which rounding alone turns a tensor of spread-out values: 2^-p / sqrt(3 * 1.5 / ln 2) for a
# significand of p bits (rounding error uniform in a unit in the last place, values log-uniform within a binade).
ROUNDING_ANGLE = {
    dtype: 2.0**-bits / math.sqrt(4.5 / math.log(2)) for dtype, bits in (("BF16", 8), ("F16", 11), ("F32", 24))
}


def is_below_rounding(gap: float, space: str, dtype: str | None) -> bool:
    """
    Tell whether two merges that are `gap` radians apart are one model once stored as `dtype`.

    In delta space the answer is never yes: how far an angle between deltas moves the weights is not known from it.
    """
    return space == "weights" and gap < ROUNDING_ANGLE.get(dtype or "", 0.0)


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


def make_report(
    plan: MergePlan, outcomes: Sequence[StepOutcome], kernels: str, seconds: float, notes: Sequence[str]
) -> dict[str, Any]:
    """Return what a finished merge tells: what was asked, totals over the tensors, bytes and speed."""
    read = sum(model.nbytes for model in plan.models)
    return {
        "method": plan.args.method,
        "space": plan.space,
        "block": plan.args.block,
        "output_dir": plan.args.output_dir,
        **summary(outcomes),
        "input_bytes": read,
        "output_bytes": sum(outcome.nbytes for outcome in outcomes),
        "seconds": seconds,
        "bytes_per_second": read / seconds,
        "kernels": kernels,
        "notes": [*plan.notes, *zero_notes(plan, outcomes), *notes],
        **_factor_totals(outcomes),
    }


def summary(outcomes: Sequence[StepOutcome]) -> dict[str, Any]:
    """Return totals over all merged tensors: angles in radians, norm ratios, iterations, residuals."""
    geometry = list({o.step.group: o.geometry for o in outcomes if o.geometry is not None}.values())
    counts = {action: sum(o.action == action for o in outcomes) for action in ("merge", "copy", "skip")}
    totals: dict[str, Any] = {"n_merged": counts["merge"], "n_copied": counts["copy"], "n_skipped": counts["skip"]}
    if not geometry:
        return totals
    angles = [g.max_angle for g in geometry]
    ratios = [g.norm_ratio for g in geometry]
    linear = [g.linear_norm_ratio for g in geometry]
    gaps = [g.gap_to_nre for g in geometry]
    return totals | {
        "max_angle": {"min": min(angles), "median": median(angles), "max": max(angles)},
        "norm_ratio": {"min": min(ratios), "median": median(ratios)},
        "linear_norm_ratio": {"min": min(linear), "median": median(linear)},
        "gap_to_nre": {"median": median(gaps), "max": max(gaps)},
        "n_iter": max(g.n_iter for g in geometry),
        "residual": max(g.residual for g in geometry),
        "n_not_converged": sum(len(g.unconverged) for g in geometry),
        "n_ambiguous": sum(g.n_ambiguous for g in geometry),
    }


def zero_notes(plan: MergePlan, outcomes: Sequence[StepOutcome]) -> list[str]:
    """Say which adapters have factors whose product is zero: no direction, but a weight."""
    notes = []
    for index, expert in enumerate(plan.experts):
        if plan.layout is not None or expert.adapter is None:
            continue
        zero = [
            expert.adapter.deltas[o.step.name].module
            for o in outcomes
            if o.step.name in expert.adapter.deltas and o.geometry is not None and o.geometry.norms[index] == 0
        ]
        if zero:
            notes.append(
                f"Adapter {expert.spec!r} has a zero delta in {len(zero)} of {len(outcomes)} modules ({some(zero)}): "
                "no direction, but its weight counts in the norm."
            )
    return notes


def _factor_totals(outcomes: Sequence[StepOutcome]) -> dict[str, Any]:
    """Largest rank of a merged adapter, and the norm of what recompression left out as a share of its norm."""
    details = [outcome.details for outcome in outcomes if outcome.details is not None]
    if not details:
        return {}
    total = math.hypot(*(found["norm"] for found in details))
    lost = math.hypot(*(found["norm"] * found["truncation_error"] for found in details))
    return {"truncation_error": lost / total if total else 0.0, "max_rank": max(found["rank"] for found in details)}
