"""Where points of a search for weights may lie."""

from __future__ import annotations

import numpy as np

from hf_frmerge.weighting.pareto.region import Region


def inside(region: Region, points: np.ndarray) -> np.ndarray:
    """Whether coefficients are none of them negative, and sum to a scale in the range, within rounding."""
    sums, (low, high) = points.sum(1), region.scales
    return (points >= -1e-9).all(1) & (sums >= low - 1e-9) & (sums <= high + 1e-9)
