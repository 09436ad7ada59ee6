"""Weighted Karcher mean on the unit sphere, for many small sets of points at once, and a test for its uniqueness."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hf_frmerge.geometry.portable import Array, angle_over_sine, cosine_and_sinc, fold

# Shape suffixes: N = number of points, K = number of coordinates, M = number of blocks; `...` = blocks.

# Unit vectors count as cancelling when the origin is nearer than this to their convex hull (for two vectors: an angle
# within 2e-3 rad of pi). Gram matrices from the fast kernels have relative errors up to 1e-6, which can move a nearly
# dependent unit vector by up to 1e-3, so opposite and nearly opposite vectors cannot be told apart below that.
MIN_MARGIN = 1e-3
# Limit on the search for a hemisphere, which only runs for blocks whose weighted sum is not the centre of one.
_HULL_STEPS = 1000
# Coordinates iterated at a time, 1 MiB of float64: fits a core's second-level cache.
_SLAB_ELEMENTS = 1 << 17


@dataclass(frozen=True)
class KarcherResult:
    """Mean direction of every block, as coefficients on its unit vectors, and how well it converged."""

    coeffs: Array  # (..., N): mean = sum_i coeffs[..., i] * u_i, of unit norm; NaN where no direction is preferred
    residual: Array  # (...): norm of the Riemannian gradient at the last iterate, in radians
    n_iter: NDArray[np.int64]  # (...): steps taken
    converged: NDArray[np.bool_]  # (...): residual < tol


def karcher_mean(units: Array, weights: ArrayLike, *, tol: float = 1e-12, max_iter: int = 100) -> KarcherResult:
    r"""
    Weighted Karcher mean of unit vectors: the point that minimises \(\sum_i w_i\, d(\mu, u_i)^2\), \(d\) the angle.

    Repeats \(\mu \leftarrow \mathrm{Exp}_\mu(\eta \sum_i w_i \mathrm{Log}_\mu u_i)\) (arXiv 2603.04972, section 3.3)
    starting at the normalised weighted sum. The unit step, \(\eta = 1\), never overshoots and needs no damping,
    because the Hessian of \(d^2/2\) has the eigenvalues 1 and \(\theta\cot\theta \le 1\). But it takes hundreds of
    steps where angles approach \(\pi/2\), as between the deltas of many experts. The step is therefore lengthened by
    the secant rule (Barzilai and Borwein 1988), between 1 and the step \(1 / \sum_i w_i \theta_i\cot\theta_i\) that
    would make the iterate the normalised sum of the pulls \(w_i \theta_i / \sin\theta_i\, u_i\). It is reset to 1
    whenever the gradient has grown.

    Where the gradient is zero, the mean is proportional to the sum of the pulls, which gives the coefficients. They
    are unique even if the vectors are linearly dependent: equal vectors share in proportion to their weights.

    Blocks that have converged are dropped from the arrays, so that later steps only pay for the rest.

    Args:
        units (`np.ndarray`):
            Unit vectors, or zero vectors of weight zero, `(..., N, K)`, float64.
        weights (`ArrayLike`):
            Non-negative weights that sum to 1, `(N,)` or `(..., N)`.
        tol (`float`, *optional*, defaults to `1e-12`):
            Stop when the norm of the gradient, in radians, is below this.
        max_iter (`int`, *optional*, defaults to `100`):
            Give up after this many steps; the block then says `converged=False`.

    Returns:
        `KarcherResult`: Coefficients, residual, steps and convergence of every block. Blocks whose weighted sum is
        shorter than `MIN_MARGIN` are not iterated: their coefficients are NaN and their residual infinite. Use
        [`is_ambiguous`] to find which of the others have no unique mean.

    Raises:
        ValueError: If `weights` cannot be broadcast to `(..., N)`.

    Example:
    ```python
    >>> import numpy as np
    >>> mean = karcher_mean(np.eye(2), [0.75, 0.25])  # two orthogonal vectors: a quarter of the way along the arc
    >>> mean.coeffs.round(6).tolist(), bool(mean.converged)
    ([0.92388, 0.382683], True)

    ```
    """
    units_NKM, weights_NM = blocks_last(units, weights)
    n_points, n_coordinates, n_blocks = units_NKM.shape
    coeffs_NM = np.full((n_points, n_blocks), np.nan)
    residual_M = np.full(n_blocks, np.inf)
    n_iter_M = np.zeros(n_blocks, dtype=np.int64)
    slab = max(_SLAB_ELEMENTS // (n_points * n_coordinates), 1)
    for start in range(0, n_blocks, slab):
        part = slice(start, start + slab)
        coeffs_NM[:, part], residual_M[part], n_iter_M[part] = _iterate(
            np.ascontiguousarray(units_NKM[..., part]), weights_NM[:, part], tol, max_iter
        )
    blocks = units.shape[:-2]
    residual = residual_M.reshape(blocks)
    return KarcherResult(
        np.moveaxis(coeffs_NM, -1, 0).reshape(*blocks, n_points), residual, n_iter_M.reshape(blocks), residual < tol
    )


def is_ambiguous(units: Array, weights: ArrayLike) -> NDArray[np.bool_]:
    """
    Flag the blocks whose vectors can cancel, where a unique mean is not guaranteed.

    The mean is unique when the vectors of positive weight lie in an open hemisphere (Buss and Fillmore 2001; Afsari
    2011), that is, when the origin is not in their convex hull. A block is flagged if the origin is in the hull or
    nearer to it than `MIN_MARGIN`: opposite vectors, three at 120 degrees in a plane, or any others of which some
    average is zero. Testing whether the mean lies within 90 degrees of every vector would be wrong: two vectors 120
    degrees apart have a unique mean for any weights. Linearly independent vectors always lie in a hemisphere, so only
    dependent ones can be flagged: in practice, blocks with fewer elements than experts, or with copies of an expert.

    It only matters whether a weight is zero: if any weighted sum vanishes, so does the distance to the hull.

    Args:
        units (`np.ndarray`):
            Unit vectors, or zero vectors of weight zero, `(..., N, K)`, float64.
        weights (`ArrayLike`):
            Non-negative weights, `(N,)` or `(..., N)`; a block without any positive weight is not flagged.

    Returns:
        `np.ndarray`: `(...)`, bool. The few blocks that the search cannot settle are flagged too.

    Example:
    ```python
    >>> import numpy as np
    >>> bool(is_ambiguous(np.array([[1.0, 0.0], [-1.0, 0.0]]), [0.9, 0.1])), bool(is_ambiguous(np.eye(2), [0.9, 0.1]))
    (True, False)

    ```
    """
    units_NKM, weights_NM = blocks_last(units, weights)
    in_hemisphere_M = _is_centre(units_NKM, weights_NM, _dot(weights_NM[:, None], units_NKM))
    in_hemisphere_M |= ~np.any(weights_NM > 0, axis=0)
    unsettled = np.flatnonzero(~in_hemisphere_M)
    if unsettled.size:
        in_hemisphere_M[unsettled] = _search_hemisphere(units_NKM[..., unsettled], weights_NM[:, unsettled])
    return (~in_hemisphere_M).reshape(units.shape[:-2])


def blocks_last(points: Array, weights: ArrayLike) -> tuple[Array, Array]:
    """Return points `(N, K, M)` and weights `(N, M)` of all blocks, from `(..., N, K)` and `(N,)` or `(..., N)`."""
    # numpy is fast on millions of tiny blocks only when its inner loop runs over the blocks.
    n_points, n_coordinates = points.shape[-2:]
    points_NKM = np.moveaxis(points.reshape(-1, n_points, n_coordinates), 0, -1)
    weights_NM = np.broadcast_to(np.asarray(weights, dtype=np.float64), points.shape[:-1]).reshape(-1, n_points).T
    return points_NKM, weights_NM


def _dot(a: Array, b: Array) -> Array:
    return fold(a * b)


def _iterate(units_NKM: Array, weights_NM: Array, tol: float, max_iter: int) -> tuple[Array, Array, NDArray[np.int64]]:
    """Run the iteration of `karcher_mean` on one slab; return coefficients, residuals and step counts."""
    coeffs_NM = np.full(weights_NM.shape, np.nan)
    residual_M = np.full(weights_NM.shape[1], np.inf)
    n_iter_M = np.zeros(weights_NM.shape[1], dtype=np.int64)

    sum_KM = _dot(weights_NM[:, None], units_NKM)
    length_M = np.sqrt(_dot(sum_KM, sum_KM))
    index_M = np.flatnonzero(length_M >= MIN_MARGIN)  # which block of the slab each column still iterated is
    units_NKM, weights_NM = units_NKM[..., index_M], weights_NM[:, index_M]
    mean_KM = sum_KM[:, index_M] / length_M[index_M]
    eta_M = np.ones(index_M.size)
    before_KM, before_sq_M = np.zeros_like(mean_KM), np.full(index_M.size, np.inf)

    for step in range(max_iter + 1):
        cos_NM = _dot(units_NKM.swapaxes(0, 1), mean_KM[:, None])
        # A float64 cosine cannot resolve angles below 1.5e-8 rad, but there theta / sin(theta) is exactly 1 anyway.
        pull_NM = weights_NM * angle_over_sine(cos_NM)
        pulled_KM = _dot(pull_NM[:, None], units_NKM)
        # = sum_i w_i theta_i cot(theta_i), a lower bound on the eigenvalues of the Hessian.
        along_M = _dot(pulled_KM, mean_KM)
        gradient_KM = pulled_KM - along_M * mean_KM
        gradient_sq_M = _dot(gradient_KM, gradient_KM)
        length_M = np.sqrt(gradient_sq_M)

        done_M = (length_M < tol) | (step == max_iter)
        if done_M.any():
            out = index_M[done_M]
            coeffs_NM[:, out] = (pull_NM / np.sqrt(_dot(pulled_KM, pulled_KM)))[:, done_M]
            residual_M[out] = length_M[done_M]
            n_iter_M[out] = step
            if done_M.all():
                break

        # Secant step (Barzilai and Borwein): with s = eta * before and y = before - gradient, eta = <s, s> / <s, y>.
        # If <s, y> is not positive or the gradient grew, the secant says nothing useful: take the safe unit step.
        fall_M = before_sq_M - _dot(before_KM, gradient_KM)
        grew_M = (gradient_sq_M >= before_sq_M) | (fall_M <= 0.0) | (step == 0)
        secant_M = eta_M * before_sq_M / np.where(grew_M, 1.0, fall_M)
        longest_M = 1.0 / np.minimum(np.maximum(along_M, 0.1), 1.0)
        longest_M = np.minimum(longest_M, np.pi / np.maximum(length_M, 0.1))  # not past the antipode
        eta_M = np.where(grew_M, 1.0, np.minimum(np.maximum(secant_M, 1.0), longest_M))
        cosine_M, sinc_M = cosine_and_sinc(eta_M * length_M)
        next_KM = cosine_M * mean_KM + (eta_M * sinc_M) * gradient_KM
        next_KM /= np.sqrt(_dot(next_KM, next_KM))  # rounding makes the norm drift away from 1

        on_M = ~done_M
        index_M, eta_M, before_sq_M = index_M[on_M], eta_M[on_M], gradient_sq_M[on_M]
        units_NKM, weights_NM = units_NKM[..., on_M], weights_NM[:, on_M]
        mean_KM, before_KM = next_KM[:, on_M], gradient_KM[:, on_M]
    return coeffs_NM, residual_M, n_iter_M


def _is_centre(units_NKM: Array, weights_NM: Array, centre_KM: Array) -> NDArray[np.bool_]:
    """Tell whether all vectors of positive weight lie at least `MIN_MARGIN` inside the hemisphere around `centre`."""
    height_NM = _dot(units_NKM.swapaxes(0, 1), centre_KM[:, None])
    lowest_M = np.min(np.where(weights_NM > 0, height_NM, np.inf), axis=0)
    length_M = np.sqrt(_dot(centre_KM, centre_KM))
    return (lowest_M >= MIN_MARGIN * length_M) & (length_M >= MIN_MARGIN)


def _search_hemisphere(units_NKM: Array, weights_NM: Array) -> NDArray[np.bool_]:
    """Tell which blocks have a hemisphere with all vectors of positive weight."""
    # Algorithm of Mitchell, Demyanov and Malozemov (1974) for the point of the convex hull nearest to the origin: move
    # mass from the vector with the largest inner product with the current point to the one with the smallest. The
    # nearest point, unless it is the origin, is the centre of a hemisphere that holds all vectors.
    in_hemisphere_M = np.zeros(weights_NM.shape[1], dtype=bool)
    used_NM = weights_NM > 0
    mass_NM = used_NM / used_NM.sum(axis=0)
    index_M = np.arange(weights_NM.shape[1])
    for _ in range(_HULL_STEPS):
        nearest_KM = _dot(mass_NM[:, None], units_NKM)
        in_hemisphere_M[index_M] = _is_centre(units_NKM, weights_NM, nearest_KM)
        # A point within MIN_MARGIN of the origin settles it the other way: the vectors cancel.
        open_M = ~in_hemisphere_M[index_M] & (np.sqrt(_dot(nearest_KM, nearest_KM)) >= MIN_MARGIN)
        if not open_M.any():
            break
        index_M, units_NKM, nearest_KM = index_M[open_M], units_NKM[..., open_M], nearest_KM[:, open_M]
        weights_NM, used_NM, mass_NM = weights_NM[:, open_M], used_NM[:, open_M], mass_NM[:, open_M]

        height_NM = _dot(units_NKM.swapaxes(0, 1), nearest_KM[:, None])
        back_M = np.argmin(np.where(used_NM, height_NM, np.inf), axis=0)
        out_M = np.argmax(np.where(mass_NM > 0, height_NM, -np.inf), axis=0)
        column_M = np.arange(index_M.size)
        apart_KM = units_NKM[out_M, :, column_M].T - units_NKM[back_M, :, column_M].T
        apart_sq_M = np.maximum(_dot(apart_KM, apart_KM), np.finfo(np.float64).tiny)
        # The step that minimises the distance to the origin along this segment, without making a mass negative.
        move_M = (height_NM[out_M, column_M] - height_NM[back_M, column_M]) / apart_sq_M
        move_M = np.clip(move_M, 0.0, mass_NM[out_M, column_M])
        mass_NM[out_M, column_M] -= move_M
        mass_NM[back_M, column_M] += move_M
    return in_hemisphere_M
