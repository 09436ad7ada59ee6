"""Let a model and an adapter on it be read as one full model, whose weights are computed when they are read."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from hf_frmerge.checkpoints.tensors.floats import narrow, widen
from hf_frmerge.checkpoints.tensors.header import DTYPE_BITS
from hf_frmerge.errors import CheckpointError
from hf_frmerge.kernels.product import product

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from numpy.typing import NDArray

    from hf_frmerge.checkpoints.adapters.adapter import Adapter
    from hf_frmerge.checkpoints.adapters.factors import LowRankDelta
    from hf_frmerge.checkpoints.tensors.header import TensorInfo, TensorSource
    from hf_frmerge.checkpoints.tensors.reader import Checkpoint

_BYTES_AN_ELEMENT = 16


@dataclass(frozen=True)
class FoldedAdapter:
    """
    Adapter that a full model is read with.

    Attributes:
        checkpoint: its tensors.
        targets: stored name of each of them -> tensor of the model that it changes.
        base_copies: stored names of those that only repeat what the model has.
    """

    checkpoint: Checkpoint
    targets: Mapping[str, str]
    base_copies: frozenset[str]


@dataclass(frozen=True)
class Folded(ABC):
    """
    Recipe of a weight of the model with the adapter on it.

    Attributes:
        info: the model's own weight.
    """

    info: TensorInfo

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        """The weight of the model. What it takes of the adapter is small, and in another folder."""
        return (self.info,)

    @property
    @abstractmethod
    def adapter(self) -> Checkpoint:
        """The adapter's tensors."""

    @property
    def wide_dtype(self) -> str:
        """Dtype of `read_wide`: `"F64"` if the model's own weight has it, else `"F32"`."""
        return "F64" if self.info.dtype == "F64" else "F32"

    @abstractmethod
    def read_wide(self, source: TensorSource, start: int, stop: int) -> NDArray[np.floating]:
        """Return elements `[start, stop)`, not rounded to the dtype of the model."""

    def read(self, source: TensorSource, start: int, stop: int) -> NDArray[np.uint8]:
        """Return bytes `[start, stop)` as they were stored if the adapter had been folded in beforehand."""
        size = DTYPE_BITS[self.info.dtype] // 8
        first, last = start // size, -(-stop // size)
        stored = narrow(self.read_wide(source, first, last), self.info.dtype)
        return stored[start - first * size : stop - first * size]


@dataclass(frozen=True)
class FoldedRows(Folded):
    """Weight with a LoRA or DoRA module on it, computed row by row."""

    delta: LowRankDelta

    @property
    def adapter(self) -> Checkpoint:
        """The adapter's tensors."""
        return self.delta.checkpoint

    def read_wide(self, source: TensorSource, start: int, stop: int) -> NDArray[np.floating]:
        """Return elements `[start, stop)`."""
        cols = math.prod(self.info.shape[1:])
        first, last = start // cols, -(-stop // cols)
        rows = read_wide(source, self.info, first * cols, last * cols).reshape(-1, cols)
        if self.delta.is_dora:
            changed: NDArray[np.floating] = self.delta.dora_weight().rows(rows, first)
        else:
            left, right = self.delta.factors()
            changed = rows + product(left[first:last], right)
        return changed.reshape(-1)[start - first * cols : stop - first * cols]


@dataclass(frozen=True)
class FoldedWhole(Folded):
    """Weight that the adapter stores whole (`modules_to_save`)."""

    checkpoint: Checkpoint
    saved: TensorInfo

    @property
    def adapter(self) -> Checkpoint:
        """The adapter's tensors."""
        return self.checkpoint

    @property
    def wide_dtype(self) -> str:
        """Dtype of `read_wide`: that of the adapter's tensor, widened."""
        return "F64" if self.saved.dtype == "F64" else "F32"

    def read_wide(self, source: TensorSource, start: int, stop: int) -> NDArray[np.floating]:
        """Return elements `[start, stop)`."""
        return read_wide(self.checkpoint, self.saved, start, stop)


def fold(model: Checkpoint, adapter: Adapter) -> FoldedAdapter:
    """
    Put the weights that an adapter makes of a model in the place of the model's own; they are read on demand.

    Args:
        model (`Checkpoint`): Full model; it is changed in place.
        adapter (`Adapter`): LoRA or DoRA, matched with this model.

    Raises:
        CheckpointError: If the adapter brings along a head that the model does not have.
    """
    if adapter.new_tensors:
        raise CheckpointError(
            f"{model.source.spec!r}: the adapter brings along {', '.join(sorted(adapter.new_tensors))}, which its "
            "base does not have. Fold it in first (`frmerge merge ADAPTER --base-model BASE --output-dir folded`), "
            "and pass 'folded'."
        )
    folded: dict[str, Folded] = {
        name: FoldedRows(model.tensors[name], delta) for name, delta in adapter.deltas.items()
    }
    folded |= {
        name: FoldedWhole(model.tensors[name], adapter.checkpoint, info) for name, info in adapter.dense.items()
    }
    put_in_place(model, folded)
    targets = dict.fromkeys(adapter.checkpoint.tensors, "")
    targets |= {part.name: name for name, delta in adapter.deltas.items() for part in delta.stored}
    targets |= {info.name: name for name, info in adapter.dense.items()} | dict(adapter.set_apart)
    return FoldedAdapter(adapter.checkpoint, targets, frozenset(info.name for info in adapter.base_layers.values()))


def put_in_place(model: Checkpoint, folded: Mapping[str, Folded]) -> None:
    """Let a model read these weights by their recipes."""
    model.tensors |= {name: replace(recipe.info, recipe=recipe) for name, recipe in folded.items()}
    largest = max((recipe.info.numel for recipe in folded.values()), default=0)
    model.largest_computed = max(model.largest_computed, largest * _BYTES_AN_ELEMENT)


def folded_within(info: TensorInfo) -> list[Folded]:
    """Return the weights with an adapter that a tensor is made of: itself, or the single experts of a stack."""
    if info.recipe is None:
        return []
    if isinstance(info.recipe, Folded):
        return [info.recipe]
    return [recipe for part in info.recipe.parts for recipe in folded_within(part)]


def read_wide(source: TensorSource, info: TensorInfo, start: int, stop: int) -> NDArray[np.floating]:
    """Read elements `[start, stop)` of a tensor, copied, as float32 (float64 if stored as such)."""
    size = DTYPE_BITS[info.dtype] // 8
    values = widen(source.read_info(info, start * size, stop * size), info.dtype)
    source.release_info(info, start * size, stop * size)
    return values
