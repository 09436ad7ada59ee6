"""
Methods that merge a matrix as a whole, by its singular vectors or the products of its rows.

A spectral method is a function `(deltas, weights, options) -> merged delta` on the deltas of one matrix;
`methods.table` lists them. Everything is computed in float32 by LAPACK, so that the last digits are those of the
machine. With `w` the weights, a sum over the experts is that of `N w_i delta_i`: with equal weights every delta is
added once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Shape suffixes: N = experts, m = rows (outputs), n = columns (inputs), r = rank.

Matrix = NDArray[np.float32]

TOLERANCE = 1e-3
"""Share of the merged delta's norm by which two machines may differ; see `provenance.verify`."""

# Singular values below this share of the largest are rounding errors, and their vectors arbitrary.
RANK_TOLERANCE = 1e-5


@dataclass(frozen=True)
class SpectralOptions:
    """
    Options of the spectral methods.

    Args:
        density: Share of directions: common ones in `iso_cts`, those that are changed in `swudi`.
        descent_steps: Steps of gradient descent that `swudi` stands for.
    """

    density: float = 1.0
    descent_steps: float = 300.0


SpectralMethod = Callable[[Matrix, NDArray[np.float64], SpectralOptions], Matrix]


@dataclass(frozen=True)
class Spectral:
    """
    Decision of a spectral method: the method and its numbers, as nothing is measured.

    Attributes:
        rule: name of the function of this module.
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

    def merge(self, deltas_Nmn: Matrix) -> Matrix:
        """Return the merged delta before it is scaled. Raises `np.linalg.LinAlgError` if LAPACK gives up."""
        function: SpectralMethod = RULES[self.rule]
        return function(deltas_Nmn, np.array(self.weights), self.options)


def memory_bytes(rows: int, cols: int, n_experts: int) -> int:
    """Return an upper limit of what merging one matrix takes: deltas, singular vectors of all, products of columns."""
    return 4 * (rows * cols * (4 * n_experts + 8) + 8 * min(rows, cols) ** 2 + 6 * cols**2)


def tsv_m(deltas_Nmn: Matrix, weights_N: NDArray[np.float64], options: SpectralOptions) -> Matrix:
    """
    TSV-Merge (arXiv 2412.00081): the leading 1/N of every delta's singular vectors, made orthogonal to each other.

    The left vectors of all experts together are replaced by the nearest orthonormal ones, and so are the right ones;
    the singular values stay. For deltas whose leading vectors are orthogonal between experts this is their sum.
    Directions without a singular value, of low-rank deltas, are left out: they would turn the others.
    """
    n_experts, rows, cols = deltas_Nmn.shape
    rank = max(1, min(rows, cols) // n_experts)
    parts = []
    for delta_mn, weight in zip(deltas_Nmn, weights_N):
        left_mr, values_r, right_rn = svd(delta_mn)
        parts.append((left_mr[:, :rank], values_r[:rank] * np.float32(n_experts * weight), right_rn[:rank]))
    directions = _orthogonal(parts)
    if directions is None:
        return np.zeros((rows, cols), np.float32)
    left, values, right = directions
    scaled: Matrix = np.multiply(left, values, dtype=np.float32)
    return scaled @ right


def iso_c(deltas_Nmn: Matrix, weights_N: NDArray[np.float64], options: SpectralOptions) -> Matrix:
    """
    Iso-C (arXiv 2502.04959): the sum of the deltas with all singular values replaced by their mean.

    Directions in which the sum is zero, as with low-rank deltas, stay zero and are not counted: their singular vectors
    would be noise.
    """
    left_mr, values_r, right_rn = svd(_sum(deltas_Nmn, weights_N))
    kept = values_r > RANK_TOLERANCE * values_r[0]
    if not kept.any():
        return np.zeros(deltas_Nmn.shape[1:], np.float32)
    return np.float32(values_r[kept].mean()) * (left_mr[:, kept] @ right_rn[kept])


def iso_cts(deltas_Nmn: Matrix, weights_N: NDArray[np.float64], options: SpectralOptions) -> Matrix:
    """
    Iso-CTS (arXiv 2502.04959): `density` of the directions from the sum, the others from what each expert has outside
    of these; made orthogonal, with one singular value for all.

    Every expert gets the same number of directions, rounded to the nearest. Directions without a singular value, of
    low-rank deltas, are left out.
    """
    n_experts = len(deltas_Nmn)
    left_mr, values_r, right_rn = svd(_sum(deltas_Nmn, weights_N))
    rank = len(values_r)
    each = min(rank // n_experts, round((rank - int(options.density * rank)) / n_experts))
    common = rank - n_experts * each
    parts = [(left_mr[:, :common], values_r[:common], right_rn[:common])]
    for delta_mn, weight in zip(deltas_Nmn, weights_N):
        own_mn = delta_mn - parts[0][0] @ (parts[0][0].T @ delta_mn)
        left, values, right = svd(own_mn)
        parts.append((left[:, :each], values[:each] * np.float32(n_experts * weight), right[:each]))
    directions = _orthogonal(parts)
    if directions is None:
        return np.zeros(deltas_Nmn.shape[1:], np.float32)
    left, values, right = directions
    return np.float32(values.mean()) * (left @ right)


def swudi(deltas_Nmn: Matrix, weights_N: NDArray[np.float64], options: SpectralOptions) -> Matrix:
    r"""
    SWUDI (arXiv 2606.07289): gradient descent on WUDI's objective, stopped early, in closed form.

    WUDI (arXiv 2503.08099) minimises \(\sum_i |(\tau - \tau_i)\tau_i^T|^2 / |\tau_i|^2\) from
    \(\tau = \sum_i \tau_i\). With \(C = \sum_i \tau_i^T\tau_i/|\tau_i|^2 = V \Lambda V^T\) and
    \(D = \sum_i \tau_i\tau_i^T\tau_i/|\tau_i|^2\), t small steps lead to
    \(\tau - \tau V f V^T + D V (f/\Lambda) V^T\), \(f = 1 - e^{-t\Lambda}\), where only the `density` share of
    directions with the largest \(\Lambda\) is moved. An expert of zero norm is left out.
    """
    n_experts, _, cols = deltas_Nmn.shape
    norms_N = np.array([np.linalg.norm(delta) for delta in deltas_Nmn])
    factors_N = np.divide(n_experts * weights_N, norms_N**2, out=np.zeros(n_experts), where=norms_N > 0)
    gram_nn = np.zeros((cols, cols), np.float32)
    pull_mn = np.zeros(deltas_Nmn.shape[1:], np.float32)
    for delta_mn, factor in zip(deltas_Nmn, factors_N.astype(np.float32)):
        own_nn = factor * (delta_mn.T @ delta_mn)
        gram_nn += own_nn
        pull_mn += delta_mn @ own_nn
    values_n, vectors_nn = np.linalg.eigh(gram_nn)  # ascending
    moved = max(1, int(options.density * cols))
    vectors_nr, values_r = vectors_nn[:, -moved:], np.maximum(values_n[-moved:].astype(np.float64), 0.0)
    shares_r = -np.expm1(-options.descent_steps * values_r)
    inverse_r = np.divide(shares_r, values_r, out=np.full(moved, options.descent_steps), where=values_r > 0)
    start_mn = _sum(deltas_Nmn, weights_N)
    change_mr = (pull_mn @ vectors_nr) * inverse_r.astype(np.float32)
    change_mr -= (start_mn @ vectors_nr) * shares_r.astype(np.float32)
    return start_mn + change_mr @ vectors_nr.T


def res_merge(deltas_Nmn: Matrix, weights_N: NDArray[np.float64], options: SpectralOptions) -> Matrix:
    r"""
    ResMerge (arXiv 2606.02252): every delta without its first singular direction is merged on the sphere; the mean of
    the first directions comes back in proportion to how well they agree.

    With R_i the rests, q the direction of their normalised sum and c the mean cosine to it, the rest is
    \(c^\beta \cdot\) (mean norm) q, \(\beta = 1 - 0.3 s\), \(s\) the mean of \((c+1)/2\) and of the same of the mean
    pairwise cosine; it is the plain mean where c is no larger than for unrelated ones, \(1/\sqrt N\). The first
    directions add \(0.2 \cdot\) (mean positive cosine) \(\cdot\) (norm of the rest) along their mean.
    """
    n_experts, rows, cols = deltas_Nmn.shape
    heads, rests = np.empty_like(deltas_Nmn), np.empty_like(deltas_Nmn)
    for delta_mn, head_mn, rest_mn in zip(deltas_Nmn, heads, rests):
        left_mr, values_r, right_rn = svd(delta_mn)
        head_mn[:] = values_r[0] * np.outer(left_mr[:, 0], right_rn[0])
        rest_mn[:] = delta_mn - head_mn
    weights = weights_N.astype(np.float32)
    merged_mn = _on_sphere(rests.reshape(n_experts, -1), weights).reshape(rows, cols)
    mean_head = np.tensordot(weights, heads, axes=1)
    head_norm = float(np.linalg.norm(mean_head))
    agreement = _mean_cosine(heads.reshape(n_experts, -1), positive=True)
    if head_norm > 0 and agreement > 0:
        merged_mn = merged_mn + mean_head * np.float32(0.2 * agreement * float(np.linalg.norm(merged_mn)) / head_norm)
    return merged_mn


def knots(deltas_Nmn: Matrix, weights_N: NDArray[np.float64], options: SpectralOptions) -> Matrix:
    r"""
    KnOTS with TIES (arXiv 2410.19735): TIES on the deltas in directions that all of them share.

    With \([\tau_1 \dots \tau_N] = U \Sigma [V_1 \dots V_N]\), the \(V_i\) are trimmed to the `density` share of their
    largest elements, the experts vote on the sign of every element, and those on the winning side are averaged; the
    result is \(U \Sigma V\). Directions without a singular value are left out.
    """
    n_experts, rows, cols = deltas_Nmn.shape
    left_mr, values_r, right = svd(np.concatenate(list(deltas_Nmn), axis=1))
    kept_r = values_r > RANK_TOLERANCE * values_r[0]
    if not kept_r.any():
        return np.zeros((rows, cols), np.float32)
    count = max(1, int(options.density * np.count_nonzero(kept_r) * cols))
    parts = np.split(right[kept_r], n_experts, axis=1)  # views; trimmed in place
    vote_rn = np.zeros((np.count_nonzero(kept_r), cols), np.float32)
    for part_rn, weight in zip(parts, weights_N.astype(np.float32)):
        sizes_rn = np.abs(part_rn)
        threshold = np.partition(sizes_rn.reshape(-1), sizes_rn.size - count)[sizes_rn.size - count]
        part_rn[sizes_rn < threshold] = 0.0
        vote_rn += weight * part_rn
    sign_rn = np.where(vote_rn >= 0, np.float32(1.0), np.float32(-1.0))
    total_rn, share_rn = np.zeros_like(vote_rn), np.zeros_like(vote_rn)
    for part_rn, weight in zip(parts, weights_N.astype(np.float32)):
        agrees_rn = part_rn * sign_rn > 0
        total_rn += np.where(agrees_rn, weight * part_rn, np.float32(0.0))
        share_rn += np.where(agrees_rn, weight, np.float32(0.0))
    mean_rn = np.divide(total_rn, share_rn, out=total_rn, where=share_rn > 0)
    merged: Matrix = (left_mr[:, kept_r] * values_r[kept_r]) @ mean_rn
    return merged


def opcm(deltas_Nmn: Matrix, weights_N: NDArray[np.float64], options: SpectralOptions) -> Matrix:
    r"""
    OPCM (arXiv 2501.09522, section 4): what a new expert adds to the merge so far, without what would disturb it.

    The first delta is the merge so far, D, the second that of the new expert; N times their weighted sum is returned,
    \(2 (w_1 D + w_2 \tilde\tau)\), with \(\tilde\tau\) from [`without_disturbance`]. What w and `scale` are,
    `weighting.continual` finds out.
    """
    merged_mn, new_mn = deltas_Nmn
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
    kept = values_r > RANK_TOLERANCE * values_r[0]
    left_mr, values_r, right_rn = left_mr[:, kept], values_r[kept], right_rn[kept]
    # With rounding, a share of 1 must be all.
    leading = int(np.count_nonzero(np.cumsum(values_r, dtype=np.float64) <= share * (1 + 1e-6) * values_r.sum()))
    block_rr = left_mr[:, :leading].T @ new_mn @ right_rn[:leading].T
    own_r = np.einsum("mr,mn,rn->r", left_mr[:, leading:], new_mn, right_rn[leading:], optimize=True)
    rest: Matrix = new_mn - left_mr[:, :leading] @ block_rr @ right_rn[:leading]
    return rest - (left_mr[:, leading:] * own_r) @ right_rn[leading:]


def _on_sphere(rests_ND: Matrix, weights: Matrix) -> Matrix:
    """Merge the rests of `res_merge`."""
    norms_N = np.linalg.norm(rests_ND, axis=1)
    units_ND = rests_ND / np.where(norms_N > 0, norms_N, 1.0)[:, None]
    sum_D = weights @ units_ND
    length = float(np.linalg.norm(sum_D))
    coherence = float(weights @ (units_ND @ sum_D)) / length if length > 0 else 0.0
    if coherence <= 1.0 / math.sqrt(len(rests_ND)):
        mean: Matrix = weights @ rests_ND
        return mean
    score = 0.5 * ((_mean_cosine(rests_ND) + 1.0) / 2.0 + (coherence + 1.0) / 2.0)
    target = coherence ** (1.0 - 0.3 * score) * float(weights @ norms_N)
    merged: Matrix = sum_D * np.float32(target / length)
    return merged


def _mean_cosine(vectors_ND: Matrix, *, positive: bool = False) -> float:
    """Return the mean cosine over pairs of vectors that are not zero; of pairs at obtuse angles 0 if `positive`."""
    norms_N = np.linalg.norm(vectors_ND, axis=1)
    used = vectors_ND[norms_N > 0] / norms_N[norms_N > 0, None]
    if len(used) < 2:
        return 1.0 if len(used) or not positive else 0.0
    cosines = (used @ used.T)[np.triu_indices(len(used), 1)]
    return float(np.maximum(cosines, 0.0).mean() if positive else cosines.mean())


def _sum(deltas_Nmn: Matrix, weights_N: NDArray[np.float64]) -> Matrix:
    total = np.zeros(deltas_Nmn.shape[1:], np.float32)
    for delta_mn, factor in zip(deltas_Nmn, (len(deltas_Nmn) * weights_N).astype(np.float32)):
        total += factor * delta_mn
    return total


def svd(matrix_mn: Matrix) -> tuple[Matrix, Matrix, Matrix]:
    """Return left singular vectors, singular values and right singular vectors, the largest first."""
    left, values, right = np.linalg.svd(matrix_mn, full_matrices=False)
    return left, values, right


def _orthogonal(parts: list[tuple[Matrix, Matrix, Matrix]]) -> tuple[Matrix, Matrix, Matrix] | None:
    """
    Join directions (left vectors, values, right vectors) and replace the vectors by the nearest orthonormal ones.

    Directions without a value are left out; `None` if no other is left.
    """
    values = np.concatenate([part[1] for part in parts])
    kept = values > RANK_TOLERANCE * values.max(initial=0.0)
    if not kept.any():
        return None
    left = _polar(np.concatenate([part[0] for part in parts], axis=1)[:, kept])
    right = _polar(np.concatenate([part[2] for part in parts], axis=0)[kept])
    return left, values[kept], right


def _polar(matrix: Matrix) -> Matrix:
    """Return the nearest matrix with orthonormal columns, or rows if it has fewer of these."""
    left, _, right = svd(matrix)
    nearest: Matrix = left @ right
    return nearest


RULES: dict[str, SpectralMethod] = {
    method.__name__: method for method in (tsv_m, iso_c, iso_cts, swudi, res_merge, knots, opcm)
}
