"""Compute the coefficients of a block from its Gram matrix, and measurements of the experts and the merge."""

# Shape suffixes: T = tensors, B = blocks of a tensor, K = operands, N = experts, P = pairs of experts.

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_frmerge.errors import AmbiguousMeanError
from hf_frmerge.geometry.gram import delta_gram, embed, embed_differences
from hf_frmerge.geometry.portable import fold
from hf_frmerge.geometry.sphere import combine, distance, dot, normalise, norms, pairwise_angles
from hf_frmerge.merging.decisions import Geometry, Solution
from hf_frmerge.merging.operands.overflow import coefficients_overflow, squares_leave_float64
from hf_frmerge.methods.span import SpanResult
from hf_frmerge.methods.table import METHODS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike, NDArray

    from hf_frmerge.methods.span import SpanOptions

# Coordinates of pairs processed at a time, 2 MiB of float64, so that the work stays in a core's cache.
_SLAB_ELEMENTS = 1 << 18


def points_of(gram_BKK: NDArray[np.float64], space: str, has_base: bool) -> NDArray[np.float64]:
    """
    Return the experts of every block as points `(B, N, K)` that have their lengths and angles.

    Args:
        gram_BKK: Gram matrix of the first operand and of the others' differences to it, float64. The first operand
            is the base model if `has_base`, else the first expert. In delta space without a base (adapters that become
            an adapter) it is the Gram matrix of the deltas.
        space: `"weights"` (points are the tensors) or `"deltas"` (points are the differences to the base).
        has_base: Whether the first operand is the base model, which is not one of the points.
    """
    if space == "deltas":
        return embed(delta_gram(gram_BKK) if has_base else gram_BKK)
    points = embed_differences(gram_BKK)
    return points[..., 1:, :] if has_base else points


_ROUNDING = 2.0**-45
"""How far from 1 the sum of shares may be, which are not divided again: they would change in their last bits."""


def solve(
    points_TBNK: NDArray[np.float64],
    weights_TN: ArrayLike,
    method: str,
    options: SpanOptions,
    *,
    tensors: Sequence[str],
    experts: Sequence[str],
    numbers: Sequence[bool] | None = None,
) -> list[Solution]:
    """
    Run one method on the points of several tensors' blocks, all at once.

    On so few numbers the time goes into the numpy calls themselves, so that solving many tensors costs about as much
    as solving one.

    Args:
        points_TBNK: From `points_of`, of tensors with equally many blocks.
        weights_TN: Not negative and summing to 1 in every row; any numbers for methods that add.
        tensors, experts: Their names, for the error.
        numbers: Whether the blocks of a tensor are single numbers, which have a sign but no direction: methods that
            merge directions take their plain mean. By default none are.

    Raises:
        AmbiguousMeanError: If the experts of a block cancel and `options.on_ambiguous` is `"raise"`.
        NonFiniteError: If the points or the coefficients leave the range of float64.
    """
    weights_T1N = np.asarray(weights_TN, dtype=np.float64)[:, None]
    _check_finite(points_TBNK, tensors)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):  # checked for below
        plain_T = np.array(numbers if numbers is not None and METHODS[method].is_directional else [False])
        # Not solved where it is not wanted: on single numbers an iteration takes all the steps it may.
        solver = METHODS["linear" if plain_T.all() else method].solver()
        result = solver(points_TBNK, weights_T1N, options)
        if plain_T.any() and not plain_T.all():
            plain = METHODS["linear"].solver()(points_TBNK, weights_T1N, options)
            result = _choose(plain_T, plain, result)
    ambiguous_T = result.ambiguous.any(axis=1)
    if ambiguous_T.any() and options.on_ambiguous == "raise":
        first = int(np.argmax(ambiguous_T))
        raise AmbiguousMeanError(_ambiguity(points_TBNK[first], result.ambiguous[first], tensors[first], experts))
    wild_T = _overflown(result, points_TBNK, weights_T1N, method, options)
    if wild_T.any():
        raise coefficients_overflow(tensors[int(np.argmax(wild_T))], method, options)
    return [
        Solution(np.ascontiguousarray(coefficients_BN, dtype=np.float64), geometry)
        for coefficients_BN, geometry in zip(result.coefficients, _geometries(result, points_TBNK, weights_T1N))
    ]


