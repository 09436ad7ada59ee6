"""Matrix products with the same bits on every machine; a BLAS adds in an order that depends on the processor."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

try:
    from hf_frmerge.kernels import _native
    from hf_frmerge.kernels.native import available_level
except ImportError:  # the extension was not built
    _native = None  # type: ignore[assignment]

Scalar = TypeVar("Scalar", np.float32, np.float64)

_ROWS = 1 << 15  # elements of the result that numpy works on at a time, so that they stay in a core's cache


def product(left: NDArray[Scalar], right: NDArray[Scalar]) -> NDArray[Scalar]:
    """
    Return `left @ right`, adding in the order of the inner dimension with a rounding after each operation.

    The bits are the same at every instruction-set level and in numpy, which is used if the extension was not built and
    is some tens of times slower. An element depends only on its row and its column. The product of a matrix and its
    own transpose (`x @ x.T`, on the same memory) takes half the work. Runs on the calling thread, without the GIL.

    Args:
        left (`np.ndarray`): `(m, k)`, float32 or float64, with any strides.
        right (`np.ndarray`): `(k, n)`, of the same dtype.

    Returns:
        `np.ndarray`: `(m, n)`, of that dtype, C order.

    Raises:
        ValueError: If shapes or dtypes do not fit.
    """
    if _native is None:
        return elementwise_product(left, right)
    out = np.empty((left.shape[0], right.shape[-1]), left.dtype)
    _native.matmul(available_level(), left, right, out)
    return out


def elementwise_product(left: NDArray[Scalar], right: NDArray[Scalar]) -> NDArray[Scalar]:
    """
    Compute `product` in numpy.

    One row of `right` at a time, elementwise: IEEE 754 fixes the result of each addition and multiplication, so the
    bits are those of the native product.
    """
    if left.ndim != 2 or right.ndim != 2 or left.shape[1] != right.shape[0] or left.dtype != right.dtype:
        raise ValueError(
            f"left and right must be of one type and (m, k) and (k, n), got {left.dtype} {left.shape} and "
            f"{right.dtype} {right.shape}"
        )
    out = np.zeros((left.shape[0], right.shape[1]), left.dtype)
    step = max(1, _ROWS // max(1, right.shape[1]))
    term = np.empty_like(out[:step])
    for start in range(0, len(out), step):
        rows = out[start : start + step]
        for k in range(len(right)):
            rows += np.multiply(left[start : start + step, k, None], right[k], out=term[: len(rows)])
    return out
