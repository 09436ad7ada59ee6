"""
Methods whose merged block is a linear combination `sum_i c_i x_i` of the experts' blocks.

The coefficients follow from the Gram matrix alone. Every method is a function `(points, weights, options) ->
SpanResult` on coordinates of the blocks (see `geometry.gram.embed`), for all blocks at once; `methods.table` lists
them. `karcher`, `slerp`, `nre` and `multislerp` choose a direction and share one rule for the norm. With `n` the norms
and `u` the directions,

    |merged| = coherence ** beta * (mean | median | max of n),    coherence = |sum_i w_i u_i|

so that `beta=0` preserves norms, `beta=1` shrinks like the plain mean, and `beta=-1` grows like the plain sum.

If all experts of positive weight are the same point (one expert of weight 1, equal experts, all-zero blocks), the
coefficients are exactly `scale` times the weights. This holds for all methods except `task_arithmetic`, which is a
sum by definition. An expert with a zero block has no direction: the directional methods give it coefficient 0 and
share the direction among the others by their weights, but its norm of 0 still counts in the norm.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hf_frmerge.errors import ArgumentError
from hf_frmerge.geometry.karcher import MIN_MARGIN, is_ambiguous, karcher_mean
from hf_frmerge.geometry.median import geometric_median as median_of
from hf_frmerge.geometry.portable import power
from hf_frmerge.geometry.sphere import Array, combine, distance, dot, normalise, norms, slerp_coefficients

# Normalised weights carry rounding errors, so a cumulative sum this close to one half counts as one half.
_HALF_ROUNDING = 1e-12


@dataclass(frozen=True)
class SpanOptions:
    """
    Options of the span methods.

    Args:
        norm (`str`, *optional*, defaults to `"mean"`):
            Norm of a merged block before `beta`: weighted `"mean"`, weighted `"median"` (the smallest norm that
            half of the weight does not exceed; midway between two if the weight splits exactly in half between
            them), or `"max"` over experts of positive weight.
        beta (`float`, *optional*, defaults to `0.0`):
            Power of the coherence that multiplies the norm.
        scale (`float`, *optional*, defaults to `1.0`):
            Factor of the merged block; meant for deltas.
        tol (`float`, *optional*, defaults to `1e-12`):
            Norm of the gradient at which an iteration stops: of the Karcher mean in radians, of the geometric median
            as a share of the pull of all experts.
        max_iter (`int`, *optional*, defaults to `100`):
            Maximum number of steps.
        on_ambiguous (`str`, *optional*, defaults to `"raise"`):
            Coefficients of blocks where no direction is preferred: `"linear"` takes the weights, as in a plain mean.
            `"raise"` returns NaN, and the caller raises, because only the caller knows the tensor names. Such blocks
            are flagged either way.
    """

    norm: Literal["mean", "median", "max"] = "mean"
    beta: float = 0.0
    scale: float = 1.0
    tol: float = 1e-12
    max_iter: int = 100
    on_ambiguous: Literal["raise", "linear"] = "raise"


@dataclass(frozen=True)
class SpanResult:
    """Coefficients on the experts' blocks; the merged block is `sum_i coefficients[..., i] * x_i`."""

    coefficients: Array  # (..., N), float64
    n_iter: NDArray[np.int64]  # (...): steps of the iteration; 0 for answers in closed form
    residual: Array  # (...): gradient norm, as `SpanOptions.tol`; 0 for answers in closed form
    converged: NDArray[np.bool_]  # (...): residual < tol; True for answers in closed form
    ambiguous: NDArray[np.bool_]  # (...): no direction is preferred; see `SpanOptions.on_ambiguous`


SpanMethod = Callable[[Array, ArrayLike, SpanOptions], SpanResult]