def measure(
    points_TBNK: NDArray[np.float64],
    weights_TN: ArrayLike,
    coefficients_TBN: NDArray[np.float64],
    *,
    tensors: Sequence[str],
) -> list[Solution]:
    """
    Measure merges whose coefficients are known, as `solve` measures those that it makes.

    Args:
        points_TBNK, weights_TN, tensors: As for `solve`.
        coefficients_TBN: Coefficients of every block, float64.

    Raises:
        NonFiniteError: If the points leave the range of float64.
    """
    _check_finite(points_TBNK, tensors)
    shape = coefficients_TBN.shape[:2]
    result = SpanResult(
        coefficients_TBN,
        n_iter=np.zeros(shape, np.int64),
        residual=np.zeros(shape),
        converged=np.ones(shape, np.bool_),
        ambiguous=np.zeros(shape, np.bool_),
    )
    weights_T1N = np.asarray(weights_TN, dtype=np.float64)[:, None]
    return [*map(Solution, coefficients_TBN, _geometries(result, points_TBNK, weights_T1N))]


def _check_finite(points_TBNK: NDArray[np.float64], tensors: Sequence[str]) -> None:
    """Raise `NonFiniteError` if the points are not finite: squares of very large values overflow in a Gram matrix."""
    wild_T = ~np.isfinite(points_TBNK).all(axis=(1, 2, 3))
    if wild_T.any():
        raise squares_leave_float64(tensors[int(np.argmax(wild_T))], "its experts")


def _overflown(
    result: SpanResult,
    points_TBNK: NDArray[np.float64],
    weights_T1N: NDArray[np.float64],
    method: str,
    options: SpanOptions,
) -> NDArray[np.bool_]:
    """Tell for every tensor, `(T,)`, whether its coefficients left the range of float64."""
    wild_T = np.asarray(~np.isfinite(result.coefficients).all(axis=(1, 2)))
    vanished_TB = (result.coefficients == 0).all(axis=2)
    # All coefficients of a block may be 0 because the median of the norms is 0. With a beta, the power of the
    # coherence may also have underflown: it has if the coefficients without beta are not all 0.
    if vanished_TB.any() and options.beta:
        plain = METHODS[method].solver()(points_TBNK, weights_T1N, replace(options, beta=0.0))
        wild_T |= (vanished_TB & plain.coefficients.any(axis=2)).any(axis=1)
    return wild_T


def _geometries(
    result: SpanResult, points_TBNK: NDArray[np.float64], weights_T1N: NDArray[np.float64]
) -> list[Geometry]:
    """Measure the experts and the merge of every tensor; means are by shares, also where weights are factors."""
    total_T11 = dot(np.abs(weights_T1N), np.ones_like(weights_T1N))[..., None]
    weights_T1N = np.where(np.abs(total_T11 - 1) <= _ROUNDING, weights_T1N, weights_T1N / total_T11)
    merged, linear = combine(result.coefficients, points_TBNK), combine(weights_T1N, points_TBNK)
    norms_TBN = norms(points_TBNK)
    mean_norm_T = _over_blocks(dot(np.abs(weights_T1N), norms_TBN))
    safe_T = np.where(mean_norm_T > 0, mean_norm_T, 1.0)  # a tensor of zeros has lost no norm: its ratio is 1
    lengths = [np.where(mean_norm_T > 0, _over_blocks(norms(x)) / safe_T, 1.0) for x in (merged, linear)]
    angles_TBP = _angles(points_TBNK, norms_TBN)
    # The norm-rescaled mean has the direction of the plain mean, so the angle between the merged point and the plain
    # mean is the gap to both.
    pair = np.stack([merged, linear], axis=-2)
    gap_T = np.nan_to_num(_angles(pair, norms(pair))).max(axis=(1, 2), initial=0.0)
    n_steps_T, residuals_T = result.n_iter.max(axis=1), result.residual.max(axis=1)
    unconverged = [np.flatnonzero(~row) for row in result.converged] if not result.converged.all() else None
    columns = (  # in the order of the fields
        map(tuple, _over_blocks(norms_TBN).tolist()),
        *(column_T.tolist() for column_T in (*lengths, *_extent(angles_TBP), gap_T, n_steps_T, residuals_T)),
        [tuple(blocks.tolist()) for blocks in unconverged] if unconverged else [()] * len(gap_T),
        np.count_nonzero(result.ambiguous, axis=1).tolist(),
        map(tuple, _medians(angles_TBP)),
    )
    return [Geometry(*values) for values in zip(*columns)]


