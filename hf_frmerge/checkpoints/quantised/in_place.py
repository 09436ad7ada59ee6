"""Put dequantised weights in the place of the stored tensors that they are made of."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from hf_frmerge.checkpoints.quantised.recent import Recent
from hf_frmerge.checkpoints.tensors.reader import Checkpoint, TensorInfo

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from hf_frmerge.checkpoints.quantised.form import Format, Group
    from hf_frmerge.checkpoints.tensors.header import TensorSource

_BYTES_AN_ELEMENT = 16
"""Codes, numbers in float32 and what is made of them, all at a time."""


@dataclass(frozen=True)
class Dequantised:
    """Numbers that the codes of a quantiser stand for; computed as a whole, since codes may lie in any order."""

    info: TensorInfo
    parts: tuple[TensorInfo, ...]
    form: Format
    recent: Recent

    def read(self, source: TensorSource, start: int, stop: int) -> NDArray[np.uint8]:
        """Return bytes `[start, stop)` of the tensor."""
        return self.recent.get(self.info.name, lambda: self._compute(source))[start:stop]

    def _compute(self, source: TensorSource) -> NDArray[np.uint8]:
        # Copied, as torch takes no arrays that may not be written to.
        stored = {part.name: (part, source.read_info(part).copy()) for part in self.parts}
        for part in self.parts:
            source.release_info(part)
        return self.form.convert(self.info, stored)


@dataclass(frozen=True)
class DequantisedRows:
    """The same where a row is made of the codes of that row alone: only the rows that are asked for are computed."""

    info: TensorInfo
    stored: TensorInfo
    form: Format
    recent: Recent

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        """The tensor it is made of."""
        return (self.stored,)

    def read(self, source: TensorSource, start: int, stop: int) -> NDArray[np.uint8]:
        """Return bytes `[start, stop)` of the tensor."""
        row_bytes = self.info.shape[-1] * self.form.itemsize
        first, last = start // row_bytes, -(-stop // row_bytes)
        rows = self.recent.get(f"{self.info.name} {first}:{last}", lambda: self._compute(source, first, last))
        return rows[start - first * row_bytes : stop - first * row_bytes]

    def _compute(self, source: TensorSource, first: int, last: int) -> NDArray[np.uint8]:
        row_bytes = self.stored.nbytes // math.prod(self.info.shape[:-1])
        data = source.read_info(self.stored, first * row_bytes, last * row_bytes).copy()
        source.release_info(self.stored, first * row_bytes, last * row_bytes)
        some_rows, some_codes = (
            replace(info, shape=(last - first, info.shape[-1])) for info in (self.info, self.stored)
        )
        return self.form.convert(some_rows, {self.stored.name: (some_codes, data)})


def put_in_place(checkpoint: Checkpoint, form: Format, groups: Mapping[str, Group]) -> set[str]:
    """
    Let the weights of a checkpoint be computed when they are read.

    What does not work should be known before anything else is read: one of them is computed at once.

    Args:
        checkpoint: Its tensors are changed.
        form: Computes the weights.
        groups: Weights by name.

    Returns:
        `set[str]`: Names of the stored tensors that they are made of.
    """
    recent = Recent()
    made: dict[str, TensorInfo] = {}
    whole = [0]
    for name, (shape, parts) in groups.items():
        info = TensorInfo(name, form.dtype, shape, parts[0].file, 0, math.prod(shape) * form.itemsize)
        if name in form.by_rows:
            recipe: Dequantised | DequantisedRows = DequantisedRows(info, parts[0], form, recent)
        else:
            recipe = Dequantised(info, parts, form, recent)
            whole.append(info.numel)
        made[parts[0].name] = replace(info, recipe=recipe)
    used = {part.name for _, parts in groups.values() for part in parts}
    kept = {name: made.get(name, info) for name, info in checkpoint.tensors.items() if name not in used - made.keys()}
    checkpoint.tensors = {info.name: info for info in kept.values()}
    checkpoint.quantisation = form.title
    checkpoint.largest_computed = max(whole) * _BYTES_AN_ELEMENT
    checkpoint.read(min(made.values(), key=lambda info: info.nbytes).name)
    return used