def linear(points: Array, weights: ArrayLike, options: SpanOptions) -> SpanResult:
    """
    Plain weighted mean, `c = w`. Of inputs of one norm, it is shorter than they are by the factor `coherence`.

    Args:
        points (`np.ndarray`): Coordinates of the blocks, `(..., N, K)`, float64.
        weights (`ArrayLike`): Non-negative, summing to 1, `(N,)` or `(..., N)`.
        options (`SpanOptions`): `scale` is used.

    Returns:
        `SpanResult`: The scaled weights as coefficients.
    """
    return _closed_form(options.scale * _broadcast(points, weights))


def task_arithmetic(points: Array, weights: ArrayLike, options: SpanOptions) -> SpanResult:
    """
    Scaled sum, `c_i = scale * w_i` (Ilharco et al. 2023); meant for deltas.

    Args:
        points (`np.ndarray`): Coordinates of the blocks, `(..., N, K)`, float64.
        weights (`ArrayLike`): What each expert counts, 1 by default, `(N,)` or `(..., N)`.
        options (`SpanOptions`): `scale` is used.

    Returns:
        `SpanResult`: The scaled weights as coefficients; with weights of 1, they sum to `scale * N`.
    """
    return _closed_form(options.scale * _broadcast(points, weights))


def nre(points: Array, weights: ArrayLike, options: SpanOptions) -> SpanResult:
    """
    Norm-rescaled mean: direction of the plain weighted mean `sum_i w_i x_i`, norm by `norm` and `beta`.

    Ambiguous where that mean is shorter than `MIN_MARGIN` times the mean of norms.

    Args:
        points (`np.ndarray`): Coordinates of the blocks, `(..., N, K)`, float64.
        weights (`ArrayLike`): Non-negative, summing to 1, `(N,)` or `(..., N)`.
        options (`SpanOptions`): `norm`, `beta`, `scale` and `on_ambiguous` are used.

    Returns:
        `SpanResult`: Coefficients proportional to the weights of the experts that are not zero.
    """
    blocks = _Blocks.of(points, weights)
    mean_norm = norms(combine(blocks.weights, points))
    ambiguous = mean_norm < MIN_MARGIN * dot(blocks.weights, blocks.lengths)
    direction = np.where(blocks.lengths > 0, blocks.weights, 0.0)
    scale = blocks.target_norm(options) / np.where(mean_norm > 0, mean_norm, 1.0)
    return blocks.result(scale[..., None] * direction, ambiguous, options)


def slerp(points: Array, weights: ArrayLike, options: SpanOptions) -> SpanResult:
    """
    Point on the great circle from the first expert to the second, at the fraction `w_2` (Shoemake 1985).

    This is the Karcher mean of two experts in closed form. Ambiguous where the two are opposite to within
    `2 * MIN_MARGIN` rad.

    Args:
        points (`np.ndarray`): Coordinates of the blocks, `(..., 2, K)`, float64.
        weights (`ArrayLike`): Non-negative, summing to 1, `(2,)` or `(..., 2)`.
        options (`SpanOptions`): `norm`, `beta`, `scale` and `on_ambiguous` are used.

    Returns:
        `SpanResult`: Coefficients of the two.

    Raises:
        ArgumentError: If there are not exactly two experts.
    """
    _require_two("slerp", points)
    blocks = _Blocks.of(points, weights)
    angle, ambiguous = blocks.arc()
    on_units = np.stack(slerp_coefficients(angle, blocks.direction_weights[..., 1]), axis=-1)
    return blocks.result(blocks.on_points(on_units, options), ambiguous, options)


