"""Tensors that are made of stored ones when they are read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np

from hf_frmerge.checkpoints.tensors.header import DTYPE_BITS, TensorInfo

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hf_frmerge.checkpoints.tensors.header import TensorSource


@dataclass(frozen=True)
class Run:
    """Rows `[first, first + n_rows)` of a tensor, where a row is all that its last index runs over."""

    part: TensorInfo
    first: int
    n_rows: int


@dataclass(frozen=True)
class Rows:
    """Rows of other tensors, one after the other: a stack of experts from single ones, or one of them from a stack."""

    runs: tuple[Run, ...]

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        """The tensors it is made of."""
        return tuple(dict.fromkeys(run.part for run in self.runs))

    def read(self, source: TensorSource, start: int, stop: int) -> NDArray[np.uint8]:
        """Return bytes `[start, stop)`."""
        joined, end = np.empty(stop - start, np.uint8), 0
        for piece in self._pieces(start, stop):
            begin, end = end, end + piece[2] - piece[1]
            joined[begin:end] = source.read_info(*piece)
            source.release_info(*piece)
        return joined

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[TensorInfo, int, int]]:
        """Yield parts and byte ranges in these."""
        first = int(np.searchsorted(self._ends, start, side="right"))
        for run, end in zip(self.runs[first:], self._ends[first:]):
            nbytes = _row_bytes(run.part)
            begin = end - run.n_rows * nbytes
            if begin >= stop:
                return
            offset = run.first * nbytes - begin
            yield run.part, max(start, begin) + offset, min(stop, end) + offset

    @cached_property
    def _ends(self) -> list[int]:
        """Byte in the tensor at which every run ends."""
        return list(accumulate(run.n_rows * _row_bytes(run.part) for run in self.runs))


def rows_of(name: str, shape: Sequence[int], runs: Sequence[Run]) -> TensorInfo:
    """Return a tensor of `shape` that is made of rows of others, which have one dtype."""
    first = runs[0].part
    nbytes = sum(run.n_rows * _row_bytes(run.part) for run in runs)
    return TensorInfo(name, first.dtype, tuple(shape), first.file, 0, nbytes, Rows(tuple(runs)))


def _row_bytes(info: TensorInfo) -> int:
    return (info.shape[-1] if info.shape else 1) * DTYPE_BITS[info.dtype] // 8
