"""How a merge ended, and totals over its tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

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
    plan: MergePlan, outcomes: Sequence[StepOutcome], kernels: str, seconds: float, output_bytes: int
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
        "output_bytes": output_bytes,
        "seconds": seconds,
        "bytes_per_second": read / seconds,
        "kernels": kernels,
        "notes": plan.notes,
    }


def summary(outcomes: Sequence[StepOutcome]) -> dict[str, Any]:
    """Return totals over all merged tensors: angles in radians, norm ratios, iterations, residuals."""
    merged = {o.step.group: o.solution.geometry for o in outcomes if o.solution is not None}
    geometry = list(merged.values())
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
