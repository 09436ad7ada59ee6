"""From the Gram matrix of a block to its coefficients, and what the numbers say about the block."""

# Shape suffixes: T = tensors, B = blocks of a tensor, K = operands, N = experts, P = pairs of experts.

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from hf_frmerge.errors import AmbiguousMeanError
from hf_frmerge.geometry.gram import delta_gram, embed, embed_differences
from hf_frmerge.geometry.portable import fold
from hf_frmerge.geometry.sphere import combine, distance, dot, normalise, norms, pairwise_angles
from hf_frmerge.merging.overflow import coefficients_overflow, squares_leave_float64
from hf_frmerge.methods.span import SPAN_METHODS, SpanOptions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike, NDArray


# Coordinates of pairs at a time, 2 MiB of float64: the work then stays in a core's cache.
_SLAB_ELEMENTS = 1 << 18


@dataclass(frozen=True)
class Geometry:
    """
    What the Gram matrices of a tensor say about its experts and about the merge.

    Attributes:
        norms: norm of every expert's point over the whole tensor.
        norm_ratio: norm of the merged point over the weighted mean norm of the experts' points; below 1 the merge
            shrank the tensor.
        linear_norm_ratio: the same for the plain weighted mean, the honest baseline: what averaging would have kept.
        max_angle: largest angle between two experts in any block, in radians.
        mean_angle: mean of those angles over pairs and blocks, in radians.
        gap_to_nre: largest angle in any block between the merged point and the norm-rescaled mean, in radians.
        n_iter: most steps any block took.
        residual: worst tangent norm at the end, in radians.
        unconverged: indices of the blocks that did not meet the tolerance.
        n_ambiguous: blocks in which no direction is preferred.
        pair_angles: median over blocks of the angle between two experts, in radians, to four digits, of the pairs
            (0, 1), (0, 2), ..., (1, 2), ...; `None` where one of the two is zero.
    """

    norms: tuple[float, ...]
    norm_ratio: float
    linear_norm_ratio: float
    max_angle: float
    mean_angle: float
    gap_to_nre: float
    n_iter: int
    residual: float
    unconverged: tuple[int, ...]
    n_ambiguous: int
    pair_angles: tuple[float | None, ...] = ()

    @property
    def converged(self) -> bool:
        """Whether every block met the tolerance."""
        return not self.unconverged


@dataclass(frozen=True)
class Solution:
    """Coefficients `(B, N)`, float64, on the points of every block, and the geometry they come from."""

    coefficients: NDArray[np.float64]
    geometry: Geometry


def points_of(gram_BKK: NDArray[np.float64], space: str, has_base: bool) -> NDArray[np.float64]:
    """
    Return the experts of every block as points `(B, N, K)` with the right lengths and angles.

    Args:
        gram_BKK: Gram matrix of the first operand and of the others' differences to it, float64. The first operand
            is the base model if `has_base`, else the first expert.
        space: `"weights"` (points are the tensors) or `"deltas"` (points are the differences to the base).
        has_base: Whether the first operand is the base model, which is not a point of its own.
    """
    if space == "deltas":
        return embed(delta_gram(gram_BKK))
    points = embed_differences(gram_BKK)
    return points[..., 1:, :] if has_base else points


