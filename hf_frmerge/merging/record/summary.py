"""How a merge ended, and totals over its tensors."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, dataclass, fields
from statistics import median
from typing import TYPE_CHECKING, Any

from hf_frmerge.checkpoints.tensors.reader import some
from hf_frmerge.merging.planning.account import ModelAccount, account
from hf_frmerge.methods.table import METHODS

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
class Extremes:
    """Of a number over all merged tensors: the median, and the ends that say how bad it gets."""

    median: float
    min: float | None = None
    max: float | None = None

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Extremes:
        """Read them from JSON values."""
        return cls(values["median"], values.get("min"), values.get("max"))

    def to_dict(self) -> dict[str, float]:
        """Return them as JSON values, in order."""
        values = {"min": self.min, "median": self.median, "max": self.max}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class GeometryTotals:
    """Totals over the `Geometry` of all merged tensors: angles and residual in radians, `n_` of blocks."""

    max_angle: Extremes
    norm_ratio: Extremes
    linear_norm_ratio: Extremes
    gap_to_nre: Extremes
    n_iter: int
    residual: float
    n_not_converged: int
    n_ambiguous: int

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> GeometryTotals:
        """Read them from JSON values; others are passed over."""
        known: dict[str, Any] = {field.name: values[field.name] for field in fields(cls)}
        extremes = {name: Extremes.from_dict(value) for name, value in known.items() if isinstance(value, dict)}
        return cls(**{**known, **extremes})

    def to_dict(self) -> dict[str, Any]:
        """Return them as JSON values."""
        return {name: value.to_dict() if isinstance(value, Extremes) else value for name, value in vars(self).items()}


@dataclass(frozen=True)
class FactorTotals:
    """Of a merged adapter: norm of what recompression left out as a share of its norm, and the largest rank."""

    truncation_error: float
    max_rank: int


@dataclass(frozen=True)
class MergeReport:
    """
    What a finished merge tells: what was asked, totals over the tensors, bytes and speed.

    Attributes:
        block: what one block covered.
        output_dir: where it is; `None` in a manifest, which is pushed.
        n_merged, n_copied, n_skipped: tensors; skipped ones were copied because a callback said so.
        geometry: `None` if nothing was measured of the experts.
        seconds: from the first byte read to the last written.
        bytes_per_second: of input.
        kernels: what computed, and with which instructions.
        notes: what the models disagree about and what was taken, and what else should be known.
        factors: of a merged adapter; `None` of a full model.
        accounts: what became of the tensors of every model: the experts, then the base. Empty in old records.
    """

    method: str
    space: str
    block: str
    output_dir: str | None
    n_merged: int
    n_copied: int
    n_skipped: int
    geometry: GeometryTotals | None
    input_bytes: int
    output_bytes: int
    seconds: float
    bytes_per_second: float
    kernels: str
    notes: tuple[str, ...]
    factors: FactorTotals | None
    accounts: tuple[ModelAccount, ...] = ()

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> MergeReport:
        """Read it from JSON values; those that this version does not know are passed over."""
        apart: dict[str, Any] = {
            "output_dir": values.get("output_dir"),
            "geometry": GeometryTotals.from_dict(values) if "max_angle" in values else None,
            "notes": tuple(values["notes"]),
            "factors": FactorTotals(values["truncation_error"], values["max_rank"]) if "max_rank" in values else None,
            "accounts": tuple(ModelAccount.from_dict(each) for each in values.get("accounts", ())),
        }
        return cls(**apart, **{f.name: values[f.name] for f in fields(cls) if f.name not in apart})

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON values in one level, but for the parts of totals."""
        values: dict[str, Any] = {}
        for name, value in vars(self).items():
            if name == "geometry":
                values |= self.geometry.to_dict() if self.geometry is not None else {}
            elif name == "factors":
                values |= vars(self.factors) if self.factors is not None else {}
            elif name == "accounts":
                values[name] = [asdict(each) for each in self.accounts]
            else:
                values[name] = list(value) if name == "notes" else value
        return values


