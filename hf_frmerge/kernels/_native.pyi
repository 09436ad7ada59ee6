"""Types of the extension in native.c, for mypy. Every function raises `ValueError` if its buffers do not fit."""

from __future__ import annotations

from typing import TypeVar

from numpy import float32, float64, int64, uint8, uint64
from numpy.typing import NDArray

_Float = TypeVar("_Float", float32, float64)
_Operands = tuple[tuple[NDArray[uint8], str, bool], ...]  # (data, dtype, is_delta) each

def levels() -> list[str]: ...
def gram(
    level: str,
    operands: _Operands,
    n_blocks: int,
    block_len: int,
    precise: bool,
    out: NDArray[float64],
    digests: NDArray[uint8] | None = None,
    /,
) -> None: ...
def combine(
    level: str,
    operands: _Operands,
    coefficients: NDArray[float64],
    n_blocks: int,
    block_len: int,
    out: NDArray[uint8],
    out_dtype: str,
    /,
) -> tuple[bytes | None, bool]: ...
def count_nonfinite(level: str, data: NDArray[uint8], dtype: str, /) -> int: ...
def count_keys(
    level: str, operands: _Operands, count: int, of_spread: bool, bins: NDArray[int64] | None, out: NDArray[int64], /
) -> None: ...
def energies(level: str, operands: _Operands, count: int, threshold: float, out: NDArray[float64], /) -> None: ...
def elementwise(
    level: str,
    operands: _Operands,
    count: int,
    rule: tuple[int, int, float, int, int],
    numbers: NDArray[float64],
    weights: NDArray[float64],
    keys: NDArray[uint64],
    skip: int,
    out: NDArray[uint8],
    out_dtype: str,
    /,
) -> tuple[bytes | None, bool, bool]: ...
def matmul(level: str, left: NDArray[_Float], right: NDArray[_Float], out: NDArray[_Float], /) -> None: ...
def guard(buffer: NDArray[uint8], /) -> int: ...
def unguard(number: int, /) -> None: ...
def is_broken(number: int, /) -> bool: ...
def fault_in(ranges: tuple[NDArray[uint8], ...], /) -> bool: ...
def give_back(ranges: tuple[NDArray[uint8], ...], /) -> None: ...
