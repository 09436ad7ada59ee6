"""Difference of one tensor in two checkpoints, as a matrix that is never wholly in memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hf_frmerge.checkpoints.tensors.floats import SIGNIFICANT_BITS, widen
from hf_frmerge.checkpoints.tensors.reader import Checkpoint
from hf_frmerge.errors import NonFiniteError

_CHUNK_ELEMENTS = 1 << 22  # elements in memory at a time: 16 MiB in float32
_LEAST_SQUARES = 2.0**-900  # below this sum, squares of single elements may have underflowed in float64


@dataclass(frozen=True)
class DenseDelta:
    """Difference `merged - base` of a tensor in two checkpoints, as a matrix read in chunks of rows."""

    merged: Checkpoint
    base: Checkpoint
    name: str

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns; all dimensions after the first are flattened into columns."""
        shape = self.base.tensors[self.name].shape
        rows = shape[0] if shape else 1
        return rows, self.base.tensors[self.name].numel // max(rows, 1)

    def chunks(self) -> Iterator[tuple[slice, NDArray[np.floating]]]:
        """Yield slices of rows with their values, `(rows, cols)`, float32; float64 if a checkpoint is.

        Raises:
            NonFiniteError: If a tensor has NaN or infinity.
        """
        rows, cols = self.shape
        step = max(1, _CHUNK_ELEMENTS // max(cols, 1))
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            values = self._read(self.merged, start * cols, stop * cols)
            with np.errstate(
                over="ignore"
            ):  # an infinite difference makes the norm infinite, which the caller rejects
                values = values - self._read(self.base, start * cols, stop * cols)
            yield slice(start, stop), values.reshape(-1, cols)

    def norm(self) -> float:
        """Return the Frobenius norm, summed in float64."""
        total = sum(float(np.einsum("rc,rc->", v, v, dtype=np.float64)) for _, v in self.chunks())
        if _LEAST_SQUARES < total < np.inf:
            return float(np.sqrt(total))
        # Read again with scaling: rare, so the fast path need not pay for it.
        return float(np.hypot.reduce([_norm_of_extremes(values) for _, values in self.chunks()]))

    def times(self, right: NDArray[np.floating]) -> NDArray[np.float64]:
        """Return `delta @ right`, `(rows, l)`, float64; computed in the dtype of the chunks."""
        return np.concatenate([values @ right.astype(values.dtype) for _, values in self.chunks()]).astype(np.float64)

    def transposed_times(self, left: NDArray[np.floating]) -> NDArray[np.float64]:
        """Return `delta.T @ left`, `(cols, l)`; chunks are summed in float64."""
        out = np.zeros((self.shape[1], left.shape[1]))
        for rows, values in self.chunks():
            out += values.T @ left[rows].astype(values.dtype)
        return out

    def distance(self, left: NDArray[np.floating], right: NDArray[np.floating]) -> float:
        """Return the Frobenius norm of `delta - left @ right`."""
        total = 0.0
        for rows, values in self.chunks():
            difference = values - left[rows] @ right
            total += float(np.einsum("rc,rc->", difference, difference, dtype=np.float64))
        return float(np.sqrt(total))

    def rounding(self) -> float:
        """Return the norm of the most that rounding both tensors to their dtypes may have changed."""
        most = 0.0
        for info, checkpoint in ((each.tensors[self.name], each) for each in (self.merged, self.base)):
            starts = range(0, info.numel, _CHUNK_ELEMENTS)
            parts = (self._read(checkpoint, at, min(at + _CHUNK_ELEMENTS, info.numel)) for at in starts)
            squares = sum(float(np.einsum("i,i->", part, part, dtype=np.float64)) for part in parts)
            most += 2.0 ** -SIGNIFICANT_BITS[info.dtype] * squares**0.5
        return most

    def _read(self, checkpoint: Checkpoint, start: int, stop: int) -> NDArray[np.floating]:
        """Read elements `[start, stop)` of the tensor, 1-D, widened to float32 or float64."""
        info = checkpoint.tensors[self.name]
        size = info.nbytes // max(info.numel, 1)
        values = widen(checkpoint.read(self.name, start * size, stop * size), info.dtype)
        checkpoint.release(self.name, start * size, stop * size)
        if not np.isfinite(values).all():
            raise NonFiniteError(
                f"{checkpoint.source.spec!r}: tensor {self.name!r} holds NaN or infinity; no adapter can express it."
            )
        return values


def _norm_of_extremes(values: NDArray[np.floating]) -> float:
    """Return the norm of values whose squares may over- or underflow in float64: scaled by the largest one."""
    largest = float(np.abs(values).max(initial=0.0))
    if largest == 0.0 or np.isinf(largest):
        return largest
    return largest * float(np.linalg.norm(values / np.float64(largest)))
