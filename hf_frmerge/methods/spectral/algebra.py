"""Singular vectors, and the nearest orthonormal ones to those of several matrices."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hf_frmerge.methods.spectral.inputs import Matrix

RANK_TOLERANCE = 1e-5
"""Singular values below this share of the largest are rounding errors, and their vectors arbitrary."""


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


def svd(matrix_mn: Matrix) -> Triplets:
    """
    Return left singular vectors, singular values and right singular vectors, the largest first.

    NumPy computes them in float64. In float32 LAPACK takes half the time, but where singular values are close, which
    direction is whose hangs on the last digits: a method that cuts between them, or treats each by itself, would
    merge otherwise on another machine (by 1e-3 with SVC after TSV-Merge), which `verify` would have to allow.
    """
    return Triplets(*np.linalg.svd(matrix_mn, full_matrices=False))


def significant(values_r: Matrix) -> NDArray[np.bool_]:
    """Return which singular values, the largest first, are more than rounding errors; none of a zero matrix."""
    kept: NDArray[np.bool_] = values_r > RANK_TOLERANCE * values_r[0]
    return kept


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
    left, values, right = svd(matrix)
    kept = significant(values)
    nearest: Matrix = left[:, kept] @ right[kept]
    return nearest
