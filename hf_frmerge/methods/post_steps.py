"""Steps that work on a merged matrix, whatever method merged it."""

# Shape suffixes: N = experts, m = rows (outputs), n = columns (inputs), r = rank.

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hf_frmerge.methods.spectral.algebra import svd
from hf_frmerge.methods.spectral.inputs import Matrix


@dataclass(frozen=True)
class SingularValueCalibration:
    r"""
    SVC (arXiv 2602.05536): singular values of a merged delta, corrected for what several experts have in common.

    With \(u_r\) the left singular vectors of the merged delta \(\Delta\) and \(s_{ri} = \langle u_r^T\Delta,
    u_r^T\tau_i\rangle / |u_r^T\tau_i|^2\) how much more of direction r the merge has than expert i, singular value
    r is divided by \(\sum_i w_i \max(s_{ri}, \alpha)\). A direction that the sum of N experts counts N times comes
    back to its size in one of them. The paper has equal weights.

    Attributes:
        weights: shares of the experts; their magnitudes sum to 1.
        floor: \(\alpha\), 0.1 in the authors' code: an expert that has nothing of a direction, or opposes it, counts
            as this much.
    """

    weights: tuple[float, ...]
    floor: float = 0.1

    def apply(self, merged_mn: Matrix, deltas_Nmn: Matrix) -> Matrix:
        """Return the corrected delta. Raises `np.linalg.LinAlgError` if LAPACK gives up."""
        left_mr, values_r, right_rn = svd(merged_mn)
        share_r = np.zeros(len(values_r))
        for weight, delta_mn in zip(self.weights, deltas_Nmn):
            own_rn = left_mr.T @ delta_mn
            along_r = np.einsum("rn,rn->r", own_rn, right_rn, dtype=np.float64) * values_r
            squares_r = np.einsum("rn,rn->r", own_rn, own_rn, dtype=np.float64)
            times_r = np.divide(along_r, squares_r, out=np.zeros_like(along_r), where=squares_r > 0)
            share_r += abs(weight) * np.maximum(times_r, self.floor)
        corrected: NDArray[np.float32] = (left_mr * (values_r / share_r).astype(np.float32)) @ right_rn
        return corrected
