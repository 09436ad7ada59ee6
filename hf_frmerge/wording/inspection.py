"""The verdict on experts that were inspected, as sentences."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_frmerge.merging.record.summary import ROUNDING_ANGLE
from hf_frmerge.wording.geometry import MAY_DIFFER, SAME_MODEL

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hf_frmerge.merging.inspection import Inspection, SpaceView


def inspection_verdict(inspection: Inspection) -> str:
    """Explain what angles and norms of the experts mean for the choice of a method, in each space."""
    if not inspection.tensors:
        return "There is no tensor to merge."
    weights = [view.weights for view in inspection.tensors]
    deltas = [view.deltas for view in inspection.tensors if view.deltas is not None]
    parts = [_of_space("weight", weights, weights)]
    parts.append(
        _of_space("delta", deltas, weights)
        if deltas
        else "Pass the base model to see the deltas, where angles are wide."
    )
    return " ".join(parts)


def curvature_verdict(cost: float, eta: float) -> str:
    """
    Explain EpiMer's eta.

    Args:
        cost: What the plain mean costs, in nats a prediction, by the curvatures of the experts' predictions.
        eta: Twice what of it the best point saves.
    """
    if not cost:
        return (
            "The experts' linear layers are the same wherever their predictions depend on them: any mean is as good."
        )
    return (
        f"EpiMer's η = {eta:.3g}: by the curvatures of the experts' predictions a plain mean costs {cost:.3g} nats a "
        f"prediction, and the best point for these curvatures {eta / 2:.3g} less, {eta / 2 / cost:.0%} of it. If that "
        "is near 0 %, the experts depend on the same directions, and no geometry gains much on a plain mean; the "
        "larger it is, the more can be gained by asking what they compute (--method mats, or merge --calibration)."
    )


def _of_space(name: str, views: Sequence[SpaceView], weights: Sequence[SpaceView]) -> str:
    angle = max(view.max_angle for view in views)
    kept = min(view.linear_norm_ratio for view in views)
    gap = max(view.karcher_nre_gap for view in views)
    # The output are weights: an angle between deltas moves them by that angle times the deltas' share of the norm.
    shift = max(
        view.karcher_nre_gap * view.mean_norm / (whole.mean_norm or 1.0) for view, whole in zip(views, weights)
    )
    rounding = ROUNDING_ANGLE["BF16"]
    below = f"less than rounding to bf16 costs ({rounding:.2g}), {SAME_MODEL}."
    above = f"more than rounding to bf16 costs ({rounding:.2g}): {MAY_DIFFER}."
    return (
        f"In {name} space experts are up to {angle:.2g} rad apart and a plain mean keeps at least {kept:.1%} of "
        f"their norm. The Karcher mean is at most {gap:.1g} rad from the norm-rescaled mean, {shift:.1g} of the "
        f"weights' norm: {below if shift < rounding else above}"
    )
