"""
Gram matrices of a few very long vectors, and short coordinate vectors that have the same Gram matrix.

Fine-tunes of one base differ by 1e-3 of their norm or less. In a Gram matrix of the vectors themselves that difference
enters squared, as 1e-6 of the entries, and is lost to rounding. This package therefore uses the Gram matrix of
`(x_0, x_1 - x_0, ..., x_{K-1} - x_0)`, called the difference Gram: it holds both the norms and the small angles, to
full relative accuracy.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from hf_frmerge.geometry.sphere import Array, norms

# Shape suffixes: K = number of vectors, M = number of blocks.

# Rank tolerance, in units of eps per vector on a unit diagonal: a pivot below it is rounding error, so the vector is
# a combination of the earlier ones.
_RANK_ROUNDINGS = 4.0
# How far an inner product may exceed the Cauchy-Schwarz bound. Four times the relative error of 1e-6 that the fast
# kernels promise for a Gram matrix, because elimination adds to it. Without a bound, noise divided by a pivot that is
# itself noise can be of any size. The Gram matrix of the resulting points is off by about this at most.
_GRAM_NOISE = 4e-6
# Matrix entries factored at a time, 1 MiB of float64: fits a core's second-level cache.
_SLAB_ELEMENTS = 1 << 17


def difference_gram(arrays: Sequence[NDArray[np.floating]], chunk: int = 1 << 18) -> Array:
    """
    Compute the Gram matrix of the first array and the differences of all others to it, in float64 throughout.

    The fast kernels are tested against this. It needs memory for `len(arrays) * chunk` float64 values, whatever the
    layout and size of the arrays.

    Args:
        arrays (`Sequence[np.ndarray]`):
            K arrays of one shape, of any floating dtype; mixed dtypes are fine.
        chunk (`int`, *optional*, defaults to `1 << 18`):
            Number of elements widened to float64 at a time.

    Returns:
        `np.ndarray`: `(K, K)`, float64, symmetric; entry `[0, 0]` is the squared Frobenius norm of the first array.

    Raises:
        ValueError: If there is no array, or the shapes differ.

    Example:
    ```python
    >>> import numpy as np
    >>> difference_gram([np.array([3.0, 4.0]), np.array([3.0, 4.5])]).tolist()
    [[25.0, 2.0], [2.0, 0.25]]

    ```
    """
    if not arrays:
        raise ValueError("`arrays` must hold at least one array, got none.")
    shapes = [array.shape for array in arrays]
    if any(shape != shapes[0] for shape in shapes):
        raise ValueError(f"`arrays` must have one shape, got {shapes}.")
    gram_KK = np.zeros((len(arrays), len(arrays)))
    pieces = np.nditer(
        list(arrays),
        flags=["external_loop", "buffered", "zerosize_ok"],
        op_flags=[["readonly"]] * len(arrays),
        op_dtypes=[np.float64] * len(arrays),
        order="C",
        buffersize=chunk,
    )
    for piece in pieces:
        rows = np.array(piece, dtype=np.float64, ndmin=2)  # a copy: nditer reuses its buffers
        rows[1:] -= rows[0]
        gram_KK += rows @ rows.T
    return gram_KK


def delta_gram(differences: Array) -> Array:
    """
    Return the Gram matrix of `(x_1 - x_0, ..., x_{K-1} - x_0)`; with the base as `x_0` these are the experts' deltas.

    Args:
        differences (`np.ndarray`): Gram matrix of `(x_0, x_1 - x_0, ...)`, `(..., K, K)`, float64.

    Returns:
        `np.ndarray`: `(..., K-1, K-1)`, float64, a view.
    """
    return differences[..., 1:, 1:]


def embed(gram: Array) -> Array:
    """
    Find coordinates with the given Gram matrix: `points @ points.T == gram`.

    Diagonally pivoted Cholesky of the matrix scaled to unit diagonal, all blocks at once. The scaling preserves the
    relative accuracy of short vectors beside long ones. The pivoting does not amplify noise, even where noise has made
    the matrix slightly indefinite. Equal rows of `gram` give bit-equal points, and zero rows give zero points.

    Args:
        gram (`np.ndarray`): Positive semidefinite up to rounding, `(..., N, N)`, float64.

    Returns:
        `np.ndarray`: `(..., N, N)`, float64, one point per row.

    Example:
    ```python
    >>> import numpy as np
    >>> points = embed(np.array([[4.0, 4.0, 0.0], [4.0, 4.0, 0.0], [0.0, 0.0, 0.0]]))
    >>> points.tolist()  # two equal vectors of norm 2 and a zero vector
    [[2.0, 0.0, 0.0], [2.0, 0.0, 0.0], [0.0, 0.0, 0.0]]

    ```
    """
    return _pivoted_cholesky(gram, first_pivot=None)


def embed_differences(differences: Array) -> Array:
    """
    Find coordinates of `x_0, ..., x_{K-1}` from the difference Gram, with the first axis along `x_0`.

    Each difference is embedded to its own relative accuracy and only then added to `x_0`, so that an angle of 1e-6 rad
    between two points comes out with about ten digits. If `x_0` is zero, all first coordinates are 0. A point shorter
    than the rounding error of `x_0` becomes exactly zero.

    Args:
        differences (`np.ndarray`): Gram matrix of `(x_0, x_1 - x_0, ...)`, `(..., K, K)`, float64.

    Returns:
        `np.ndarray`: `(..., K, K)`, float64, one point per row.

    Example:
    ```python
    >>> import numpy as np
    >>> from hf_frmerge.geometry.sphere import pairwise_angles
    >>> x_0 = np.array([1.0, 0.0, 0.0])
    >>> x_1 = np.array([np.cos(1e-9), np.sin(1e-9), 0.0])
    >>> angles = pairwise_angles(embed_differences(difference_gram([x_0, x_1])))
    >>> f"{angles[0, 1]:.9e}"
    '1.000000000e-09'

    ```
    """
    placed = _pivoted_cholesky(differences, first_pivot=0)
    others, first = placed[..., 1:, :], placed[..., :1, :]
    rounding = _RANK_ROUNDINGS * differences.shape[-1] * np.finfo(np.float64).eps * norms(first)
    others += first
    # A zero expert is x_0 plus a difference that cancels it. Rounding leaves a tiny vector, and a method that
    # normalises it would take a direction made of noise.
    others[norms(others) <= rounding] = 0.0
    return placed


def _pivoted_cholesky(gram: Array, first_pivot: int | None) -> Array:
    """Factor all blocks; `first_pivot` is the vector to eliminate first, `None` the longest one of each block."""
    # Block axis last: with millions of 3 x 3 matrices, numpy is fast only when its inner loop runs over the blocks.
    # One slab of blocks at a time: the work stays in cache, and memory does not grow with the number of blocks.
    n = gram.shape[-1]
    gram_KKM = np.moveaxis(gram.reshape(-1, n, n), 0, -1)
    factor_KKM = np.empty(gram_KKM.shape)
    slab = max(_SLAB_ELEMENTS // (n * n), 1)
    for start in range(0, gram_KKM.shape[-1], slab):
        part = slice(start, start + slab)
        factor_KKM[..., part] = _factor_slab(np.array(gram_KKM[..., part], dtype=np.float64, order="C"), first_pivot)
    return np.moveaxis(factor_KKM, -1, 0).reshape(gram.shape)


def _factor_slab(left_KKM: Array, first_pivot: int | None) -> Array:
    """Factor one slab; overwrites `left_KKM`, which holds the Gram matrix of what is not yet eliminated."""
    n = len(left_KKM)
    every = np.arange(n)
    scale_KM = np.sqrt(np.maximum(left_KKM[every, every], 0.0))
    inverse_KM = np.divide(1.0, scale_KM, out=np.zeros_like(scale_KM), where=scale_KM > 0)
    left_KKM *= inverse_KM[:, None]
    left_KKM *= inverse_KM

    floor = _RANK_ROUNDINGS * n * np.finfo(np.float64).eps
    factor_KKM = np.empty_like(left_KKM)
    block_M = np.arange(left_KKM.shape[-1])
    for step in range(n):
        diagonal_KM = left_KKM[every, every]
        if step == 0 and first_pivot is not None:
            pivot_M = np.full(block_M.shape, first_pivot)
        else:
            pivot_M = np.argmax(diagonal_KM, axis=0)
        height_M = np.maximum(diagonal_KM[pivot_M, block_M], 0.0)
        safe_M = np.where(height_M > floor, height_M, np.inf)  # dividing by infinity leaves zero columns
        inner_KM = left_KKM[:, pivot_M, block_M]
        # A vector whose remainder equals the pivot's is fully eliminated by this step. Its row is set to zero below
        # rather than subtracted: rounding would make copies of one vector differ in their last bits.
        finished_KM = (inner_KM == height_M) & (diagonal_KM == height_M)
        bound_KM = np.sqrt((np.maximum(diagonal_KM, 0.0) + _GRAM_NOISE) * height_M)
        inner_KM = np.minimum(np.maximum(inner_KM, -bound_KM), bound_KM)
        ratio_KM = inner_KM / safe_M
        factor_KKM[:, step] = ratio_KM * np.sqrt(height_M)
        left_KKM -= ratio_KM[:, None] * inner_KM
        left_KKM.swapaxes(1, 2)[finished_KM] = 0.0
    return factor_KKM * scale_KM[:, None]
