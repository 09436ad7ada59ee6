"""Verdicts on the geometry of a merge, as sentences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_frmerge.merging.record.summary import ROUNDING_ANGLE, is_below_rounding
from hf_frmerge.wording.methods import DTYPES, POINTS, method_of
from hf_frmerge.wording.numbers import angle, counted, number, percent
from hf_frmerge.wording.verdicts import Verdict

if TYPE_CHECKING:
    from hf_frmerge.merging.record.manifest import Manifest


@dataclass(frozen=True)
class Geometry:
    """
    Totals over the merged tensors, from `merging.record.summary.GeometryTotals`; `None` where unknown.

    Angles are in radians. For each tensor, `angle` is the largest angle between two experts in any block, and `gap`
    the largest between the merged point and the norm-rescaled average. `linear_norm_ratio` is the norm of the plain
    weighted average divided by the experts' mean norm, `norm_ratio` the same for the merge. All of it is measured
    before what is done to the mean `afterwards`, which completes "before ...".
    """

    method: str
    space: str
    dtype: str | None = None
    n_experts: int = 2
    angle_median: float | None = None
    angle_max: float | None = None
    linear_norm_ratio_median: float | None = None
    linear_norm_ratio_min: float | None = None
    norm_ratio_median: float | None = None
    norm_ratio_min: float | None = None
    gap_max: float | None = None
    residual: float | None = None
    n_iter: int | None = None
    n_not_converged: int = 0
    n_ambiguous: int = 0
    afterwards: str | None = None

    @classmethod
    def of_manifest(cls, manifest: Manifest) -> Geometry:
        """Read the totals from the record of a merge; `dtype` is that of its least precise merged tensors."""
        dtypes = {tensor.dtype for tensor in manifest.tensors.values() if tensor.action == "merge"}
        dtype = next((dtype for dtype in DTYPES if dtype in dtypes), None)
        totals, n_experts = manifest.report.geometry, len(manifest.experts)
        if totals is None:
            return cls(manifest.method, manifest.space, dtype, n_experts)
        return cls(
            manifest.method,
            manifest.space,
            dtype,
            n_experts,
            angle_median=totals.max_angle.median,
            angle_max=totals.max_angle.max,
            linear_norm_ratio_median=totals.linear_norm_ratio.median,
            linear_norm_ratio_min=totals.linear_norm_ratio.min,
            norm_ratio_median=totals.norm_ratio.median,
            norm_ratio_min=totals.norm_ratio.min,
            gap_max=totals.gap_to_nre.max,
            residual=totals.residual,
            n_iter=totals.n_iter,
            n_not_converged=totals.n_not_converged,
            n_ambiguous=totals.n_ambiguous,
            afterwards=_afterwards(manifest),
        )


NOTHING_MERGED = "Nothing was merged: all tensors were copied."
SAME_MODEL = "so expect the same model from both"
"""What follows if two methods differ by less than rounding does."""

MAY_DIFFER = "only an evaluation of both can tell which is better"
"""What follows if they differ by more."""


def unmeasured(method: str) -> str:
    """Explain why there are no angles and lengths of merged tensors."""
    return f"Angles and lengths were not measured: a merge by {method_of(method).title} does not need them."


def geometry_verdicts(total: Geometry) -> list[Verdict]:
    """
    Return verdicts on angles, lengths, whether the method matters, and whether the iteration converged.

    If tensors were merged without measuring, this is the only verdict; if none was merged, there is none. There is
    nothing to say of a single expert: it has no angle to another.
    """
    if total.n_experts == 1:
        return []
    if total.angle_max is None:
        return [Verdict("fact", "Not measured", unmeasured(total.method))] if total.dtype is not None else []
    verdicts = [
        Verdict("fact", "Angles", _angles(total)),
        Verdict("fact", "Lengths", _lengths(total)),
    ]
    # Only spherical means have a gap to the norm-rescaled average that tells whether the method matters.
    if method_of(total.method).is_spherical and total.gap_max is not None and total.dtype in DTYPES:
        is_one = is_below_rounding(total.gap_max, total.space, total.dtype)
        title = "The method makes no difference here" if is_one else "The method makes a difference"
        if total.space == "deltas":
            title = "How far the methods are apart"
        it_is = "It is" if total.afterwards is None else "Before that, it was"
        verdicts.append(Verdict("fact", title, gap_sentence(total.gap_max, total.space, total.dtype, it_is)))
    return verdicts + _convergence(total)


def gap_sentence(gap: float, space: str, dtype: str, it_is: str = "It is") -> str:
    """
    Explain whether the gap between a spherical mean and the norm-rescaled average can matter.

    Args:
        gap: Largest angle between the two in any block, in radians.
        space: Space the angle was measured in, `weights` or `deltas`.
        dtype: Dtype of the output, as in safetensors.
        it_is: Begin of the sentence.
    """
    text = (
        f"{it_is} at most {angle(gap)} from the norm-rescaled average (the plain average stretched back to the "
        "experts' length) in any block"
    )
    if is_below_rounding(gap, space, dtype):
        rounding = f"less than what rounding to {DTYPES[dtype]} turns a tensor by, {angle(ROUNDING_ANGLE[dtype])}"
        return f"{text}. That is {rounding}, {SAME_MODEL}."
    if space == "deltas":
        # `inspection_verdict` says which it is: the weights' norms, which it needs, are not measured in a merge.
        return (
            f"{text}. It turns the weights by as much less as the deltas are shorter than they are: frmerge inspect "
            f"says whether that is more than rounding. If it is not, the two are one model; if it is, {MAY_DIFFER}."
        )
    return f"{text}. {MAY_DIFFER.capitalize()}."


def _afterwards(manifest: Manifest) -> str | None:
    """Name what was done to the mean after it was measured."""
    step, fit = manifest.arguments.get("post_step"), manifest.calibration
    steps = [f"{step} corrected it"] if step is not None else []
    if fit is not None and fit.has_corrections:
        steps.append("it was fitted to its experts" if fit.is_fitted else "what the prompts say was added")
    return " and ".join(steps) or None


def _angles(total: Geometry) -> str:
    """Describe the angles between experts."""
    return (
        f"Two experts' {POINTS[total.space]} are up to {angle(total.angle_median)} apart in the median tensor, and "
        f"{angle(total.angle_max)} where they differ most. At 0° they agree; at 90° they have nothing in common."
    )


def _lengths(total: Geometry) -> str:
    """Describe how much of the experts' norm the merge and a plain average keep."""
    keeps = "This merge keeps" if total.afterwards is None else f"Before {total.afterwards}, this merge kept"
    return (
        f"{keeps} {percent(total.norm_ratio_median, 2)} of the experts' length in the median tensor and "
        f"{percent(total.norm_ratio_min, 2)} in the worst. A plain average keeps "
        f"{percent(total.linear_norm_ratio_median, 2)} and {percent(total.linear_norm_ratio_min, 2)}."
    )


