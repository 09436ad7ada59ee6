"""Methods that trim and vote in directions that all experts share: KnOTS, TIES in Core Space and DC-Merge."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from hf_frmerge.methods.spectral.algebra import RANK_TOLERANCE, Triplets, join, svd
from hf_frmerge.methods.spectral.inputs import Experts, Matrix, SpectralOptions


def knots(experts: Experts, weights_N: NDArray[np.float64], options: SpectralOptions) -> Matrix:
    r"""
    KnOTS with TIES (arXiv 2410.19735): TIES on the deltas in directions that all of them share.

    With \([\tau_1 \dots \tau_N] = U \Sigma [V_1 \dots V_N]\), the \(V_i\) are trimmed to the `density` share of their
    largest elements, the experts vote on the sign of every element, and those on the winning side are averaged; the
    result is \(U \Sigma V\). Directions without a singular value are left out.
    """
    n_experts, _, cols = experts.deltas.shape
    left_mr, values_r, right = svd(np.concatenate(list(experts.deltas), axis=1))
    if not len(values_r):
        return experts.zero()
    count = max(1, int(options.density * len(values_r) * cols))
    parts = np.split(right, n_experts, axis=1)  # views; trimmed in place
    for part_rn in parts:
        _trim(part_rn, count)
    shared: Matrix = np.multiply(left_mr, values_r, dtype=np.float32)
    return shared @ _vote(parts, weights_N.astype(np.float32))


def core_ties(experts: Experts, weights_N: NDArray[np.float64], options: SpectralOptions) -> Matrix:
    r"""
    TIES in Core Space (arXiv 2509.17786): TIES on the cores of low-rank deltas.

    With \(U\) the left singular vectors of all left factors side by side, \(V\) the right singular vectors of all
    right factors, the cores \(M_i = U^T \tau_i V\) are trimmed to the `density` share of their largest elements, the
    experts vote on the sign of every element, and those on the winning side are averaged, M; the result is
    \(U M V^T\). Directions that no expert has, as of factors that depend on each other, are neither counted nor used.
    """
    sizes = np.abs(experts.deltas).max(axis=0)
    rows, cols = (sizes.max(axis=axis) > RANK_TOLERANCE * sizes.max() for axis in (1, 0))
    merged = experts.zero()
    if rows.any():
        used = np.ix_(rows, cols)
        parts = [core[used] for core in experts.deltas]  # copies; trimmed in place
        for part in parts:
            _trim(part, max(1, int(options.density * part.size)))
        merged[used] = _vote(parts, weights_N.astype(np.float32))
    return merged


def dc_merge(experts: Experts, weights_N: NDArray[np.float64], options: SpectralOptions) -> Matrix:
    r"""
    DC-Merge (arXiv 2603.06242): the leading 1/N directions of every delta, voted on in orthonormal directions.

    With \(U, V\) the nearest orthonormal vectors to the singular vectors of all experts together, every delta becomes
    \(M_i = U^T \tau_i V\), of which the `density` share of largest elements is kept. The experts vote on the sign of
    every element, those on the winning side are averaged, what relates a direction of one expert to one of another is
    dropped, and the rest M gives \(U M V^T\). As in the authors' experiments, the singular values of a delta whose
    directions are all kept, which is one of low rank, are replaced by their mean, so that weak ones count; those of
    other deltas stay.

    At least as many elements are kept as an expert has directions: with few experts of low rank the authors' share,
    chosen for eight, would drop whole directions. Deltas are weighted before the vote.
    """
    n_experts = len(weights_N)
    most = max(1, min(experts.full_shape) // n_experts)
    parts = [_smoothed(svd(delta, most + 1), most).times(n_experts * w) for delta, w in zip(experts.deltas, weights_N)]
    joined = join(parts)
    if joined is None:
        return experts.zero()
    rank = len(joined.values)
    aligned = []
    for part in parts:
        own_rr = (joined.left.T @ part.left * part.values) @ (part.right @ joined.right.T)
        _trim(own_rr, max(1, int(np.count_nonzero(part.values)), int(options.density * rank**2)))
        aligned.append(own_rr)
    merged_rr = _vote(aligned, np.ones(n_experts, np.float32))
    merged_rr[joined.owner[:, None] != joined.owner] = 0.0
    merged: Matrix = joined.left @ merged_rr.astype(np.float32, copy=False) @ joined.right
    return merged


def _smoothed(triplets: Triplets, most: int) -> Triplets:
    """Return at most `most` of one more directions; with equal values if there are no more."""
    rank = len(triplets.values)
    kept = triplets.leading(most)
    return kept._replace(values=np.full_like(kept.values, kept.values.mean())) if 0 < rank <= most else kept


def _trim(values: Matrix, count: int) -> None:
    """Set all but the `count` largest magnitudes to zero, in place; those equal to the smallest of these stay."""
    if count < values.size:
        sizes = np.abs(values)
        values[sizes < np.partition(sizes.reshape(-1), sizes.size - count)[sizes.size - count]] = 0.0


def _vote(parts: Sequence[Matrix], weights_N: Matrix) -> Matrix:
    """Return the weighted mean of the elements whose sign is that of the weighted sum, + if that is 0."""
    sums = np.zeros_like(parts[0])
    for part, weight in zip(parts, weights_N):
        sums += weight * part
    sign = np.where(sums >= 0, np.float32(1.0), np.float32(-1.0))
    total, share = np.zeros_like(sign), np.zeros_like(sign)
    for part, weight in zip(parts, weights_N):
        agrees = part * sign > 0
        total += np.where(agrees, weight * part, np.float32(0.0))
        share += np.where(agrees, weight, np.float32(0.0))
    mean: Matrix = np.divide(total, share, out=total, where=share > 0)
    return mean
