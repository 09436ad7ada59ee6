"""A method that adds one expert to a merge: OPCM."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hf_frmerge.methods.spectral.algebra import svd
from hf_frmerge.methods.spectral.inputs import Experts, Matrix, SpectralOptions


def opcm(experts: Experts, weights_N: NDArray[np.float64], options: SpectralOptions) -> Matrix:
    r"""
    OPCM (arXiv 2501.09522, section 4): what a new expert adds to the merge so far, without what would disturb it.

    The first delta is the merge so far, D, the second that of the new expert; N times their weighted sum is returned,
    \(2 (w_1 D + w_2 \tilde\tau)\), with \(\tilde\tau\) from [`without_disturbance`]. What w and `scale` are,
    `weighting.continual` finds out.
    """
    merged_mn, new_mn = experts.deltas
    factors = (2 * weights_N).astype(np.float32)
    added: Matrix = factors[0] * merged_mn + factors[1] * without_disturbance(merged_mn, new_mn, options.density)
    return added


def without_disturbance(merged_mn: Matrix, new_mn: Matrix, share: float) -> Matrix:
    r"""
    Return the part of a delta that a merged delta \(D = U \Sigma V^T\) has no part in.

    With \(P = U^T \tau V\), the paper sets the diagonal of P to zero, and the block of the r leading directions, those
    whose singular values add up to at most `share` of all (0.5 in the paper). The rest of U and V, which the paper
    computes in full, is not needed:

    \[ \tilde\tau = \tau - U_r (U_r^T \tau V_r) V_r^T - \sum_{i>r} (u_i^T \tau v_i)\, u_i v_i^T. \]

    Directions without a singular value, of which there is no telling apart, are left as they are.
    """
    left_mr, values_r, right_rn = svd(merged_mn)
    # With rounding, a share of 1 must be all.
    leading = int(np.count_nonzero(np.cumsum(values_r, dtype=np.float64) <= share * (1 + 1e-6) * values_r.sum()))
    block_rr = left_mr[:, :leading].T @ new_mn @ right_rn[:leading].T
    own_r = np.einsum("mr,mn,rn->r", left_mr[:, leading:], new_mn, right_rn[leading:], optimize=True)
    rest: Matrix = new_mn - left_mr[:, :leading] @ block_rr @ right_rn[:leading]
    return rest - (left_mr[:, leading:] * own_r) @ right_rn[leading:]
