"""A method that merges how the experts turned the base model's matrices: OrthoMerge."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hf_frmerge.methods.spectral.inputs import Doubles, Experts, Matrix, SpectralOptions

_RESIDUAL_SCALE = 0.2  # lambda of the residuals' task arithmetic in the authors' experiments
_NULL_TOLERANCE = 1e-12  # singular values below this share of the largest are rounding errors of float64


def ortho_merge(experts: Experts, weights_N: NDArray[np.float64], options: SpectralOptions) -> Matrix:
    r"""
    OrthoMerge (arXiv 2602.05943): rotations of the base model's matrix, merged as rotations; the rest is added up.

    Expert i is the base turned and a rest, \(W_i = W_0 R_i + \rho_i\), with \(R_i\) the rotation that leaves the
    smallest rest (Procrustes). With \(Q_i = (R_i + I)^{-1}(R_i - I)\), which are skew,
    \(Q = \sum_i w_i |Q_i| \cdot \sum_i w_i Q_i / |\sum_i w_i Q_i|\), the merged matrix is
    \(W_0 (I - Q)^{-1}(I + Q) + 0.2 \sum_i \rho_i\).

    Where the experts say nothing of a rotation, as in directions that \(W_0\) maps to zero (all but m of a matrix with
    fewer rows than columns), \(R_i\) is the one nearest to no rotation; and a reflection, which has no \(Q_i\), is
    made a rotation in the direction in which that changes least. So R_i turns nothing outside of what the rows of
    \(W_0\) and \(W_i\) span, and is computed in these 2m directions if there are more. Computed in float64, since
    rotations of fine-tunes are small.
    """
    assert experts.base is not None
    base_mn = experts.base.astype(np.float64)
    rows, cols = base_mn.shape
    skew_nn, mean_norm = np.zeros((cols, cols)), 0.0
    rest_mn = np.zeros_like(base_mn)
    for delta_mn, weight in zip(experts.deltas, weights_N):
        if weight == 0 or not delta_mn.any():
            continue
        expert_mn = base_mn + delta_mn
        if 2 * rows < cols:
            basis_nk = np.linalg.qr(np.concatenate([base_mn, expert_mn]).T)[0]
            turned_mk, own_kk = _turned(base_mn @ basis_nk, expert_mn @ basis_nk)
            turned_mn, own_nn = turned_mk @ basis_nk.T, basis_nk @ own_kk @ basis_nk.T
        else:
            turned_mn, own_nn = _turned(base_mn, expert_mn)
        rest_mn += len(weights_N) * weight * (expert_mn - turned_mn)
        skew_nn += weight * own_nn
        mean_norm += weight * float(np.linalg.norm(own_nn))
    norm = float(np.linalg.norm(skew_nn))
    merged_mn = _RESIDUAL_SCALE * rest_mn
    if norm > 0:
        skew_nn *= mean_norm / norm
        # W_0 ((I - Q)^-1 (I + Q) - I), and the transpose of I - Q is I + Q
        merged_mn += np.linalg.solve(np.eye(cols) + skew_nn, base_mn.T).T @ (2.0 * skew_nn)
    return merged_mn.astype(np.float32)


def _turned(base_mk: Doubles, expert_mk: Doubles) -> tuple[Doubles, Doubles]:
    """Return the base turned to an expert, and the skew matrix of that rotation."""
    rotation_kk = nearest_rotation(base_mk.T @ expert_mk)
    return base_mk @ rotation_kk, cayley(rotation_kk)


def cayley(rotation_nn: Doubles) -> Doubles:
    r"""Return the skew matrix \(Q = (R + I)^{-1}(R - I)\) of a rotation; by the angle t it has tan(t / 2)."""
    identity = np.eye(len(rotation_nn))
    skew_nn = np.linalg.solve(rotation_nn + identity, rotation_nn - identity)
    exactly: Doubles = (skew_nn - skew_nn.T) / 2.0
    return exactly


def nearest_rotation(matrix_nn: Doubles) -> Doubles:
    r"""Return the rotation R with the largest trace of \(R^T M\); of several, the one nearest to the identity."""
    left_nn, values_n, right_nn = np.linalg.svd(matrix_nn)
    rank = int(np.count_nonzero(values_n > _NULL_TOLERANCE * values_n[0]))
    if rank < len(values_n):
        # Vectors of the null space pair up as they please: they are turned to meet as closely as they can.
        inner_left, _, inner_right = np.linalg.svd(left_nn[:, rank:].T @ right_nn[rank:].T)
        left_nn[:, rank:] = left_nn[:, rank:] @ inner_left
        right_nn[rank:] = inner_right @ right_nn[rank:]
    rotation_nn: Doubles = left_nn @ right_nn
    if np.linalg.slogdet(rotation_nn)[0] < 0:
        rotation_nn -= 2.0 * np.outer(left_nn[:, -1], right_nn[-1])
    return rotation_nn
