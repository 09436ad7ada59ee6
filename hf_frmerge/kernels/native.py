"""The native CPU kernels; see native.c and native_isa.h for the arithmetic."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from hf_frmerge.errors import ArgumentError
from hf_frmerge.kernels import _native
from hf_frmerge.kernels.elementwise import (
    HIGH_BINS,
    LOW_BINS,
    Band,
    Dropout,
    Elementwise,
    Keep,
    RankedDropout,
    Run,
    Spread,
    Stream,
    key_of,
)
from hf_frmerge.kernels.interface import ITEMSIZE, Combined, Operand, digest, digests_of

_SHORT = 240
"""Up to this many bytes XXH3 uses a different algorithm, which the extension does not implement."""


def available_level(level: str | None = None) -> str:
    """
    Choose an instruction-set level: `level`, else the one in `HF_FRMERGE_ISA`, else the best of this machine.

    Raises:
        ArgumentError: If this machine does not have that level.
    """
    available = _native.levels()
    wanted = level or os.environ.get("HF_FRMERGE_ISA") or available[0]
    if wanted not in available:
        raise ArgumentError(
            f"Expected a kernel level this machine has ({', '.join(available)}), got {wanted!r}. "
            "Unset HF_FRMERGE_ISA to let the best one be chosen."
        )
    return wanted


class NativeKernels:
    """
    Kernels compiled for several instruction-set levels. Importing this module fails if they were not built.

    Args:
        level (`str`, *optional*):
            `"avx512"`, `"avx2"` or `"plain"`. Defaults to the environment variable `HF_FRMERGE_ISA`, else to the best
            level this machine has.

    Raises:
        ArgumentError: If this machine does not have that level.
    """

    blocks_are_independent = True

    def __init__(self, level: str | None = None) -> None:
        self.level: str = available_level(level)
        self.name = f"native {self.level}"

    def gram(
        self, operands: Sequence[Operand], n_blocks: int, block_len: int, *, precise: bool = False
    ) -> NDArray[np.float64]:
        """Return the inner products of each block, as [`~kernels.Kernels.gram`] says."""
        gram = np.empty((n_blocks, len(operands), len(operands)))
        _native.gram(self.level, _as_tuples(operands), n_blocks, block_len, precise, gram)
        return gram

    def gram_and_digests(
        self, operands: Sequence[Operand], n_blocks: int, block_len: int, *, precise: bool = False
    ) -> tuple[NDArray[np.float64], list[str]]:
        """Return Gram matrices and digests in one pass, as [`~kernels.Kernels.gram_and_digests`] says."""
        if any(operand.data.size <= _SHORT and not operand.is_delta for operand in operands):
            return self.gram(operands, n_blocks, block_len, precise=precise), digests_of(operands)
        gram = np.empty((n_blocks, len(operands), len(operands)))
        digests = np.empty((len(operands), 16), np.uint8)
        _native.gram(self.level, _as_tuples(operands), n_blocks, block_len, precise, gram, digests)
        return gram, ["" if operand.is_delta else row.tobytes().hex() for operand, row in zip(operands, digests)]

    def combine(
        self,
        operands: Sequence[Operand],
        coefficients: NDArray[np.float64],
        out: NDArray[np.uint8],
        out_dtype: str,
        n_blocks: int,
        block_len: int,
    ) -> Combined:
        """Write the linear combination of each block, as [`~kernels.Kernels.combine`] says."""
        table = np.ascontiguousarray(coefficients, dtype=np.float64)
        if table.shape != (n_blocks, len(operands)):
            raise ValueError(f"expected coefficients of shape {(n_blocks, len(operands))}, got {table.shape}")
        # The native digest is None for outputs of up to `_SHORT` bytes.
        native, finite = _native.combine(self.level, _as_tuples(operands), table, n_blocks, block_len, out, out_dtype)
        return Combined(digest(out) if native is None else native.hex(), finite)

    def count_nonfinite(self, operand: Operand) -> int:
        """Return how many values are NaN or infinite."""
        return _native.count_nonfinite(self.level, operand.data, operand.dtype)

    def count_keys(
        self, operands: Sequence[Operand], stream: Stream, bins: NDArray[np.int64] | None = None
    ) -> NDArray[np.int64]:
        """Count keys, as [`~kernels.Kernels.count_keys`] says."""
        of_spread = stream == "spread"
        n_streams = 1 if of_spread else len(operands) - 1
        shape = (n_streams, HIGH_BINS) if bins is None else (n_streams, bins.shape[1], LOW_BINS)
        counts = np.zeros(shape, np.int64)
        table = None if bins is None else np.ascontiguousarray(bins, np.int64)
        _native.count_keys(self.level, _as_tuples(operands), _n_elements(operands), of_spread, table, counts)
        return counts

    def energies(self, operands: Sequence[Operand], threshold: float) -> NDArray[np.float64]:
        """Return sums of squares, as [`~kernels.Kernels.energies`] says."""
        total = np.zeros(len(operands) - 1)
        _native.energies(self.level, _as_tuples(operands), _n_elements(operands), threshold, total)
        return total

    def merge_elements(
        self,
        operands: Sequence[Operand],
        decision: Elementwise,
        run: Run,
        skip: int,
        out: NDArray[np.uint8],
        out_dtype: str,
    ) -> tuple[Combined, bool]:
        """Write base and merged deltas, as [`~kernels.Kernels.merge_elements`] says."""
        kind, numbers = _numbers(decision.keep)
        seed = decision.keep.seed if isinstance(decision.keep, (Dropout, RankedDropout)) else 0
        keys = np.array([key_of(seed, i, run.tensor) for i in range(len(operands) - 1)], np.uint64)
        rule = (kind, _JOINS.index(decision.join), decision.factor, run.start, run.row_len)
        weights = np.array([*decision.weights, *(decision.votes or decision.weights)])
        native, bounded, finite = _native.elementwise(
            self.level,
            _as_tuples(operands),
            _n_elements(operands),
            rule,
            numbers,
            weights,
            keys,
            skip,
            out,
            out_dtype,
        )
        return Combined(digest(out) if native is None else native.hex(), finite), bounded


# In the order of the enumerations in native.c.
_JOINS = ("sum", "elect", "mean")


def _numbers(keep: Keep) -> tuple[int, NDArray[np.float64]]:
    """Return the number of a kind of selection in native.c, and its numbers."""
    if isinstance(keep, Band):
        upper = keep.upper if keep.upper is not None else [np.inf] * len(keep.lower)
        return 0, np.array([*keep.lower, *upper])
    if isinstance(keep, Dropout):
        return 1, np.array([keep.density, 0.0])
    if isinstance(keep, RankedDropout):
        return 2, np.array([keep.density, keep.epsilon])
    if isinstance(keep, Spread):
        return 3, np.array([keep.threshold, 0.0])
    return 4, np.array([keep.ratio, float(keep.n_experts)])


def _n_elements(operands: Sequence[Operand]) -> int:
    return operands[0].data.size // ITEMSIZE[operands[0].dtype]


def _as_tuples(operands: Sequence[Operand]) -> tuple[tuple[NDArray[np.uint8], str, bool], ...]:
    return tuple((operand.data, operand.dtype, operand.is_delta) for operand in operands)
