"""The decision of a spectral method, which a merge records, and what it takes to carry it out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hf_frmerge.geometry.core_space import core_space
from hf_frmerge.geometry.lowrank import Factors
from hf_frmerge.methods.spectral.continual import opcm
from hf_frmerge.methods.spectral.covariances import ace, swudi
from hf_frmerge.methods.spectral.directions import iso_c, iso_cts, tsv_m
from hf_frmerge.methods.spectral.inputs import Experts, Matrix, SpectralMethod, SpectralOptions
from hf_frmerge.methods.spectral.residuals import res_merge
from hf_frmerge.methods.spectral.rotations import ortho_merge
from hf_frmerge.methods.spectral.votes import core_ties, dc_merge, knots
from hf_frmerge.methods.table import METHODS

RULES: dict[str, SpectralMethod] = {
    method.__name__: method
    for method in (tsv_m, iso_c, iso_cts, swudi, res_merge, knots, core_ties, dc_merge, ace, ortho_merge, opcm)
}

_VOTES = (knots.__name__, core_ties.__name__, dc_merge.__name__)


def tolerance(method: str) -> float:
    """
    Return the share of a merged delta's norm by which two machines may differ; see `provenance.verify`.

    Where elements are kept by their size and voted on, the one on the edge may fall to either side: in one of 24
    matrices of KnOTS with real experts one element did, which changed the matrix by 3e-3.
    """
    return 3e-2 if method in _VOTES else 1e-3


@dataclass(frozen=True)
class Spectral:
    """
    Decision of a spectral method: the method and its numbers, as nothing is measured.

    Attributes:
        rule: name of the method, of a function of `RULES`.
        weights: weights of the experts.
        scale: factor of the merged delta.
        options: numbers of the method.
    """

    rule: str
    weights: tuple[float, ...]
    scale: float
    options: SpectralOptions

    def to_journal(self) -> dict[str, Any]:
        """Return JSON values, from which every number can be read back exactly."""
        return {**vars(self), "options": vars(self.options)}

    def merge(self, experts: Experts) -> Matrix:
        """Return the merged delta before it is scaled. Raises `np.linalg.LinAlgError` if LAPACK gives up."""
        return RULES[self.rule](experts, np.array(self.weights), self.options)

    def merge_factors(self, factors: Sequence[Factors]) -> Factors:
        """
        Do what `merge` does with low-rank deltas, through their cores (Core Space, arXiv 2509.17786).

        For methods whose result turns with the deltas (`Method.cores`) it is the same, to rounding: cores are the
        deltas in other coordinates. With R the sum of the ranks, singular vectors are those of `R x R` matrices.

        Args:
            factors: Of the delta of every expert, `(m, r_i)` and `(r_i, n)`; those of one that has none of rank 0.

        Returns:
            `Factors` of the merged delta, float64, of rank R at most.

        Raises:
            OverflowError: If a sum of the deltas may be beyond float32; LAPACK can work on infinities forever.
            np.linalg.LinAlgError: If LAPACK gives up.
        """
        if not fits_float32(factors):
            raise OverflowError("a sum of the deltas may leave the range of float32")
        space = core_space(factors, left_only=METHODS[self.rule].cores == "left")
        shape = len(factors[0].B), factors[0].A.shape[1]
        core = self.merge(Experts(space.cores.astype(np.float32), shape=shape))
        return space.factors(core.astype(np.float64))


def fits_float32(factors: Sequence[Factors]) -> bool:
    """Whether no sum of low-rank deltas, each added up to N times, can leave the range of float32."""
    return bool(len(factors) * sum(most_norms(factors)) < np.finfo(np.float32).max)


def most_norms(factors: Sequence[Factors]) -> list[float]:
    """Return an upper limit for the norm of each low-rank delta."""
    return [
        float(abs(scale) * np.linalg.norm(B.astype(float)) * np.linalg.norm(A.astype(float)))
        for B, A, scale in factors
    ]


def memory_bytes(method: str, rows: int, cols: int, n_experts: int, core_rank: int | None = None) -> int:
    """
    Return an upper limit of what merging one matrix takes: deltas, singular vectors of all, products of columns.

    Args:
        method: Name of the method.
        rows, cols: Shape of the matrix.
        n_experts: Number of experts.
        core_rank: Sum of the ranks of their deltas, if these are merged as cores.
    """
    if core_rank is not None:  # cores, factors and their singular vectors in float64, the merged delta
        core_cols = cols if METHODS[method].cores == "left" else core_rank
        cores = 4 * core_rank * (core_cols * (4 * n_experts + 8) + 14 * core_rank)
        return 2 * cores + 8 * 8 * (rows + cols) * core_rank + 8 * rows * cols
    needed = 4 * (rows * cols * (4 * n_experts + 8) + 8 * min(rows, cols) ** 2 + 6 * cols**2)
    if method == ortho_merge.__name__:
        turned = min(cols, 2 * rows)  # rotations, their singular vectors and the workspace of these, in float64
        needed += 8 * (12 * turned**2 + 4 * turned * cols + 3 * cols**2)
    return needed