def _choose(first_T: NDArray[np.bool_], first: SpanResult, second: SpanResult) -> SpanResult:
    """Take the results of some tensors from `first`, and of the others from `second`."""

    def chosen(ours: NDArray[Any], theirs: NDArray[Any]) -> NDArray[Any]:
        return np.where(first_T.reshape(-1, *[1] * (ours.ndim - 1)), ours, theirs)

    return SpanResult(
        chosen(first.coefficients, second.coefficients),
        chosen(first.n_iter, second.n_iter),
        chosen(first.residual, second.residual),
        chosen(first.converged, second.converged),
        chosen(first.ambiguous, second.ambiguous),
    )


def _over_blocks(lengths_TB: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the lengths of whole tensors, from the lengths of their blocks on the second axis."""
    return np.sqrt(fold((lengths_TB * lengths_TB).swapaxes(0, 1)))


@cache
def _pairs(n: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    return np.triu_indices(n, k=1)


def _angles(points_TBNK: NDArray[np.float64], lengths_TBN: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the angles of all pairs of points, `(T, B, P)`, in radians; NaN if one of the two has no direction."""
    first, second = _pairs(points_TBNK.shape[2])
    n_tensors, n_blocks = points_TBNK.shape[:2]
    angles_TBP = np.empty((n_tensors, n_blocks, len(first)))
    step = max(_SLAB_ELEMENTS // max(n_tensors * len(first) * points_TBNK.shape[3], 1), 1)
    for start in range(0, n_blocks, step):
        part = slice(start, start + step)
        units = normalise(points_TBNK[:, part])
        angles_TBP[:, part] = distance(units[..., first, :], units[..., second, :])
    directed = lengths_TBN > 0
    angles_TBP[~(directed[..., first] & directed[..., second])] = np.nan
    return angles_TBP


def _extent(angles_TBP: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the largest angle of every tensor, and the mean of its angles; 0 where it has none."""
    known_TBP = ~np.isnan(angles_TBP)
    largest_T = np.where(known_TBP, angles_TBP, 0.0).max(axis=(1, 2), initial=0.0)
    whole_T = known_TBP.all(axis=(1, 2))
    mean_T = np.zeros(len(angles_TBP))
    count = angles_TBP[0].size
    if count:
        mean_T[whole_T] = fold(angles_TBP[whole_T].reshape(-1, count).T.copy()) / count
    for t in np.flatnonzero(~whole_T):
        angles = angles_TBP[t][known_TBP[t]]
        mean_T[t] = fold(angles) / angles.size if angles.size else 0.0
    return largest_T, mean_T


def _medians(angles_TBP: NDArray[np.float64]) -> list[list[float | None]]:
    """Return pairs' median angles over the blocks; four digits, as figures show no more, keep the record short."""
    known_TBP = ~np.isnan(angles_TBP)
    if known_TBP.all() and angles_TBP.shape[1]:
        medians = (np.median(angles_TBP, axis=1) if angles_TBP.shape[1] > 1 else angles_TBP[:, 0]).tolist()
    else:
        medians = [
            [np.median(angles_B[known_B]) if known_B.any() else None for angles_B, known_B in zip(angles.T, known.T)]
            for angles, known in zip(angles_TBP, known_TBP)
        ]
    return [[None if median is None else float(f"{median:.4g}") for median in row] for row in medians]


def _ambiguity(
    points_BNK: NDArray[np.float64], ambiguous_B: NDArray[np.bool_], tensor: str, experts: Sequence[str]
) -> str:
    """Return a message that names the two experts that are farthest apart in the first ambiguous block."""
    points_NK = points_BNK[int(np.flatnonzero(ambiguous_B)[0])]
    directed_N = norms(points_NK) > 0  # a zero expert has no angle to another
    angles = np.where(directed_N[:, None] & directed_N, pairwise_angles(points_NK), 0.0)
    i, j = np.unravel_index(int(np.argmax(angles)), angles.shape)
    return (
        f"The experts balance out in {tensor!r}: {experts[int(i)]!r} and {experts[int(j)]!r} are {angles[i, j]:.4f} "
        "rad apart, so no mean direction is preferred. Give them different weights, leave one out, or set "
        'on_ambiguous="linear" to take the plain weighted mean of such blocks; with that option the merge can be '
        "resumed."
    )
