"""
Low-rank matrices held as factors, `x = scale * B @ A`: inner products, sums, recompression.

No function builds a dense `(m, n)` matrix. Factors of any floating dtype are first widened to float64. A module that
an adapter does not change is a pair of rank 0.

The functions that return Gram matrices take the matrix product as an argument. Its order of summation decides the last
bits of the Gram matrix, and so of the coefficients: a merge passes `kernels.product.product`, which has a fixed order;
where the last bits do not matter, `np.matmul` will do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hf_frmerge.geometry.portable import Array, fold
from hf_frmerge.geometry.sphere import combine, dot

# Shape suffixes: N = number of low-rank matrices, R = sum of their ranks, r = one rank, m and n = rows and columns of
# the product.


Product = Callable[[Array, Array], Array]
"""`(m, k)` and `(k, n)` to `(m, n)`, float64."""


class Factors(NamedTuple):
    """One low-rank matrix, `scale * B @ A`."""

    B: NDArray[np.floating]  # (m, r)
    A: NDArray[np.floating]  # (r, n)
    scale: float = 1.0


def factor_gram(factors: Sequence[Factors], product: Product) -> Array:
    r"""
    Compute the Gram matrix of low-rank matrices from their factors.

    \(\langle s_i B_i A_i, s_j B_j A_j\rangle = s_i s_j \sum (B_i^\top B_j) \circ (A_i A_j^\top)\). Two products of the
    stacked factors, `(R, R)` each, give the blocks of all pairs.

    Args:
        factors (`Sequence[Factors]`): N pairs `B` `(m, r_i)` and `A` `(r_i, n)` with their scales.
        product (`Product`): Matrix product; its order of summation decides the last bits.

    Returns:
        `np.ndarray`: `(N, N)`, float64.

    Raises:
        ValueError: If there is no pair, or the shapes do not fit.

    Example:
    ```python
    >>> import numpy as np
    >>> rank_one = Factors(np.array([[1.0], [2.0]]), np.array([[3.0, 4.0]]), scale=2.0)
    >>> factor_gram([rank_one], np.matmul).tolist(), float(np.sum((2.0 * rank_one.B @ rank_one.A) ** 2))
    ([[500.0]], 500.0)

    ```
    """
    B_mR, A_Rn, owner_NR = stack_factors(factors)
    inner_RR = product(B_mR.T, B_mR) * product(A_Rn, A_Rn.T)
    return product(product(owner_NR, inner_RR), owner_NR.T)


def base_gram(base_rows: Iterable[NDArray[np.floating]], factors: Sequence[Factors], product: Product) -> Array:
    r"""
    Compute the difference Gram of `(W_0, W_0 + x_1, ..., W_0 + x_N)`, reading the dense `W_0` once, in row chunks.

    \(\langle W_0, s B A\rangle = s \sum (B^\top W_0) \circ A\). Pass the result to [`embed_differences`] for means in
    weight space. Such a mean is not a low-rank update of `W_0`, since the coefficients do not sum to 1.

    Args:
        base_rows (`Iterable[np.ndarray]`): Consecutive row chunks of `W_0`, `(rows, n)`, of any floating dtype.
        factors (`Sequence[Factors]`): N pairs `B` `(m, r_i)` and `A` `(r_i, n)` with their scales.
        product (`Product`): Matrix product; its order of summation decides the last bits.

    Returns:
        `np.ndarray`: Gram matrix of `(W_0, x_1, ..., x_N)`, `(N + 1, N + 1)`, float64.

    Raises:
        ValueError: If the chunks do not have `m` rows of `n` elements in all.
    """
    B_mR, A_Rn, owner_NR = stack_factors(factors)
    gram = np.zeros((len(factors) + 1, len(factors) + 1))
    gram[1:, 1:] = factor_gram(factors, product)
    inner_R = np.zeros(len(A_Rn))
    row = 0
    for chunk in base_rows:
        W_kn = np.asarray(chunk, dtype=np.float64)
        if W_kn.ndim != 2 or W_kn.shape[1] != A_Rn.shape[1] or row + len(W_kn) > len(B_mR):
            raise ValueError(
                f"Rows of the base must be {len(B_mR)} x {A_Rn.shape[1]} in all, got a chunk of shape {W_kn.shape} "
                f"at row {row}."
            )
        gram[0, 0] += fold(dot(W_kn, W_kn))
        inner_R += dot(product(B_mR[row : row + len(W_kn)].T, W_kn), A_Rn)
        row += len(W_kn)
    if row != len(B_mR):
        raise ValueError(f"Rows of the base must be {len(B_mR)} in all, got {row}.")
    gram[0, 1:] = gram[1:, 0] = dot(owner_NR, inner_R)
    return gram


def concatenate(factors: Sequence[Factors], coefficients: Array) -> Factors:
    """
    Write the weighted sum of low-rank matrices, exactly, as one pair of rank `R`.

    Args:
        factors (`Sequence[Factors]`): N pairs `B` `(m, r_i)` and `A` `(r_i, n)` with their scales.
        coefficients (`np.ndarray`): `(N,)`.

    Returns:
        `Factors`: `B` `(m, R)` carrying coefficients and scales, `A` `(R, n)`, scale 1; float64.

    Raises:
        ValueError: If the shapes do not fit.
    """
    B_mR, A_Rn, owner_NR = stack_factors(factors)
    B_mR *= combine(np.asarray(coefficients, dtype=np.float64), owner_NR)
    return Factors(B_mR, A_Rn)


def recompress(pair: Factors, rank: int | None = None, energy: float | None = None) -> tuple[Factors, float]:
    """
    Approximate a low-rank matrix by one of smaller rank (Eckart and Young), and return the relative error.

    Two thin QR factorisations and one SVD of an `(R, R)` matrix. Each factor takes `sqrt(S)`, so that both have the
    same scale. QR and SVD come from LAPACK, so the last bits of the new factors and the signs of their columns may
    differ from one machine to another; the coefficients of the merge do not.

    Args:
        pair (`Factors`):
            `B` `(m, R)`, `A` `(R, n)`.
        rank (`int`, *optional*):
            Keep at most this many singular values.
        energy (`float`, *optional*):
            Keep as few singular values as hold this share of the squared norm, in `(0, 1]`. With neither, all are
            kept; with both, the smaller rank counts.

    Returns:
        `tuple[Factors, float]`: `B'` `(m, r)` and `A'` `(r, n)` with scale 1, float64, `1 <= r`; and the norm of the
        discarded singular values over that of all, 0 for a zero matrix.

    Raises:
        ValueError: If `rank` is below 1, `energy` outside `(0, 1]`, or the pair itself has rank 0.

    Example:
    ```python
    >>> import numpy as np
    >>> pair = Factors(np.diag([3.0, 4.0]), np.eye(2))
    >>> smaller, error = recompress(pair, rank=1)
    >>> (smaller.B @ smaller.A).round(12).tolist(), round(error, 12)  # 3 of norm 5 is lost
    ([[0.0, 0.0], [0.0, 4.0]], 0.6)

    ```
    """
    B_mR, A_Rn = _checked(pair, rank, energy)
    Q_B, triangle_B = np.linalg.qr(B_mR)
    Q_A, triangle_A = np.linalg.qr(A_Rn.T)
    U, S, Vt = np.linalg.svd(triangle_B @ triangle_A.T, full_matrices=False)
    keep, error = _cut(S, rank, energy)
    root = np.sqrt(S[:keep])
    return Factors(Q_B @ (U[:, :keep] * root), (Vt[:keep] * root[:, None]) @ Q_A.T), error


def kept_rank(pair: Factors, rank: int | None = None, energy: float | None = None) -> int:
    """
    Return the rank that [`recompress`] gives with the same arguments, in less than half its time.

    The singular values need the triangles of the QR factorisations only; forming the orthogonal factors is most of
    the work. Raises what `recompress` raises.
    """
    B_mR, A_Rn = _checked(pair, rank, energy)
    # numpy's types do not know that this mode returns one array.
    triangle_B, triangle_A = (np.asarray(np.linalg.qr(matrix, mode="r")) for matrix in (B_mR, A_Rn.T))
    # With vectors, though they are not needed: without them LAPACK takes another algorithm, and last bits differ.
    return _cut(np.linalg.svd(triangle_B @ triangle_A.T, full_matrices=False)[1], rank, energy)[0]


def _checked(pair: Factors, rank: int | None, energy: float | None) -> tuple[Array, Array]:
    """Return `scale * B` and `A` as float64, not copied if they are; raise if an argument of `recompress` is wrong."""
    _check_shapes([pair])
    B_mR, A_Rn = np.asarray(pair.B, dtype=np.float64), np.asarray(pair.A, dtype=np.float64)
    if min(*B_mR.shape, *A_Rn.shape) < 1 or (rank is not None and rank < 1):
        raise ValueError(f"`rank` must be at least 1, got rank={rank} for factors {B_mR.shape} and {A_Rn.shape}.")
    if energy is not None and not 0.0 < energy <= 1.0:
        raise ValueError(f"`energy` must be in (0, 1], got {energy}.")
    return B_mR if pair.scale == 1.0 else B_mR * pair.scale, A_Rn


def _cut(S: Array, rank: int | None, energy: float | None) -> tuple[int, float]:
    """Return how many singular values are kept, and the relative norm of the others."""
    # left[r] is the squared norm of the singular values after the first r. Summed from the smallest up: subtracting
    # the kept part from the total would lose small remainders to cancellation.
    left = np.append(np.cumsum((S * S)[::-1])[::-1], 0.0)
    keep = len(S) if rank is None else min(rank, len(S))
    if energy is not None:
        keep = min(keep, max(int(np.argmax(left <= (1.0 - energy) * left[0])), 1))
    return keep, float(np.sqrt(left[keep] / left[0])) if left[0] > 0 else 0.0


def stack_factors(factors: Sequence[Factors]) -> tuple[Array, Array, Array]:
    """
    Stack all pairs to one `B` `(m, R)` and one `A` `(R, n)`.

    The third array returned, `(N, R)`, says which rank belongs to which pair: `owner[i, k]` is the scale of pair `i`
    if rank `k` belongs to it, else 0.
    """
    _check_shapes(factors)
    ranks = [pair.A.shape[0] for pair in factors]
    owner_NR = np.repeat(np.diag([float(pair.scale) for pair in factors]), ranks, axis=1)
    # Widened while they are copied: as arrays of their own the wide factors took as much memory again, and 7 times
    # as long.
    B_mR = np.concatenate([pair.B for pair in factors], axis=1, dtype=np.float64)
    return B_mR, np.concatenate([pair.A for pair in factors], axis=0, dtype=np.float64), owner_NR


def _check_shapes(factors: Sequence[Factors]) -> None:
    if not factors:
        raise ValueError("`factors` must hold at least one pair, got none.")
    shapes = [(pair.B.shape, pair.A.shape) for pair in factors]
    m, n = shapes[0][0][0], shapes[0][1][-1]
    for b, a in shapes:
        if len(b) != 2 or len(a) != 2 or b[1] != a[0] or b[0] != m or a[1] != n:
            raise ValueError(f"Factors must be ({m}, r) and (r, {n}) for every pair, got {shapes}.")
