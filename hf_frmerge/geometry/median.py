"""Weighted geometric median of points, for many small sets of points at once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hf_frmerge.geometry.karcher import blocks_last
from hf_frmerge.geometry.portable import Array, fold

# Shape suffixes: N = number of points, K = number of coordinates, M = number of blocks; `...` = blocks.

# A point of weight w is the median if the others pull at it with less than w. Where both are equal, as for two points
# of one weight, there are several medians; this much of the weight keeps rounding from choosing among them. An iterate
# nearer to a point than this share of the largest distance has met it.
_TIE = 1e-12
# Longest step, in steps of Weiszfeld: near a point that is nearly the median those are a thousand times too short.
_LONGEST = 1e3
# Coordinates iterated at a time, 1 MiB of float64: fits a core's second-level cache.
_SLAB_ELEMENTS = 1 << 17


@dataclass(frozen=True)
class MedianResult:
    """Median of every block, as coefficients on its points, and how well it converged."""

    coeffs: Array  # (..., N): median = sum_i coeffs[..., i] * x_i; non-negative, summing to 1
    residual: Array  # (...): norm of the gradient of the mean distance; between 0 and 1
    n_iter: NDArray[np.int64]  # (...): steps taken


def geometric_median(points: Array, weights: ArrayLike, *, tol: float = 1e-12, max_iter: int = 100) -> MedianResult:
    r"""
    Weighted geometric median: the point \(m\) that minimises \(\sum_i w_i |x_i - m|\).

    Repeats \(m \leftarrow m + \eta (\sum_i c_i x_i - m)\) with \(c_i \propto w_i / |x_i - m|\), starting at the
    weighted mean; \(\eta = 1\) is the iteration of Weiszfeld (1937), which the secant rule lengthens. Whether a point
    is itself the median is decided before, by the pull of the others on it (Kuhn 1973), since the iteration would take
    forever to reach it; and an iterate that meets a point leaves it by the step of Vardi and Zhang (2000). The median
    is unique unless the points lie on one line; then the iteration ends at the one it meets first, which for two
    points of equal weight is the point midway.

    Blocks that have converged are dropped from the arrays, so that later steps only pay for the rest.

    Args:
        points (`np.ndarray`): `(..., N, K)`, float64.
        weights (`ArrayLike`): Non-negative weights that sum to 1, `(N,)` or `(..., N)`.
        tol (`float`, *optional*, defaults to `1e-12`): Stop when the norm of the gradient is below this.
        max_iter (`int`, *optional*, defaults to `100`): Give up after this many steps.

    Returns:
        `MedianResult`: Coefficients, residual and steps of every block.

    Example:
    ```python
    >>> import numpy as np
    >>> corners = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    >>> median = geometric_median(corners, [1 / 3, 1 / 3, 1 / 3])
    >>> (median.coeffs @ corners).round(6).tolist()  # all three corners are seen at 120 degrees from each other
    [0.211325, 0.211325]

    ```
    """
    points_NKM, weights_NM = blocks_last(points, weights)
    n_points, n_coordinates, n_blocks = points_NKM.shape
    coeffs_NM = np.empty((n_points, n_blocks))
    residual_M = np.empty(n_blocks)
    n_iter_M = np.zeros(n_blocks, dtype=np.int64)
    slab = max(_SLAB_ELEMENTS // (n_points * n_coordinates), 1)
    for start in range(0, n_blocks, slab):
        part = slice(start, start + slab)
        # Seen from the first point, so that far from the origin no digits of the differences are lost.
        seen_NKM = points_NKM[..., part] - points_NKM[:1, :, part]
        coeffs_NM[:, part], residual_M[part], n_iter_M[part] = _iterate(seen_NKM, weights_NM[:, part], tol, max_iter)
    blocks = points.shape[:-2]
    coeffs = np.moveaxis(coeffs_NM, -1, 0).reshape(*blocks, n_points)
    return MedianResult(coeffs, residual_M.reshape(blocks), n_iter_M.reshape(blocks))


def _iterate(
    points_NKM: Array, weights_NM: Array, tol: float, max_iter: int
) -> tuple[Array, Array, NDArray[np.int64]]:
    """Return coefficients, residuals and step counts of one slab."""
    coeffs_NM = _medians_among(points_NKM, weights_NM)
    residual_M = np.zeros(weights_NM.shape[1])
    n_iter_M = np.zeros(weights_NM.shape[1], dtype=np.int64)
    index_M = np.flatnonzero(np.isnan(coeffs_NM[0]))
    points_NKM, weights_NM = points_NKM[..., index_M], weights_NM[:, index_M]
    median_KM = fold(weights_NM[:, None] * points_NKM)
    eta_M = np.ones(index_M.size)
    before_KM, left_before_M = np.zeros_like(median_KM), np.full(index_M.size, np.inf)
    for step in range(max_iter + 1):
        if not index_M.size:
            break
        apart_NKM = points_NKM - median_KM
        away_NM = np.sqrt(fold((apart_NKM * apart_NKM).swapaxes(0, 1)))
        here_NM = away_NM <= _TIE * away_NM.max(axis=0)
        pull_NM = np.divide(weights_NM, away_NM, out=np.zeros_like(weights_NM), where=~here_NM)
        total_M = fold(pull_NM.copy())
        gradient_KM = fold(pull_NM[:, None] * apart_NKM)
        length_M = np.sqrt(fold(gradient_KM * gradient_KM))
        held_M = fold(np.where(here_NM, weights_NM, 0.0))  # weight of the points that the iterate has met
        left_M = np.maximum(length_M - held_M, 0.0)
        done_M = ((left_M < tol) & (held_M == 0)) | (step == max_iter)
        out = index_M[done_M]
        coeffs_NM[:, out] = (pull_NM / total_M)[:, done_M]
        residual_M[out] = left_M[done_M]
        n_iter_M[out] = step
        move_KM = left_M / np.where(length_M > 0, length_M, 1.0) / total_M * gradient_KM
        # Secant step (Barzilai and Borwein 1988), and the step of Weiszfeld again wherever the gradient has grown.
        before_sq_M = fold(before_KM * before_KM)
        fall_M = before_sq_M - fold(before_KM * move_KM)
        grew_M = (left_M >= left_before_M) | (fall_M <= 0.0) | (step == 0)
        secant_M = eta_M * before_sq_M / np.where(grew_M, 1.0, fall_M)
        eta_M = np.where(grew_M, 1.0, np.minimum(np.maximum(secant_M, 1.0), _LONGEST))
        median_KM = median_KM + eta_M * move_KM

        on_M = ~done_M
        index_M, eta_M, left_before_M = index_M[on_M], eta_M[on_M], left_M[on_M]
        points_NKM, weights_NM = points_NKM[..., on_M], weights_NM[:, on_M]
        median_KM, before_KM = median_KM[:, on_M], move_KM[:, on_M]
    return coeffs_NM, residual_M, n_iter_M


def _medians_among(points_NKM: Array, weights_NM: Array) -> Array:
    """Return coefficients `(N, M)` for blocks whose median is one of the points, shared by its copies; else NaN."""
    coeffs_NM = np.full(weights_NM.shape, np.nan)
    for point_KM in points_NKM:
        apart_NKM = points_NKM - point_KM
        away_NM = np.sqrt(fold((apart_NKM * apart_NKM).swapaxes(0, 1)))
        here_NM = away_NM == 0
        held_M = fold(np.where(here_NM, weights_NM, 0.0))
        pull_NM = np.divide(weights_NM, away_NM, out=np.zeros_like(weights_NM), where=~here_NM)
        gradient_KM = fold(pull_NM[:, None] * apart_NKM)
        is_median_M = np.sqrt(fold(gradient_KM * gradient_KM)) < (1.0 - _TIE) * held_M
        share_NM = np.where(here_NM, weights_NM, 0.0) / np.where(held_M > 0, held_M, 1.0)
        coeffs_NM = np.where(is_median_M & np.isnan(coeffs_NM), share_NM, coeffs_NM)
    return coeffs_NM
