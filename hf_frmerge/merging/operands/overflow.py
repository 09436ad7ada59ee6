"""Errors for numbers that leave the range of a dtype: which tensor, made from what, and what helps."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hf_frmerge.checkpoints.tensors.floats import DTYPE_CODES, dtypes_that_hold, widen
from hf_frmerge.checkpoints.tensors.reader import some
from hf_frmerge.errors import NonFiniteError
from hf_frmerge.kernels.interface import Combined, Operand
from hf_frmerge.methods.table import METHODS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from hf_frmerge.kernels.interface import Kernels
    from hf_frmerge.methods.span import SpanOptions

_NAME_OF = {code: name for name, code in DTYPE_CODES.items()}

_LARGEST = {"BF16": float(0xFF << 120), "F16": 65504.0, "F32": float(np.finfo(np.float32).max)}
"""Largest number of the dtypes that are narrower than float64."""

_LEAST_SQUARES = 2.0**-900
"""Smallest reliable sum of squares: below it, squares may have lost some or all digits to underflow in float64."""


def result_overflows(
    kernels: Kernels,
    tensor: str,
    operands: Sequence[Operand],
    labels: Sequence[str],
    coefficients_BK: NDArray[np.float64],
    out_dtype: str,
) -> NonFiniteError:
    """
    Explain why a combination of finite operands is not finite. Computes the sum once more, in float64, to find out.

    Args:
        labels: Name of every operand.
        coefficients_BK: One row for every block, one column for every operand.
    """
    size = widen(operands[0].data, operands[0].dtype).size
    n_blocks = len(coefficients_BK)
    out = np.empty(size * 8, np.uint8)
    kernels.combine(operands, coefficients_BK, out, "F64", n_blocks, size // n_blocks)
    magnitudes = np.nan_to_num(np.abs(out.view(np.float64)), nan=np.inf, posinf=np.inf)
    worst = int(np.argmax(magnitudes))
    peak, row = float(magnitudes[worst]), coefficients_BK[worst // (size // n_blocks)]
    named = [f"the low-rank delta of {x}" if operand.is_delta else x for operand, x in zip(operands, labels)]
    terms = some(f"{c:.4g} times {name}" for c, name in zip(row, named) if c)
    holders = dtypes_that_hold(peak)
    advice = [f"write the model with dtype={holders[0]!r}"] if holders else []
    inputs = max(float(np.abs(widen(operand.data, operand.dtype)).max()) for operand in operands)
    if peak > inputs:
        advice.append("choose a smaller scale, or a beta nearer to 0")
    elif not holders:
        advice.append("leave out the model with the largest values")
    reach = f"up to {peak:.3g}" if np.isfinite(peak) else "beyond float64"
    return NonFiniteError(
        f"Tensor {tensor!r} would hold values {reach}, which are not finite in {_NAME_OF[out_dtype]}: it is {terms}. "
        f"{'; or '.join(advice).capitalize()}."
    )


def saturate(
    kernels: Kernels,
    operands: Sequence[Operand],
    coefficients_BK: NDArray[np.float64],
    out: NDArray[np.uint8],
    out_dtype: str,
    block_len: int,
) -> tuple[Combined, int] | None:
    """
    Write a combination again, with the largest number of the dtype where it was not finite.

    It is computed in float64, which gives the same bits on every backend, and rounded once as `Kernels.combine` does.

    Args:
        operands: Operands, all of them finite.
        coefficients_BK: One row for every block, one column for every operand.
        out: The combination as it was rounded, with infinities.

    Returns:
        `tuple[Combined, int]`: As `Kernels.combine`, and how many values it is; `None` if a sum leaves float64.
    """
    n_blocks = len(coefficients_BK)
    wide = np.empty(n_blocks * block_len)
    as_bytes = wide.view(np.uint8)
    kernels.combine(operands, coefficients_BK, as_bytes, "F64", n_blocks, block_len)
    if out_dtype not in _LARGEST or not np.isfinite(wide).all():
        return None
    n_beyond = kernels.count_nonfinite(Operand(out, out_dtype))
    np.clip(wide, -_LARGEST[out_dtype], _LARGEST[out_dtype], out=wide)
    ones = np.ones((n_blocks, 1))
    return kernels.combine([Operand(as_bytes, "F64")], ones, out, out_dtype, n_blocks, block_len), n_beyond


def check_squares(
    tensor: str, gram_BKK: NDArray[np.float64], operands: Sequence[Operand], labels: Sequence[str]
) -> None:
    """
    Raise if a block has a Gram matrix of zero because squares underflow, while its values are not zero.

    Only float64 values can be so small.
    """
    vanishing_B = np.trace(gram_BKK, axis1=1, axis2=2) < _LEAST_SQUARES
    for label, operand in zip(labels, operands):
        values = widen(operand.data, operand.dtype).reshape(len(gram_BKK), -1)
        if values[vanishing_B].any():
            raise squares_leave_float64(tensor, label)


def squares_leave_float64(tensor: str, owner: str) -> NonFiniteError:
    """Say that norms and angles cannot be computed, because squares overflow or underflow."""
    return NonFiniteError(
        f"Tensor {tensor!r}: the squares of the values of {owner} leave the range of float64, so that norms and "
        "angles cannot be told. Multiply the tensor by one power of two in all models before the merge, and divide it "
        "after; for an adapter, choose a lora_alpha nearer to its rank."
    )


def coefficients_overflow(tensor: str, method: str, options: SpanOptions) -> NonFiniteError:
    """Name the option that makes coefficients infinite, or all of them zero."""
    # Of a method that has both, the one that is far out.
    is_scaled = "beta" not in METHODS[method].options or abs(options.scale) > abs(options.beta)
    option = f"scale={options.scale:g}" if is_scaled else f"beta={options.beta:g}"
    advice = "Choose a smaller one." if is_scaled else "Choose one nearer to 0."
    return NonFiniteError(
        f"Tensor {tensor!r}: with {option} the coefficients of the experts leave the range of float64. {advice}"
    )


def delta_overflows(tensor: str, owners: str) -> NonFiniteError:
    """Say that the low-rank delta of one adapter, or the sum of several, does not fit into float32."""
    return NonFiniteError(
        f"Tensor {tensor!r}: the low-rank delta of {owners} leaves the range of float32, in which it is added. "
        "Lower its lora_alpha in adapter_config.json, choose a smaller scale or a beta nearer to 0, or leave it out."
    )
