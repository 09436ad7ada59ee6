"""
Gram matrices of a few very long vectors, and short coordinate vectors that have the same Gram matrix.

Fine-tunes of one base differ by 1e-3 of their norm and less, and a Gram matrix of the vectors themselves squares that
away. So the matrix that travels through this package is that of `(x_0, x_1 - x_0, ..., x_{K-1} - x_0)`, here called
the difference Gram: it holds the norms and the small angles both, to full relative accuracy.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from hf_frmerge.geometry.sphere import Array, norms

# Shape suffixes: K = number of vectors, M = number of blocks.

# A residual below this many roundings of a unit diagonal, per vector, is rounding: the vector depends on earlier ones.
_RANK_ROUNDINGS = 4.0
# Four times the relative error, 1e-6, that the fast kernels promise of a Gram matrix; elimination adds some. An inner
# product may exceed what the norms allow (Cauchy and Schwarz) by this much and no more: unbounded, noise divided by a
# pivot of noise can be of any size. The matrix of the points is never farther off than about this.
_GRAM_NOISE = 4e-6
# Matrix entries factored at a time, 1 MiB of float64: fits a core's second-level cache.
_SLAB_ELEMENTS = 1 << 17


def difference_gram(arrays: Sequence[NDArray[np.floating]], chunk: int = 1 << 18) -> Array:
    """
    Gram matrix of the first array and of the differences of all others to it, in float64 throughout.

    This is the reference the fast kernels are held to. Memory is `len(arrays) * chunk` float64 values, whatever the
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
    Gram matrix of the differences `(x_1 - x_0, ..., x_{K-1} - x_0)`: the points of delta space when `x_0` is the base.

    Args:
        differences (`np.ndarray`): Gram matrix of `(x_0, x_1 - x_0, ...)`, `(..., K, K)`, float64.

    Returns:
        `np.ndarray`: `(..., K-1, K-1)`, float64, a view.
    """
    return differences[..., 1:, 1:]


def embed(gram: Array) -> Array:
    """
    Find coordinates with the given Gram matrix: `points @ points.T == gram`.

    Diagonally pivoted Cholesky of the matrix scaled to unit diagonal, all blocks at once. The scaling keeps the
    relative accuracy of short vectors beside long ones; the pivoting keeps noise at its own size, also where it has
    made the matrix slightly indefinite; and equal rows of `gram` give bit-equal rows of points, zero rows zero rows.

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

    Each difference is placed to its own relative accuracy and only then added to `x_0`, so that an angle of 1e-6 rad
    between two points comes out with about ten digits. If `x_0` is zero the first axis is empty. A point shorter than
    the rounding of `x_0` is zero.

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
    # A zero vector is x_0 and a difference that cancels it; what rounding leaves is not a direction.
    others[norms(others) <= rounding] = 0.0
    return placed


def _pivoted_cholesky(gram: Array, first_pivot: int | None) -> Array:
    # Blocks last: with millions of 3 x 3 matrices, numpy is fast only when its inner loop runs over the blocks.
    # Slab by slab: the work then stays in cache, and its memory does not grow with the number of blocks.
    n = gram.shape[-1]
    gram_KKM = np.moveaxis(gram.reshape(-1, n, n), 0, -1)
    factor_KKM = np.empty(gram_KKM.shape)
    slab = max(_SLAB_ELEMENTS // (n * n), 1)
    for start in range(0, gram_KKM.shape[-1], slab):
        here = slice(start, start + slab)
        factor_KKM[..., here] = _factor_slab(np.array(gram_KKM[..., here], dtype=np.float64, order="C"), first_pivot)
    return np.moveaxis(factor_KKM, -1, 0).reshape(gram.shape)


def _factor_slab(left_KKM: Array, first_pivot: int | None) -> Array:
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
        safe_M = np.where(height_M > floor, height_M, np.inf)
        inner_KM = left_KKM[:, pivot_M, block_M]
        # Vectors that coincide with the pivot in what is left are finished: equal vectors stay equal bit by bit.
        finished_KM = (inner_KM == height_M) & (diagonal_KM == height_M)
        bound_KM = np.sqrt((np.maximum(diagonal_KM, 0.0) + _GRAM_NOISE) * height_M)
        inner_KM = np.minimum(np.maximum(inner_KM, -bound_KM), bound_KM)
        ratio_KM = inner_KM / safe_M
        factor_KKM[:, step] = ratio_KM * np.sqrt(height_M)
        left_KKM -= ratio_KM[:, None] * inner_KM
        left_KKM.swapaxes(1, 2)[finished_KM] = 0.0
    return factor_KKM * scale_KM[:, None]
