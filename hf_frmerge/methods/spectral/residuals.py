"""A method that merges on the sphere what is left of the deltas without their strongest directions: ResMerge."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from hf_frmerge.methods.spectral.algebra import svd
from hf_frmerge.methods.spectral.inputs import Experts, Matrix, SpectralOptions


def res_merge(experts: Experts, weights_N: NDArray[np.float64], options: SpectralOptions) -> Matrix:
    r"""
    ResMerge (arXiv 2606.02252): every delta without its first singular direction is merged on the sphere; the mean of
    the first directions comes back in proportion to how well they agree.

    With R_i the rests, q the direction of their normalised sum and c the mean cosine to it, the rest is
    \(c^\beta \cdot\) (mean norm) q, \(\beta = 1 - 0.3 s\), \(s\) the mean of \((c+1)/2\) and of the same of the mean
    pairwise cosine; it is the plain mean where c is no larger than for unrelated ones, \(1/\sqrt N\). The first
    directions add \(0.2 \cdot\) (mean positive cosine) \(\cdot\) (norm of the rest) along their mean.
    """
    n_experts, rows, cols = experts.deltas.shape
    heads, rests = np.empty_like(experts.deltas), np.empty_like(experts.deltas)
    for delta_mn, head_mn, rest_mn in zip(experts.deltas, heads, rests):
        left_mr, values_r, right_rn = svd(delta_mn, 2)
        head_mn[:] = (left_mr[:, :1] * values_r[:1]) @ right_rn[:1]
        rest_mn[:] = delta_mn - head_mn if len(values_r) > 1 else 0.0  # of rank 1: rounding errors
    weights = weights_N.astype(np.float32)
    merged_mn = _on_sphere(rests.reshape(n_experts, -1), weights).reshape(rows, cols)
    mean_head = np.tensordot(weights, heads, axes=1)
    head_norm = float(np.linalg.norm(mean_head))
    agreement = _mean_cosine(heads.reshape(n_experts, -1), positive=True)
    if head_norm > 0 and agreement > 0:
        merged_mn = merged_mn + mean_head * np.float32(0.2 * agreement * float(np.linalg.norm(merged_mn)) / head_norm)
    return merged_mn


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
