"""Interface of the kernels: Gram matrices and linear combinations over the raw bytes of tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_128_hexdigest

from hf_frmerge.kernels.elementwise import Elementwise, Run, Stream

ITEMSIZE = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8}  # bytes an element, for the dtypes every kernel knows

# Smallest float64 that rounds to infinity: half a unit in the last place above the largest number of the dtype.
OVERFLOWS_AT = {
    "BF16": 2.0**128 - 2.0**119,
    "F16": 2.0**16 - 2.0**4,
    "F32": 2.0**128 - 2.0**103,
    "F64": math.inf,
}


@dataclass(frozen=True)
class Operand:
    """
    Values of one expert, as raw bytes.

    Args:
        data (`np.ndarray`):
            Little-endian bytes, 1-D contiguous `uint8`; no alignment is needed, as tensors start anywhere in a file.
        dtype (`str`):
            `"BF16"`, `"F16"`, `"F32"` or `"F64"`, the spelling of safetensors.
        is_delta (`bool`, *optional*, defaults to `False`):
            Whether the values are already differences to the first operand.
    """

    data: NDArray[np.uint8]
    dtype: str
    is_delta: bool = False


class Combined(NamedTuple):
    """Digest of the bytes written by `Kernels.combine`, and whether all elements are finite."""

    digest: str
    is_finite: bool


class Kernels(Protocol):
    """
    Interface of a kernel backend.

    All operands of a call have the same length and are read as `n_blocks` blocks of `block_len` elements. Methods are
    safe to call from several threads and raise `ValueError` if sizes, dtypes or buffers do not fit.

    Attributes:
        name: for reports.
        blocks_are_independent: whether the bits of a block's Gram matrix are those of a call for it alone.
    """

    name: str
    blocks_are_independent: bool

    def gram(
        self, operands: Sequence[Operand], n_blocks: int, block_len: int, *, precise: bool = False
    ) -> NDArray[np.float64]:
        """
        Return the inner products of each block's `(x_0, d_1, ..., d_{K-1})`, where `d_i = x_i - x_0`.

        Values are widened and subtracted before any product, so that the small angles between fine-tunes of one base
        are not lost to rounding. An operand with `is_delta` is already a difference and used as it is.

        Args:
            operands (`Sequence[Operand]`):
                K operands; dtypes may differ.
            n_blocks (`int`):
                Number of blocks.
            block_len (`int`):
                Elements in a block.
            precise (`bool`, *optional*, defaults to `False`):
                Subtract and multiply in float64. Otherwise a backend may use float32 if it flushes sums to float64 at
                least every 512 elements: longer float32 sums drift, above all on the diagonal. In float32, squares of
                values overflow near 1e19 and vanish near 1e-23. Always on if an operand is `"F64"`.

        Returns:
            `np.ndarray`: `(n_blocks, K, K)`, float64, symmetric.
        """
        ...

    def gram_and_digests(
        self, operands: Sequence[Operand], n_blocks: int, block_len: int, *, precise: bool = False
    ) -> tuple[NDArray[np.float64], list[str]]:
        """
        Return the result of `gram`, and the XXH3-128 digest of every operand's bytes in hexadecimal.

        Both are one call so that a backend can digest bytes it has just read, while they are in the cache, and save a
        pass over memory. An operand with `is_delta` is not stored in any file; its digest is empty.
        """
        ...

    def combine(
        self,
        operands: Sequence[Operand],
        coefficients: NDArray[np.float64],
        out: NDArray[np.uint8],
        out_dtype: str,
        n_blocks: int,
        block_len: int,
    ) -> Combined:
        """
        Write `sum_k coefficients[block, k] * x_k`, the same bits on every backend and machine.

        The sum is taken in float64 in the order of the operands, with a rounding after each product and each addition
        (no fused multiply-add), and then rounded once, to nearest even, to `out_dtype`. Operands with coefficient zero
        are skipped, so that a one-hot row returns its operand bit for bit (-0 too). NaN is written as the positive
        quiet NaN. `is_delta` is ignored.

        Args:
            operands (`Sequence[Operand]`):
                K operands; dtypes may differ.
            coefficients (`np.ndarray`):
                `(n_blocks, K)`, float64.
            out (`np.ndarray`):
                Writable 1-D contiguous `uint8`, `n_blocks * block_len` elements of `out_dtype`.
            out_dtype (`str`):
                `"BF16"`, `"F16"`, `"F32"` or `"F64"`.
            n_blocks (`int`):
                Number of blocks.
            block_len (`int`):
                Elements in a block.

        Returns:
            `Combined`: `digest` of `out`, and whether all of it is finite. Both are part of this call because a
            backend can take them from what it has just written, which saves two passes over memory.
        """
        ...

    def count_nonfinite(self, operand: Operand) -> int:
        """Return how many values are NaN or infinite."""
        ...

    def count_keys(
        self, operands: Sequence[Operand], stream: Stream, bins: NDArray[np.int64] | None = None
    ) -> NDArray[np.int64]:
        """
        Count the keys of the deltas to the first operand, as `elementwise.count_keys` does.

        Args:
            operands (`Sequence[Operand]`):
                The base, then every expert; dtypes may differ.
            stream (`str`):
                `"magnitudes"` (S = N streams) or `"spread"` (one).
            bins (`np.ndarray`, *optional*):
                `(S, P)`, int64: upper halves of keys to look into.

        Returns:
            `np.ndarray`: int64, `(S, HIGH_BINS)`, or `(S, P, LOW_BINS)` with `bins`.
        """
        ...

    def energies(self, operands: Sequence[Operand], threshold: float) -> NDArray[np.float64]:
        """
        Return the sum of squares `(N,)` of the deltas whose spread is at least `threshold`.

        The bits are the same on every backend and machine; see `elementwise.add_energies` for the order of the sum.
        """
        ...

    def merge_elements(
        self,
        operands: Sequence[Operand],
        decision: Elementwise,
        run: Run,
        skip: int,
        out: NDArray[np.uint8],
        out_dtype: str,
    ) -> tuple[Combined, bool]:
        """
        Write base and merged deltas, rounded once from float64, the same bits on every backend and machine.

        Args:
            operands (`Sequence[Operand]`):
                The base, then every expert; dtypes may differ.
            decision (`Elementwise`):
                What is kept of each delta, and how it is joined.
            run (`Run`):
                Where the operands' elements lie in their tensor.
            skip (`int`):
                Elements that are computed but not written, because `out` begins within a row.
            out (`np.ndarray`):
                Writable 1-D contiguous `uint8`; it may end before the last element.
            out_dtype (`str`):
                `"BF16"`, `"F16"`, `"F32"` or `"F64"`.

        Returns:
            `tuple[Combined, bool]`: As `combine`, and whether all deltas are finite, also those that were dropped.
        """
        ...


def digest(data: NDArray[np.uint8]) -> str:
    """Return the XXH3-128 digest of some bytes. It runs at the speed of memory, but is not safe against forgery."""
    return xxh3_128_hexdigest(data.data)


def digests_of_parts(data: NDArray[np.uint8], n_parts: int) -> list[str]:
    """Return the digest of each of `n_parts` equally long parts of some bytes."""
    view, size = data.data, len(data) // n_parts
    return [xxh3_128_hexdigest(view[start : start + size]) for start in range(0, n_parts * size, size)]


def digests_of(operands: Sequence[Operand]) -> list[str]:
    """Compute the digests of `Kernels.gram_and_digests` in a separate pass."""
    return ["" if operand.is_delta else digest(operand.data) for operand in operands]