def solve(
    points_TBNK: NDArray[np.float64],
    weights_TN: ArrayLike,
    method: str,
    options: SpanOptions,
    *,
    tensors: Sequence[str],
    experts: Sequence[str],
) -> list[Solution]:
    """
    Run one method on the points of several tensors' blocks, all at once.

    One at a time costs as much as all together: on so few numbers it is the number of calls that takes the time.

    Args:
        points_TBNK: From `points_of`, of tensors with equally many blocks.
        weights_TN: Non-negative, every row summing to 1.
        tensors, experts: Their names, for the error.

    Raises:
        AmbiguousMeanError: If the experts of a block balance out and `options.on_ambiguous` is `"raise"`.
        NonFiniteError: If the points or the coefficients leave the range of float64.
    """
    weights_TN = np.asarray(weights_TN, dtype=np.float64)
    weights_T1N = weights_TN[:, None]
    wild_T = ~np.isfinite(points_TBNK).all(axis=(1, 2, 3))
    if wild_T.any():
        raise squares_leave_float64(tensors[int(np.argmax(wild_T))], "its experts")
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):  # looked at below
        result = SPAN_METHODS[method](points_TBNK, weights_T1N, options)
    n_ambiguous_T = np.count_nonzero(result.ambiguous, axis=1)
    if n_ambiguous_T.any() and options.on_ambiguous == "raise":
        first = int(np.flatnonzero(n_ambiguous_T)[0])
        raise AmbiguousMeanError(_ambiguity(points_TBNK[first], result.ambiguous[first], tensors[first], experts))

    wild_T = ~np.isfinite(result.coefficients).all(axis=(1, 2))
    vanished_TB = (result.coefficients == 0).all(axis=2)
    if vanished_TB.any() and options.beta:  # the median of norms may be 0, but no power of the coherence is
        plain = SPAN_METHODS[method](points_TBNK, weights_T1N, replace(options, beta=0.0))
        wild_T |= (vanished_TB & plain.coefficients.any(axis=2)).any(axis=1)
    if wild_T.any():
        raise coefficients_overflow(tensors[int(np.argmax(wild_T))], method, options)

    merged, linear = combine(result.coefficients, points_TBNK), combine(weights_T1N, points_TBNK)
    norms_TBN = norms(points_TBNK)
    mean_norm_T = _over_blocks(dot(weights_T1N, norms_TBN))
    safe_T = np.where(mean_norm_T > 0, mean_norm_T, 1.0)
    lengths = [np.where(mean_norm_T > 0, _over_blocks(norms(x)) / safe_T, 1.0) for x in (merged, linear)]
    angles_TBP = _angles(points_TBNK, norms_TBN)
    # The norm-rescaled mean points where the plain mean does, so their gaps to the merged point are one.
    pair = np.stack([merged, linear], axis=-2)
    gap_T = np.nan_to_num(_angles(pair, norms(pair))).max(axis=(1, 2), initial=0.0)
    norms_TN = _over_blocks(norms_TBN)
    solutions = []
    for t in range(len(points_TBNK)):
        angles = angles_TBP[t][~np.isnan(angles_TBP[t])]
        geometry = Geometry(
            norms=tuple(norms_TN[t].tolist()),
            norm_ratio=float(lengths[0][t]),
            linear_norm_ratio=float(lengths[1][t]),
            max_angle=float(angles.max(initial=0.0)),
            mean_angle=float(fold(angles.copy())) / angles.size if angles.size else 0.0,
            gap_to_nre=float(gap_T[t]),
            n_iter=int(result.n_iter[t].max()),
            residual=float(result.residual[t].max()),
            unconverged=tuple(np.flatnonzero(~result.converged[t]).tolist()),
            n_ambiguous=int(n_ambiguous_T[t]),
            pair_angles=tuple(_medians(angles_TBP[t])),
        )
        solutions.append(Solution(np.ascontiguousarray(result.coefficients[t], dtype=np.float64), geometry))
    return solutions


def _over_blocks(lengths_TB: NDArray[np.float64]) -> NDArray[np.float64]:
    """Length of a whole tensor from those of its blocks, on the second axis."""
    return np.sqrt(fold((lengths_TB * lengths_TB).swapaxes(0, 1)))


@cache
def _pairs(n: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    return np.triu_indices(n, k=1)


def _angles(points_TBNK: NDArray[np.float64], lengths_TBN: NDArray[np.float64]) -> NDArray[np.float64]:
    """Angles of all pairs of points, `(T, B, P)`, in radians; NaN where one of the two has no direction."""
    first, second = _pairs(points_TBNK.shape[2])
    n_tensors, n_blocks = points_TBNK.shape[:2]
    angles_TBP = np.empty((n_tensors, n_blocks, len(first)))
    step = max(_SLAB_ELEMENTS // max(n_tensors * len(first) * points_TBNK.shape[3], 1), 1)
    for start in range(0, n_blocks, step):
        here = slice(start, start + step)
        units = normalise(points_TBNK[:, here])
        angles_TBP[:, here] = distance(units[..., first, :], units[..., second, :])
    directed = lengths_TBN > 0
    angles_TBP[~(directed[..., first] & directed[..., second])] = np.nan
    return angles_TBP


def _medians(angles_BP: NDArray[np.float64]) -> list[float | None]:
    """Median over the blocks that have one, to four digits: a figure shows no more, and the manifest stays small."""
    known = ~np.isnan(angles_BP)
    if known.all() and len(angles_BP):
        medians = (np.median(angles_BP, axis=0) if len(angles_BP) > 1 else angles_BP[0]).tolist()
    else:
        medians = [np.median(column[rows]) if rows.any() else None for column, rows in zip(angles_BP.T, known.T)]
    return [None if median is None else float(f"{median:.4g}") for median in medians]


def _ambiguity(
    points_BNK: NDArray[np.float64], ambiguous_B: NDArray[np.bool_], tensor: str, experts: Sequence[str]
) -> str:
    """Name the two experts that are farthest apart in the first ambiguous block."""
    angles = pairwise_angles(points_BNK[int(np.flatnonzero(ambiguous_B)[0])])
    i, j = np.unravel_index(int(np.argmax(angles)), angles.shape)
    return (
        f"The experts balance out in {tensor!r}: {experts[int(i)]!r} and {experts[int(j)]!r} are {angles[i, j]:.4f} "
        "rad apart, so no mean direction is preferred. Give them different weights, leave one out, or set "
        'on_ambiguous="linear" to take the plain weighted mean of such blocks.'
    )