def karcher(points: Array, weights: ArrayLike, options: SpanOptions) -> SpanResult:
    """
    Weighted Karcher mean of the directions (arXiv 2603.04972, section 3.4), norm by `norm` and `beta`.

    Ambiguous where the directions do not lie in an open hemisphere; see `geometry.karcher.is_ambiguous`.

    Args:
        points (`np.ndarray`): Coordinates of the blocks, `(..., N, K)`, float64.
        weights (`ArrayLike`): Non-negative, summing to 1, `(N,)` or `(..., N)`.
        options (`SpanOptions`): All are used.

    Returns:
        `SpanResult`: Coefficients, with steps and residual of the iteration.
    """
    blocks = _Blocks.of(points, weights)
    # All weights 0: neither the hemisphere search nor the iteration spends a step on a block that needs no answer.
    open_weights = np.where(blocks.coincide[..., None], 0.0, blocks.direction_weights)
    ambiguous = is_ambiguous(blocks.units, open_weights)
    open_weights[ambiguous] = 0.0
    mean = karcher_mean(blocks.units, open_weights, tol=options.tol, max_iter=options.max_iter)
    residual = np.where(ambiguous | blocks.coincide, 0.0, mean.residual)
    coefficients = blocks.on_points(mean.coeffs, options)
    return blocks.result(coefficients, ambiguous, options, n_iter=mean.n_iter, residual=residual)


def nuslerp(points: Array, weights: ArrayLike, options: SpanOptions) -> SpanResult:
    r"""
    SLERP of the experts as they are, not of their directions: \(\sin((1-t)\theta)/\sin\theta\, x_1 +
    \sin(t\theta)/\sin\theta\, x_2\), with \(t = w_2\) and \(\theta\) their angle.

    This is mergekit's `nuslerp`, which leaves the norm to follow from the two; for experts of one norm it is `slerp`.
    With `block="row"` every row has an angle of its own, as there without `nuslerp_flatten`. If one of the two is zero
    there is no angle, and the mean is plain. Ambiguous where `slerp` is.

    Args:
        points (`np.ndarray`): Coordinates of the blocks, `(..., 2, K)`, float64.
        weights (`ArrayLike`): Non-negative, summing to 1, `(2,)` or `(..., 2)`.
        options (`SpanOptions`): `scale` and `on_ambiguous` are used.

    Returns:
        `SpanResult`: Coefficients of the two.

    Raises:
        ArgumentError: If there are not exactly two experts.
    """
    _require_two("nuslerp", points)
    blocks = _Blocks.of(points, weights)
    angle, ambiguous = blocks.arc()
    angle = np.where((blocks.lengths > 0).all(axis=-1), angle, 0.0)
    on_points = np.stack(slerp_coefficients(angle, blocks.weights[..., 1]), axis=-1)
    return blocks.result(on_points, ambiguous, options)


def multislerp(points: Array, weights: ArrayLike, options: SpanOptions) -> SpanResult:
    r"""
    Normalised weighted mean of the directions, \(\sum_i w_i u_i\), norm by `norm` and `beta`.

    mergekit's `multislerp` takes one step from this point along the mean of the directions in its tangent space. That
    mean is \(\sum_i w_i u_i - \langle m, \sum_i w_i u_i\rangle m\) with \(m\) parallel to the sum: it is zero, the
    step goes nowhere, and this is what remains. It differs from `nre` where norms do, and from the Karcher mean, of
    whose iteration it is the start. Ambiguous where the sum is shorter than `MIN_MARGIN`.

    Args:
        points (`np.ndarray`): Coordinates of the blocks, `(..., N, K)`, float64.
        weights (`ArrayLike`): Non-negative, summing to 1, `(N,)` or `(..., N)`.
        options (`SpanOptions`): `norm`, `beta`, `scale` and `on_ambiguous` are used.

    Returns:
        `SpanResult`: Coefficients, inversely proportional to the norms.
    """
    blocks = _Blocks.of(points, weights)
    length = norms(combine(blocks.direction_weights, blocks.units))
    on_units = blocks.direction_weights / np.where(length > 0, length, 1.0)[..., None]
    return blocks.result(blocks.on_points(on_units, options), length < MIN_MARGIN, options)


