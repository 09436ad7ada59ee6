"""Convert raw bytes of a safetensors tensor to numpy floats and back; numpy itself has no bfloat16."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hf_frmerge.kernels.interface import OVERFLOWS_AT

DTYPE_CODES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64"}

SIGNIFICANT_BITS = {"BF16": 8, "F16": 11, "F32": 24, "F64": 53}
"""Bits of the significand: rounding changes a value by 2 to minus this many, as a share of it, at most."""

_NUMPY_DTYPES = {"F16": np.float16, "F32": np.float32, "F64": np.float64}


def dtypes_that_hold(value: float) -> list[str]:
    """Return the names of the dtypes in which a value of this magnitude is finite."""
    return [name for name, code in DTYPE_CODES.items() if value < OVERFLOWS_AT[code]]


def widen(data: NDArray[np.uint8], dtype: str) -> NDArray[np.floating]:
    """
    Return the exact values of raw elements: bf16, fp16 and fp32 as float32, fp64 as float64.

    Args:
        data (`numpy.ndarray`):
            Little-endian elements, uint8, 1-D.
        dtype (`str`):
            Safetensors code: `"BF16"`, `"F16"`, `"F32"` or `"F64"`.
    """
    if dtype == "BF16":
        out = data.view("<u2").astype(np.uint32)
        out <<= 16
        return out.view(np.float32)
    values = data.view(_NUMPY_DTYPES[dtype])
    return values.astype(np.float64 if dtype == "F64" else np.float32)


def narrow(values: NDArray[np.floating], dtype: str) -> NDArray[np.uint8]:
    """
    Round float32 or float64 values to nearest, ties to even, and return their raw elements (uint8, 1-D).

    Float64 values are converted to bf16 through float32. These two roundings differ from a single one by at most
    2^-16 of a unit in the last place.
    """
    if dtype == "BF16":
        # bf16 is the upper half of a float32. Adding 0x7FFF and the last bit that stays rounds to nearest even.
        bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32).reshape(-1)
        is_nan = np.isnan(bits.view(np.float32))
        rounded = bits >> 16
        rounded &= 1
        rounded += bits
        rounded += 0x7FFF
        rounded >>= 16
        # Rounding may turn a NaN into an infinity, by a carry out of its payload; 0x7FC0 is the quiet NaN.
        rounded[is_nan] = 0x7FC0
        return rounded.astype("<u2").view(np.uint8)
    return np.ascontiguousarray(values, dtype=_NUMPY_DTYPES[dtype]).reshape(-1).view(np.uint8)
