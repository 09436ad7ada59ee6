"""Quadratic surrogates of scores: fitted by weighted least squares, and checked on points left out."""

# Shape suffixes: P = points, K = coordinates, Q = coefficients of a quadratic function.

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hf_frmerge.errors import ArgumentError
from hf_frmerge.weighting.pareto.region import Array, Region

_RIDGES = (0.0, 1e-4, 1e-3, 1e-2, 1e-1)


def require_evaluations(region: Region, n_evaluations: int) -> None:
    """
    Check that so many different points suffice for a quadratic function.

    Raises:
        ArgumentError: If they do not.
    """
    if n_evaluations < region.n_coefficients:
        raise ArgumentError(
            f"How a score depends on {region.n_experts} weights"
            f"{'' if region.scales[0] == region.scales[1] else ' and the scale'} is described by "
            f"{region.n_coefficients} numbers, which {n_evaluations} merges do not tell. Measure "
            f"{region.n_coefficients} or more, best {region.n_evaluations} (evaluations, --evaluations)."
        )


@dataclass(frozen=True)
class Quadratic:
    """
    Quadratic function of the coefficients of the experts.

    Attributes:
        region: where it was fitted.
        coefficients_Q: of 1, of each coordinate, and of each product of two.
        left_out: R² on points that the fit did not see, each left out once; NaN if there were no points to spare.
        residuals_P: what it missed of the points it was fitted to.
    """

    region: Region
    coefficients_Q: Array
    left_out: float
    residuals_P: Array

    def __call__(self, points_PN: Array) -> Array:
        """Return its values at points, `(P,)`."""
        values: Array = _monomials(self.region.coordinates(points_PN)) @ self.coefficients_Q
        return values


def fit_quadratic(region: Region, points_PN: Array, scores_P: Array, precisions_P: Array | None = None) -> Quadratic:
    """
    Fit a quadratic function by least squares, with the ridge that predicts points left out best.

    Args:
        region: Where the points are from.
        points_PN: Coefficients of the experts.
        scores_P: Measured there, in any unit.
        precisions_P: How much each point counts: one over the variance of its score. All alike by default.

    Raises:
        ArgumentError: If there are fewer points than coefficients, or they are too much alike to tell these apart.
    """
    design_PQ = _monomials(region.coordinates(points_PN))
    n_points, n_coefficients = design_PQ.shape
    require_evaluations(region, int(np.linalg.matrix_rank(design_PQ)))
    precisions_P = np.ones(n_points) if precisions_P is None else precisions_P / precisions_P.max()
    # With no point to spare there is nothing to choose a ridge by, and none is needed to go through all points.
    ridges = _RIDGES if n_points > n_coefficients else (0.0,)
    fits = [_fit(design_PQ, scores_P, precisions_P, ridge) for ridge in ridges]
    coefficients_Q, missed_P = min(fits, key=lambda fit: float(precisions_P @ np.square(fit[1])))
    residuals_P = scores_P - design_PQ @ coefficients_Q
    if n_points == n_coefficients:
        return Quadratic(region, coefficients_Q, float("nan"), residuals_P)
    # The mean, too, is that of the other points.
    mean_P = (precisions_P @ scores_P - precisions_P * scores_P) / (precisions_P.sum() - precisions_P)
    spread = float(precisions_P @ np.square(scores_P - mean_P))
    missed = float(precisions_P @ np.square(missed_P))
    return Quadratic(region, coefficients_Q, 1.0 - missed / spread if spread else 1.0, residuals_P)


def _monomials(coordinates_PK: Array) -> Array:
    first, second = np.triu_indices(coordinates_PK.shape[1])
    products = coordinates_PK[:, first] * coordinates_PK[:, second]
    return np.hstack([np.ones((len(coordinates_PK), 1)), coordinates_PK, products])


def _fit(design_PQ: Array, scores_P: Array, precisions_P: Array, ridge: float) -> tuple[Array, Array]:
    """
    Return the coefficients, and what each point is missed by when it alone is left out, `(P,)`.

    The ridge is on all coefficients but the first, relative to their mean part in the equations. A point left out is
    missed by its residual over one minus its leverage (Allen's PRESS).
    """
    roots_P = np.sqrt(precisions_P)
    weighted_PQ = design_PQ * roots_P[:, None]
    n_coefficients = design_PQ.shape[1]
    penalty = np.sqrt(ridge * np.mean(np.square(weighted_PQ).sum(0)))
    extra_QQ = penalty * np.eye(n_coefficients)
    extra_QQ[0, 0] = 0.0
    # As rows of the problem, which is then solved by QR: normal equations would square its condition.
    stacked = np.vstack([weighted_PQ, extra_QQ])
    q, r = np.linalg.qr(stacked)
    q_P = q[: len(scores_P)]
    coefficients_Q = np.linalg.solve(r, q_P.T @ (roots_P * scores_P))
    leverages_P = np.minimum(np.square(q_P).sum(1), 1.0 - 1e-12)
    missed_P: NDArray[np.float64] = (scores_P - design_PQ @ coefficients_Q) / (1.0 - leverages_P)
    return coefficients_Q, missed_P
