"""Tensors of one model that are read in pieces: stored in a file, or computed row by row from stored ones."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

import numpy as np

from hf_frmerge.checkpoints.page_cache import MappedRange
from hf_frmerge.checkpoints.tensors.floats import widen
from hf_frmerge.checkpoints.tensors.reader import DTYPE_BITS
from hf_frmerge.kernels.interface import Operand
from hf_frmerge.kernels.product import product

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hf_frmerge.checkpoints.adapters.factors import DoraWeight, LowRankDelta
    from hf_frmerge.checkpoints.adapters.folded import Folded
    from hf_frmerge.checkpoints.page_cache import Mapping as FileMapping
    from hf_frmerge.checkpoints.tensors.reader import Checkpoint, TensorInfo


class DenseTensor(Protocol):
    """Tensor whose elements can be read in pieces: stored in a file, or computed row by row from stored ones."""

    def read(self, start: int, stop: int) -> Operand:
        """Return elements `[start, stop)` in row-major order."""
        ...

    def mapped(self, start: int, stop: int) -> MappedRange | None:
        """Return the range of a mapped file that `read` needs, so that it can be faulted in; `None` if not mapped."""
        ...

    @property
    def files(self) -> set[tuple[Checkpoint, str]]:
        """The files it is read from."""
        ...


@dataclass(frozen=True)
class StoredTensor:
    """Tensor stored in a checkpoint."""

    checkpoint: Checkpoint
    info: TensorInfo

    def read(self, start: int, stop: int) -> Operand:
        """Return elements `[start, stop)`: a view of the page cache for local files, else fetched bytes."""
        part = self.mapped(start, stop)
        data = part.mapping.held(part.start, part.stop) if part else None
        if data is None:
            data = self.checkpoint.read_info(self.info, start * self._itemsize, stop * self._itemsize)
        return Operand(data, self.info.dtype)

    def mapped(self, start: int, stop: int) -> MappedRange | None:
        """Return the range of elements `[start, stop)` in a mapped file; `None` if the file is not mapped."""
        if self._mapping is None:
            return None
        offset, size = self.info.offset, self._itemsize
        return MappedRange(self._mapping, offset + start * size, offset + stop * size)

    @property
    def files(self) -> set[tuple[Checkpoint, str]]:
        """The files it is read from."""
        return {(self.checkpoint, part.file) for part in self.info.stored}

    def follows(self, other: StoredTensor) -> bool:
        """Whether it is of the same dtype as another, and begins where that one ends."""
        before, info = other.info, self.info
        return (
            self.checkpoint is other.checkpoint
            and before.recipe is info.recipe is None
            and (before.dtype, before.file, before.offset + before.nbytes) == (info.dtype, info.file, info.offset)
        )

    def with_next(self, n: int) -> StoredTensor:
        """Return `n` tensors of its size as one: itself, and those that follow it."""
        info = self.info
        return StoredTensor(self.checkpoint, replace(info, shape=(n, info.numel), nbytes=n * info.nbytes))

    @cached_property
    def _itemsize(self) -> int:
        return DTYPE_BITS[self.info.dtype] // 8

    @cached_property
    def _mapping(self) -> FileMapping | None:
        return self.checkpoint.mapping(self.info)


@dataclass(frozen=True)
class DoraTensor:
    """Effective weight of a DoRA module, computed row by row from the base; float32."""

    base: StoredTensor
    delta: LowRankDelta
    cols: int

    def read(self, start: int, stop: int) -> Operand:
        """Return elements `[start, stop)`."""
        first, last = start // self.cols, -(-stop // self.cols)
        stored = self.base.read(first * self.cols, last * self.cols)
        rows = self._weight.rows(widen(stored.data, stored.dtype).reshape(-1, self.cols), first)
        flat = rows.reshape(-1)[start - first * self.cols : stop - first * self.cols]
        return Operand(np.ascontiguousarray(flat).view(np.uint8), "F32")

    def mapped(self, start: int, stop: int) -> MappedRange | None:
        """Return the range of the base for elements `[start, stop)`: whole rows, as a row is scaled by its norm."""
        return self.base.mapped(start // self.cols * self.cols, -(-stop // self.cols) * self.cols)

    @property
    def files(self) -> set[tuple[Checkpoint, str]]:
        """The files it is read from."""
        return self.base.files | self.delta.files

    @cached_property
    def _weight(self) -> DoraWeight:
        return self.delta.dora_weight()


@dataclass(frozen=True)
class FoldedTensor:
    """Weight of a full model that is read with an adapter: float32, not rounded to the dtype of the model."""

    checkpoint: Checkpoint
    recipe: Folded

    def read(self, start: int, stop: int) -> Operand:
        """Return elements `[start, stop)`."""
        values = np.ascontiguousarray(self.recipe.read_wide(self.checkpoint, start, stop))
        return Operand(values.view(np.uint8), self.recipe.wide_dtype)

    def mapped(self, start: int, stop: int) -> MappedRange | None:
        """Return `None`: what is read is copied, and released."""
        return None

    @property
    def files(self) -> set[tuple[Checkpoint, str]]:
        """The files it is read from."""
        stored = {(self.checkpoint, part.file) for part in self.recipe.info.stored}
        return stored | {(self.recipe.adapter, file) for file in self.recipe.adapter.files}


@dataclass(frozen=True)
class ProductTensor:
    """Product of two stored factors, `up` `(rows, k)` and `down` `(k, cols)`, computed row by row; float32."""

    up: StoredTensor
    down: StoredTensor
    cols: int

    def read(self, start: int, stop: int) -> Operand:
        """Return elements `[start, stop)`."""
        first, last = start // self.cols, -(-stop // self.cols)
        up_RK, down_KC = self._kept
        flat = product(up_RK[first:last], down_KC).reshape(-1)[start - first * self.cols : stop - first * self.cols]
        return Operand(np.ascontiguousarray(flat).view(np.uint8), "F32", is_delta=True)

    def mapped(self, start: int, stop: int) -> MappedRange | None:
        """Return `None`: the factors are small, and are read once."""
        return None

    @property
    def files(self) -> set[tuple[Checkpoint, str]]:
        """The files it is read from."""
        return self.up.files | self.down.files

    @property
    def rank(self) -> int:
        """Inner dimension of the product."""
        return self.down.info.shape[0]

    def factors(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Read both factors."""
        return _matrix(self.up), _matrix(self.down)

    @cached_property
    def _kept(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        return self.factors()


@dataclass(frozen=True)
class ZeroTensor:
    """The base of a tensor that the base model does not have: zeros."""

    files: set[tuple[Checkpoint, str]] = field(default_factory=set)

    def read(self, start: int, stop: int) -> Operand:
        """Return `stop - start` zeros."""
        return Operand(np.zeros((stop - start) * 4, np.uint8), "F32")

    def mapped(self, start: int, stop: int) -> MappedRange | None:
        """Return `None`: there is no file."""
        return None


def _matrix(tensor: StoredTensor) -> NDArray[np.float32]:
    operand = tensor.read(0, tensor.info.numel)
    return widen(operand.data, operand.dtype).astype(np.float32).reshape(tensor.info.shape)