def _convergence(total: Geometry) -> list[Verdict]:
    """Return verdicts on convergence and on blocks in which the mean is ambiguous."""
    verdicts = []
    if total.n_not_converged:
        text = (
            f"In {counted(total.n_not_converged, 'block')} the mean did not converge; the largest remaining "
            f"{_remaining(total)}. Merge again with more steps (--max-iter)."
        )
        verdicts.append(Verdict("bad", "The iteration did not converge everywhere", text))
    elif method_of(total.method).is_iterative:
        when = f"after at most {counted(total.n_iter, 'step')}" if total.n_iter else "at the first guess"
        text = f"Every block converged {when}; the largest remaining {_remaining(total)}."
        verdicts.append(Verdict("good", "The mean converged", text))
    if total.n_ambiguous:
        text = (
            f"In {counted(total.n_ambiguous, 'block')} the experts cancel out, so that no direction is preferred; the "
            "plain average was taken there."
        )
        verdicts.append(Verdict("watch", "No direction to prefer", text))
    return verdicts


def _remaining(total: Geometry) -> str:
    """Complete "the largest remaining ...": on the sphere a step, else a gradient, which has no unit."""
    size = number(total.residual)
    return f"step is {size} rad" if method_of(total.method).is_spherical else f"gradient is {size}"
