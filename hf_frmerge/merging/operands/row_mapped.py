"""Tensors whose rows are not taken as they are stored: classes in another order, tokens of another vocabulary."""

# Shape suffixes: R = rows that are read, H = models that have a row, C = elements of a row.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from hf_frmerge.checkpoints.page_cache import prefetch, release
from hf_frmerge.checkpoints.tensors.floats import widen
from hf_frmerge.checkpoints.tensors.reader import DTYPE_BITS
from hf_frmerge.geometry.portable import fold
from hf_frmerge.kernels.interface import Operand

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hf_frmerge.checkpoints.page_cache import MappedRange
    from hf_frmerge.checkpoints.tensors.reader import Checkpoint
    from hf_frmerge.merging.operands.dense_tensors import DenseTensor

_MEAN_ROWS = 1 << 10
"""Rows whose mean is taken at a time. A constant: the last bit of the mean depends on it."""


@dataclass(frozen=True)
class StoredRows:
    """
    Rows of a tensor of one model, in the order of the output.

    Attributes:
        tensor: the tensor as it is stored.
        rows: `(n_rows,)`: the stored row of every row of the output, -1 where there is none.
        cols: elements of a row.
    """

    tensor: DenseTensor
    rows: NDArray[np.int64]
    cols: int

    def read(self, places: NDArray[np.int64]) -> list[Operand]:
        """Return rows of the output that this model has, one operand for every run that is stored together, copied."""
        stored = self.rows[places]
        starts = np.flatnonzero(np.diff(stored, prepend=-2) != 1)
        runs = [
            (int(stored[first]) * self.cols, (int(stored[last - 1]) + 1) * self.cols)
            for first, last in zip(starts, [*starts[1:], len(stored)])
        ]
        mapped = [part for run in runs if (part := self.tensor.mapped(*run)) is not None]
        prefetch(mapped)
        operands = [self.tensor.read(*run) for run in runs]
        copied = [Operand(operand.data.copy(), operand.dtype) for operand in operands]
        release(mapped)  # single rows are many, and what is held is searched through
        return copied

    def values(self, places: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return rows of the output that this model has, `(R, C)`."""
        read = [widen(operand.data, operand.dtype).reshape(-1, self.cols) for operand in self.read(places)]
        return np.concatenate(read).astype(np.float64) if read else np.zeros((0, self.cols))


@dataclass(frozen=True)
class RowFill:
    """
    Rows for models that lack a token: the weighted mean of the experts that have it, else the row of the base.

    A row that no model has (padding) is the mean of all rows of the output's donor.

    Attributes:
        experts: weight and rows of every expert that has this tensor.
        base: rows of the base model.
        donor: the rows of which the mean is taken, as they are stored.
    """

    experts: Sequence[tuple[float, StoredRows]]
    base: StoredRows | None
    donor: StoredRows

    def values(self, places: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return rows of the output, `(R, C)`."""
        has_HR = np.array([rows.rows[places] >= 0 for _, rows in self.experts], bool).reshape(-1, len(places))
        weights_HR = np.array([[weight] for weight, _ in self.experts]).reshape(-1, 1) * has_HR
        # Experts without weight count alike where no other has the token.
        weights_HR = np.where(fold(weights_HR.copy()) > 0, weights_HR, has_HR.astype(np.float64))
        total_R = fold(weights_HR.copy())
        filled = np.zeros((len(places), self.donor.cols))
        for weights_R, has_R, (_, rows) in zip(weights_HR, has_HR, self.experts):
            filled[has_R] += (weights_R[has_R] / total_R[has_R])[:, None] * rows.values(places[has_R])
        left = total_R == 0
        if self.base is not None:
            of_base = left & (self.base.rows[places] >= 0)
            filled[of_base] = self.base.values(places[of_base])
            left &= ~of_base
        if left.any():
            filled[left] = self._mean
        return filled

    @property
    def files(self) -> set[tuple[Checkpoint, str]]:
        """The files it is read from."""
        return {file for rows in self._all for file in rows.tensor.files}

    @property
    def _all(self) -> list[StoredRows]:
        base = [self.base] if self.base is not None else []
        return [self.donor, *base, *(rows for _, rows in self.experts)]

    @cached_property
    def _mean(self) -> NDArray[np.float64]:
        # Not locked: two threads may compute it at once, and get the same result.
        n_rows = len(self.donor.rows)
        sums = [
            fold(self.donor.values(np.arange(start, min(start + _MEAN_ROWS, n_rows))))
            for start in range(0, n_rows, _MEAN_ROWS)
        ]
        return fold(np.stack(sums)) / n_rows


@dataclass(frozen=True)
class RowMappedTensor:
    """
    Tensor of one model with its rows in the order of the output, and with rows that it lacks filled in.

    Attributes:
        own: the rows that it has.
        fill: the others; needed only if some are missing.
        filled_dtype: dtype of what is read if a filled row is in it: one in which the values of all models are exact.
    """

    own: StoredRows
    fill: RowFill | None = None
    filled_dtype: str = "F32"

    def read(self, start: int, stop: int) -> Operand:
        """Return elements `[start, stop)`: as the tensor returns them if they are stored together, else copied."""
        shift = self._shift(start, stop)
        if shift is not None:
            return self.own.tensor.read(start + shift, stop + shift)
        cols = self.own.cols
        places = np.arange(start // cols, -(-stop // cols))
        is_own = self.own.rows[places] >= 0
        if is_own.all():
            operands = self.own.read(places)
            data, dtype = np.concatenate([operand.data for operand in operands]), operands[0].dtype
        else:
            assert self.fill is not None
            values = np.empty((len(places), cols))
            values[is_own] = self.own.values(places[is_own])
            values[~is_own] = self.fill.values(places[~is_own])
            dtype = self.filled_dtype
            data = values.reshape(-1).astype("<f8" if dtype == "F64" else "<f4").view(np.uint8)
        size, offset = DTYPE_BITS[dtype] // 8, int(places[0]) * cols
        return Operand(data[(start - offset) * size : (stop - offset) * size], dtype)

    def mapped(self, start: int, stop: int) -> MappedRange | None:
        """Return the range of a mapped file that `read` needs; `None` if the elements are not stored together."""
        shift = self._shift(start, stop)
        return None if shift is None else self.own.tensor.mapped(start + shift, stop + shift)

    @property
    def files(self) -> set[tuple[Checkpoint, str]]:
        """The files it is read from."""
        return self.own.tensor.files | (self.fill.files if self.fill is not None else set())

    def _shift(self, start: int, stop: int) -> int | None:
        """Return by how much elements are displaced if they are stored together; `None` if they are not."""
        cols = self.own.cols
        first = start // cols
        rows = self.own.rows[first : -(-stop // cols)]
        together = len(rows) > 0 and rows[0] >= 0 and bool((np.diff(rows) == 1).all())
        return (int(rows[0]) - first) * cols if together else None