def model_stock(points: Array, weights: ArrayLike, options: SpanOptions) -> SpanResult:
    r"""
    Mean of the deltas, shortened as much as they disagree: \(c_i = t\, w_i\) (arXiv 2403.19522, equation 5).

    With \(\cos\theta\) the mean cosine of two deltas and \(s = \sum_i w_i^2\), 1/N for equal weights as in the paper,

    \[ t = \frac{\cos\theta}{s + (1 - s)\cos\theta}. \]

    If the deltas are one common part plus independent noise of equal size, this t brings the mean closest to the
    common part. For weights that differ, the mean over pairs is weighted with \(w_i w_j\). Deltas without a common
    part, at right angles or beyond, give t = 0, which is the base model; mergekit goes on to the base's other side.
    Filter by filter, the paper's other form, is `block="row"`. A zero delta has cosine 0 with all others.

    Args:
        points (`np.ndarray`): Coordinates of the deltas, `(..., N, K)`, float64.
        weights (`ArrayLike`): Non-negative, summing to 1, `(N,)` or `(..., N)`.
        options (`SpanOptions`): `scale` is used.

    Returns:
        `SpanResult`: Coefficients that sum to t, scaled.
    """
    blocks = _Blocks.of(points, weights)
    squares = dot(blocks.weights, blocks.weights)
    mean = combine(blocks.weights, blocks.units)
    # |sum_i w_i u_i|^2 has every pair twice, and the weights of the experts that are not zero once.
    alone = np.where(blocks.lengths > 0, blocks.weights, 0.0)
    pairs = 1.0 - squares  # 0 if only one expert counts; then all points coincide
    cosine = np.clip((dot(mean, mean) - dot(alone, alone)) / np.where(pairs > 0, pairs, 1.0), 0.0, 1.0)
    shrink = cosine / (squares + (1.0 - squares) * cosine)
    return blocks.result(shrink[..., None] * blocks.weights, np.zeros(shrink.shape, dtype=bool), options)


def geometric_median(points: Array, weights: ArrayLike, options: SpanOptions) -> SpanResult:
    r"""
    Weighted geometric median, the point with the smallest mean distance to the experts \(\sum_i w_i |x_i - m|\).

    An expert far from the others moves it no more than one nearby; one that has half of the weight is the median.

    Args:
        points (`np.ndarray`): Coordinates of the blocks, `(..., N, K)`, float64.
        weights (`ArrayLike`): Non-negative, summing to 1, `(N,)` or `(..., N)`.
        options (`SpanOptions`): `scale`, `tol` and `max_iter` are used.

    Returns:
        `SpanResult`: Coefficients that sum to `scale`, with steps and residual of the iteration.
    """
    blocks = _Blocks.of(points, weights)
    median = median_of(points, blocks.weights, tol=options.tol, max_iter=options.max_iter)
    never = np.zeros(median.residual.shape, dtype=bool)
    residual = np.where(blocks.coincide, 0.0, median.residual)
    n_iter = np.where(blocks.coincide, 0, median.n_iter)
    return blocks.result(median.coeffs, never, options, n_iter=n_iter, residual=residual)


