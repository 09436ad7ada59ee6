"""Singular vectors, and the nearest orthonormal ones to those of several matrices."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hf_frmerge.methods.spectral.inputs import Doubles, Matrix

RANK_TOLERANCE = 1e-5
"""Singular values below this share of the largest are rounding errors, and their vectors arbitrary."""

WEAK = 1e-3
"""Singular values below this share of the largest are not taken from its squares, which have half of the digits."""


class Triplets(NamedTuple):
    """Singular vectors and values, the largest first."""

    left: Matrix  # (m, r)
    values: Matrix  # (r,)
    right: Matrix  # (r, n)

    def leading(self, rank: int) -> Triplets:
        """Return the first `rank` of them."""
        return Triplets(self.left[:, :rank], self.values[:rank], self.right[:rank])

    def times(self, factor: float) -> Triplets:
        """Return them with all values times `factor`."""
        return Triplets(self.left, self.values * np.float32(factor), self.right)


class Joined(NamedTuple):
    """Directions of several matrices side by side, made orthonormal."""

    left: Matrix  # (m, r)
    values: Matrix  # (r,)
    right: Matrix  # (r, n)
    owner: NDArray[np.intp]  # (r,): which of the matrices a direction is of


def svd(matrix_mn: Matrix, most: int | None = None) -> Triplets:
    r"""
    Return singular vectors and values, the largest first, without those that are rounding errors.

    They come from the eigenvectors of \(M M^T\) (of \(M^T M\) if M is tall), in two fifths of the time of an SVD for
    a matrix three times as wide as tall. What squaring costs in digits is paid by small values: those below `WEAK` of
    the largest, with all that is left of M in their directions, are taken apart once more by themselves.

    All of it is computed in float64. In float32 LAPACK takes half the time, but where singular values are close, which
    direction is whose hangs on the last digits: a method that cuts between them, or treats each by itself, would
    merge otherwise on another machine (by 1e-3 with SVC after TSV-Merge), which `verify` would have to allow.

    Args:
        matrix_mn: float32.
        most: How many are needed at most, from the largest on; all if `None`.

    Returns:
        As many as M has directions with more than `RANK_TOLERANCE` of its largest value; none of a matrix of zeros.

    Raises:
        numpy.linalg.LinAlgError: If LAPACK gives up.
    """
    rows, cols = matrix_mn.shape
    if rows > cols:
        left, values, right = svd(matrix_mn.T, most)
        return Triplets(right.T, values, left.T)
    found = _svd_of_wide(matrix_mn.astype(np.float64), rows if most is None else most, 0.0)
    return Triplets(*(part.astype(np.float32) for part in found))


def _svd_of_wide(wide_mn: Doubles, most: int, least: float) -> tuple[Doubles, Doubles, Doubles]:
    """Return at most `most` left vectors, values above `least` and right vectors of a matrix with m <= n."""
    squares_m, vectors_mm = np.linalg.eigh(wide_mn @ wide_mn.T)  # ascending
    largest = math.sqrt(max(float(squares_m[-1]), 0.0))
    n_weak = int(np.searchsorted(squares_m, max(WEAK * largest, least) ** 2, side="right"))
    left_mr = vectors_mm[:, n_weak:][:, ::-1][:, :most]
    values_r = np.sqrt(squares_m[n_weak:][::-1][:most])
    right_rn = left_mr.T @ wide_mn / values_r[:, None]
    weak_mk = vectors_mm[:, :n_weak]
    rest_kn = weak_mk.T @ wide_mn
    least = max(least, RANK_TOLERANCE * largest)
    if len(values_r) in (0, most) or np.linalg.norm(rest_kn) <= least:
        return left_mr, values_r, right_rn
    turn_kr, weak_values_r, weak_right_rn = _svd_of_wide(rest_kn, most - len(values_r), least)
    return (
        np.concatenate([left_mr, weak_mk @ turn_kr], axis=1),
        np.concatenate([values_r, weak_values_r]),
        np.concatenate([right_rn, weak_right_rn]),
    )


def join(parts: list[Triplets]) -> Joined | None:
    """
    Join the directions of several matrices, and replace the vectors by the nearest orthonormal ones.

    Directions without a value are left out; `None` if no other is left.
    """
    values = np.concatenate([part.values for part in parts])
    kept = values > RANK_TOLERANCE * values.max(initial=0.0)
    if not kept.any():
        return None
    left = _polar(np.concatenate([part.left for part in parts], axis=1)[:, kept])
    right = _polar(np.concatenate([part.right for part in parts], axis=0)[kept])
    owner = np.repeat(np.arange(len(parts)), [len(part.values) for part in parts])
    return Joined(left, values[kept], right, owner[kept])


def _polar(matrix: Matrix) -> Matrix:
    """
    Return the nearest matrix with orthonormal columns, or rows if it has fewer of these.

    Of dependent columns there is no one nearest: they share what they span, as alike as they are. A vector that two
    experts have in common becomes one over the square root of two of it for each.
    """
    left, _, right = svd(matrix)
    nearest: Matrix = left @ right
    return nearest
