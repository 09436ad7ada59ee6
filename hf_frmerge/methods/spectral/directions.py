"""Methods that choose among singular directions, and how strong each is: TSV-Merge, Iso-C and Iso-CTS."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hf_frmerge.methods.spectral.algebra import join, svd
from hf_frmerge.methods.spectral.inputs import Experts, Matrix, SpectralOptions


def tsv_m(experts: Experts, weights_N: NDArray[np.float64], options: SpectralOptions) -> Matrix:
    """
    TSV-Merge (arXiv 2412.00081): the leading 1/N of every delta's singular vectors, made orthogonal to each other.

    The left vectors of all experts together are replaced by the nearest orthonormal ones, and so are the right ones;
    the singular values stay. For deltas whose leading vectors are orthogonal between experts this is their sum.
    Directions without a singular value, of low-rank deltas, are left out: they would turn the others.
    """
    n_experts = len(weights_N)
    rank = max(1, min(experts.full_shape) // n_experts)
    joined = join([svd(delta, rank).times(n_experts * weight) for delta, weight in zip(experts.deltas, weights_N)])
    if joined is None:
        return experts.zero()
    scaled: Matrix = np.multiply(joined.left, joined.values, dtype=np.float32)
    return scaled @ joined.right


def iso_c(experts: Experts, weights_N: NDArray[np.float64], options: SpectralOptions) -> Matrix:
    """
    Iso-C (arXiv 2502.04959): the sum of the deltas with all singular values replaced by their mean.

    Directions in which the sum is zero, as with low-rank deltas, stay zero and are not counted: their singular vectors
    would be noise.
    """
    left_mr, values_r, right_rn = svd(experts.sum(weights_N))
    if not len(values_r):
        return experts.zero()
    return np.float32(values_r.mean()) * (left_mr @ right_rn)


def iso_cts(experts: Experts, weights_N: NDArray[np.float64], options: SpectralOptions) -> Matrix:
    """
    Iso-CTS (arXiv 2502.04959): `density` of the directions from the sum, the others from what each expert has outside
    of these; made orthogonal, with one singular value for all.

    Every expert gets the same number of directions, rounded to the nearest. Directions without a singular value, of
    low-rank deltas, are neither counted nor used.
    """
    n_experts = len(weights_N)
    sums = svd(experts.sum(weights_N))
    rank = len(sums.values)
    each = min(rank // n_experts, round((rank - int(options.density * rank)) / n_experts))
    common = sums.leading(rank - n_experts * each)
    parts = [common]
    for delta_mn, weight in zip(experts.deltas, weights_N):
        own_mn = delta_mn - common.left @ (common.left.T @ delta_mn)
        parts.append(svd(own_mn, each).times(n_experts * weight))
    joined = join(parts)
    if joined is None:
        return experts.zero()
    return np.float32(joined.values.mean()) * (joined.left @ joined.right)