@dataclass(frozen=True)
class _Blocks:
    """Norms, directions and weights of the experts in each block, shared by the directional methods."""

    weights: Array  # (..., N)
    lengths: Array  # (..., N): norms of the points
    units: Array  # (..., N, K): directions, zero for zero points
    direction_weights: Array  # (..., N): weights without zero points, summing to 1 (or all 0 if no point is left)
    coincide: NDArray[np.bool_]  # (...): all points of positive weight are the same

    @classmethod
    def of(cls, points: Array, weights: ArrayLike) -> _Blocks:
        spread = _broadcast(points, weights)
        lengths = norms(points)
        moving = np.where(lengths > 0, spread, 0.0)
        total = dot(moving, np.ones_like(moving))[..., None]
        # Divide only where a zero point was left out: elsewhere the total differs from 1 by rounding at most, and the
        # division would change the weights in their last bits.
        total = np.where((total > 0) & (moving != spread).any(axis=-1, keepdims=True), total, 1.0)
        heaviest = np.take_along_axis(points, np.argmax(spread, axis=-1)[..., None, None], axis=-2)
        coincide = ((points == heaviest).all(axis=-1) | (spread == 0)).all(axis=-1)
        return cls(spread, lengths, normalise(points), moving / total, np.asarray(coincide))

    def arc(self) -> tuple[Array, NDArray[np.bool_]]:
        """Return the angle between two experts, and where they are opposite, so that no arc is the shortest."""
        first, second = self.units[..., 0, :], self.units[..., 1, :]
        # The midpoint of two unit vectors is the point of their convex hull nearest to the origin: the same test as in
        # `is_ambiguous`, in closed form.
        opposite = 0.5 * norms(first + second) < MIN_MARGIN
        return np.where(opposite, 0.0, distance(first, second)), np.asarray(opposite)

    def target_norm(self, options: SpanOptions) -> Array:
        if options.norm == "mean":
            norm = dot(self.weights, self.lengths)
        elif options.norm == "max":
            norm = np.max(np.where(self.weights > 0, self.lengths, 0.0), axis=-1)
        else:
            norm = _weighted_median(self.lengths, self.weights)
        if options.beta == 0.0:
            return norm
        coherence = norms(combine(self.direction_weights, self.units))
        # Where the coherence is 0 the block is ambiguous and its norm is not used; 1 avoids a division by zero.
        return norm * power(np.where(coherence > 0, coherence, 1.0), options.beta)

    def on_points(self, on_units: Array, options: SpanOptions) -> Array:
        """Turn coefficients on unit vectors into coefficients on the points, with the target norm."""
        return on_units * (self.target_norm(options)[..., None] / np.where(self.lengths > 0, self.lengths, np.inf))

    def result(
        self,
        coefficients: Array,
        ambiguous: NDArray[np.bool_],
        options: SpanOptions,
        n_iter: NDArray[np.int64] | None = None,
        residual: Array | None = None,
    ) -> SpanResult:
        """Fill in exact answers where points coincide, and what `on_ambiguous` asks for; then scale."""
        ambiguous = np.asarray(ambiguous & ~self.coincide)
        coefficients = np.where(self.coincide[..., None], self.weights, coefficients)
        unanswered = self.weights if options.on_ambiguous == "linear" else np.full_like(self.weights, np.nan)
        answer = _closed_form(options.scale * np.where(ambiguous[..., None], unanswered, coefficients))
        n_iter = answer.n_iter if n_iter is None else n_iter
        residual = answer.residual if residual is None else residual
        return SpanResult(answer.coefficients, n_iter, residual, np.asarray(residual < options.tol), ambiguous)


def _require_two(method: str, points: Array) -> None:
    n_experts = points.shape[-2]
    if n_experts != 2:
        raise ArgumentError(
            f'Method "{method}" merges exactly 2 experts, got {n_experts}. Use "karcher", which takes any number.'
        )


def _closed_form(coefficients: Array) -> SpanResult:
    blocks = coefficients.shape[:-1]
    no, yes = np.zeros(blocks, dtype=bool), np.ones(blocks, dtype=bool)
    return SpanResult(coefficients, np.zeros(blocks, dtype=np.int64), np.zeros(blocks), yes, no)


def _broadcast(points: Array, weights: ArrayLike) -> Array:
    return np.broadcast_to(np.asarray(weights, dtype=np.float64), points.shape[:-1])


def _weighted_median(values: Array, weights: Array) -> Array:
    order = np.argsort(values, axis=-1, kind="stable")
    values = np.take_along_axis(values, order, axis=-1)
    reached = np.cumsum(np.take_along_axis(weights, order, axis=-1), axis=-1)
    lower = np.argmax(reached >= 0.5 - _HALF_ROUNDING, axis=-1)[..., None]
    upper = np.argmax(reached > 0.5 + _HALF_ROUNDING, axis=-1)[..., None]
    middle = np.take_along_axis(values, lower, axis=-1) + np.take_along_axis(values, upper, axis=-1)
    return 0.5 * middle[..., 0]