def make_report(
    plan: MergePlan, outcomes: Sequence[StepOutcome], kernels: str, seconds: float, notes: Sequence[str]
) -> MergeReport:
    """Add up what a merge tells."""
    counts = Counter(outcome.action for outcome in outcomes)
    read = sum(model.nbytes for model in plan.models)
    return MergeReport(
        method=plan.args.method,
        space=plan.space,
        block=plan.args.block,
        output_dir=plan.args.output_dir,
        n_merged=counts["merge"],
        n_copied=counts["copy"],
        n_skipped=counts["skip"],
        geometry=geometry_totals(outcomes),
        input_bytes=read,
        output_bytes=sum(outcome.nbytes for outcome in outcomes),
        seconds=seconds,
        bytes_per_second=read / seconds,
        kernels=kernels,
        notes=(
            *plan.notes,
            *saturation_notes(outcomes),
            *compression_notes(outcomes),
            *zero_notes(plan, outcomes),
            *base_notes(plan, outcomes),
            *notes,
        ),
        factors=_factor_totals(outcomes),
        accounts=account(plan, {outcome.step.name for outcome in outcomes if outcome.action == "skip"}),
    )


def geometry_totals(outcomes: Sequence[StepOutcome]) -> GeometryTotals | None:
    """Return totals over all merged tensors, those that share a block once; `None` if none was measured."""
    geometry = list({o.step.group: o.geometry for o in outcomes if o.geometry is not None}.values())
    if not geometry:
        return None
    angles = [g.max_angle for g in geometry]
    ratios = [g.norm_ratio for g in geometry]
    linear = [g.linear_norm_ratio for g in geometry]
    gaps = [g.gap_to_nre for g in geometry]
    return GeometryTotals(
        max_angle=Extremes(median(angles), min=min(angles), max=max(angles)),
        norm_ratio=Extremes(median(ratios), min=min(ratios)),
        linear_norm_ratio=Extremes(median(linear), min=min(linear)),
        gap_to_nre=Extremes(median(gaps), max=max(gaps)),
        n_iter=max(g.n_iter for g in geometry),
        residual=max(g.residual for g in geometry),
        n_not_converged=sum(len(g.unconverged) for g in geometry),
        n_ambiguous=sum(g.n_ambiguous for g in geometry),
    )


def saturation_notes(outcomes: Sequence[StepOutcome]) -> list[str]:
    """Say how many merged values were beyond the dtype, of which tensors."""
    tensors = [outcome.step.name for outcome in outcomes if outcome.n_saturated]
    if not tensors:
        return []
    n_values = sum(outcome.n_saturated for outcome in outcomes)
    return [
        f"{n_values:,} merged values were beyond what the dtype holds and became its largest number "
        f"(on_overflow=saturate), in {len(tensors)} of {len(outcomes)} tensors ({some(tensors)})."
    ]


def compression_notes(outcomes: Sequence[StepOutcome]) -> list[str]:
    """Say what a merged adapter lacks of the merge, if it was compressed."""
    totals = _factor_totals(outcomes)
    if totals is None or not totals.truncation_error:
        return []
    return [
        f"The merged adapter was compressed to rank {totals.max_rank}: {totals.truncation_error:.2%} of the norm of "
        "what was merged is lost."
    ]


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


def base_notes(plan: MergePlan, outcomes: Sequence[StepOutcome]) -> list[str]:
    """Say where a method that shortens what the experts disagree about left nothing of what they learned."""
    method = METHODS[plan.args.method]
    if plan.space != "deltas" or method.is_directional or plan.args.scale == 0:
        return []
    measured = [(outcome.step.name, outcome.geometry) for outcome in outcomes if outcome.geometry is not None]
    kept = [name for name, geometry in measured if geometry.norm_ratio == 0 and any(geometry.norms)]
    if not kept:
        return []
    return [
        f"The merged model is the base model in {len(kept)} of {len(outcomes)} tensors ({some(kept)}): the experts' "
        f"deltas have nothing in common there, and method={method.name!r} leaves them out."
    ]


def _factor_totals(outcomes: Sequence[StepOutcome]) -> FactorTotals | None:
    modules = [outcome.details for outcome in outcomes if outcome.details is not None]
    if not modules:
        return None
    total = math.hypot(*(module.norm for module in modules))
    lost = math.hypot(*(module.norm * module.truncation_error for module in modules))
    return FactorTotals(lost / total if total else 0.0, max(module.rank for module in modules))
