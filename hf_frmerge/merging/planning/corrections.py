"""Corrections of a merge: what calibration found should be added to the tensors that a method gives."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from xxhash import xxh3_128

from hf_frmerge.checkpoints.disk import create_file, disk_errors, rename
from hf_frmerge.checkpoints.folders import open_folder
from hf_frmerge.checkpoints.tensors.floats import widen
from hf_frmerge.checkpoints.tensors.reader import Checkpoint, TensorInfo, open_tensors_file
from hf_frmerge.errors import CheckpointError
from hf_frmerge.kernels.interface import Operand
from hf_frmerge.kernels.product import product

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from hf_frmerge.merging.planning.blocks import Piece

CORRECTIONS_FILE = "merge_corrections.safetensors"

_CHUNK = 1 << 24  # bytes read at a time

Form = Literal["start", "low_rank", "dense"]
"""Form of the corrections: none at all, factors of low rank, or one number for every weight."""


@dataclass(frozen=True)
class CalibrationRecord:
    """
    How corrections were found, and what they gain.

    Attributes:
        prompts: number of prompts of every expert that took part in the fit.
        held_out: number of prompts of every expert that judged it.
        tokens: number of tokens of all prompts.
        source: where the prompts came from: `"file"`, or `"self"` if the experts wrote them.
        digest: XXH3-128 of their token ids.
        options: settings of the fit, by name.
        form: form that was chosen.
        distances: form -> squared Fisher–Rao distance of the merge to every expert, in rad², mean over the tokens of
            its held-out prompts.
        seconds: CPU time of the fit.
    """

    prompts: tuple[int, ...]
    held_out: tuple[int, ...]
    tokens: int
    source: str
    digest: str
    options: dict[str, Any]
    form: Form
    distances: dict[str, tuple[float | None, ...]]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CalibrationRecord:
        """Read a record from the values of `to_dict`."""
        fields_of = {field.name: values[field.name] for field in fields(cls)}
        for name in ("prompts", "held_out"):
            fields_of[name] = tuple(fields_of[name])
        fields_of["distances"] = {form: tuple(row) for form, row in values["distances"].items()}
        return cls(**fields_of)

    @property
    def is_fitted(self) -> bool:
        """Whether anything is added to the merge without data."""
        return self.form != "start"

    def mean_distance(self, form: str) -> float:
        """Return the mean over the experts that have held-out prompts."""
        known = [value for value in self.distances[form] if value is not None]
        return sum(known) / len(known)


@dataclass(frozen=True)
class Correction:
    """
    Correction of one tensor: stored whole, or as the factors `up` `(rows, k)` and `down` `(k, columns)`.

    Attributes:
        cols: elements of a row of the tensor.
    """

    checkpoint: Checkpoint
    cols: int
    whole: TensorInfo | None = None
    up: TensorInfo | None = None
    down: TensorInfo | None = None

    def read(self, piece: Piece) -> Operand:
        """Return the elements of a piece, float32."""
        if self.whole is not None:
            values = _values(self.checkpoint, self.whole).reshape(-1)[piece.start : piece.stop]
        else:
            first = piece.start // self.cols
            up_RK, down_KC = self._factors
            rows = product(np.ascontiguousarray(up_RK[first : -(-piece.stop // self.cols)]), down_KC)
            values = rows.reshape(-1)[piece.start - first * self.cols : piece.stop - first * self.cols]
        return Operand(np.ascontiguousarray(values, dtype=np.float32).view(np.uint8), "F32", is_delta=True)

    @property
    def files(self) -> set[tuple[Checkpoint, str]]:
        """The file it is read from."""
        return {(self.checkpoint, CORRECTIONS_FILE)}

    @cached_property
    def _factors(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        assert self.up is not None and self.down is not None
        return _values(self.checkpoint, self.up), _values(self.checkpoint, self.down)


@dataclass(frozen=True)
class Corrections:
    """
    Open file of corrections.

    Attributes:
        checkpoint: its tensors: `NAME`, or the factors `NAME.up` and `NAME.down`.
        digest: XXH3-128 of the file.
    """

    checkpoint: Checkpoint
    digest: str

    def of(self, tensor: str, cols: int) -> Correction | None:
        """Return the correction of a tensor with rows of `cols` elements; `None` if it has none."""
        stored = self.checkpoint.tensors
        if tensor in stored:
            return Correction(self.checkpoint, cols, whole=stored[tensor])
        if f"{tensor}.up" in stored:
            return Correction(self.checkpoint, cols, up=stored[f"{tensor}.up"], down=stored[f"{tensor}.down"])
        return None


def read_corrections(folder: str) -> Corrections:
    """
    Open the corrections in a folder, local or behind a URL.

    Raises:
        CheckpointError: If there are none, or the file is damaged.
    """
    opened, digest = open_folder(folder), xxh3_128()
    if not opened.exists(CORRECTIONS_FILE):
        raise CheckpointError(
            f"{folder} has no {CORRECTIONS_FILE}, which its model was made with. Restore the file, or calibrate again."
        )
    checkpoint = open_tensors_file(folder, CORRECTIONS_FILE)
    size = checkpoint.files[CORRECTIONS_FILE]
    for start in range(0, size, _CHUNK):
        digest.update(opened.read(CORRECTIONS_FILE, start, min(start + _CHUNK, size)))
    return Corrections(checkpoint, digest.hexdigest())


def keep_corrections(corrections: Corrections, target: Path) -> None:
    """Copy the file of corrections to where the record of a merge lies."""
    source = corrections.checkpoint
    partial = target.with_name(f".{target.name}.partial")
    with disk_errors(target, "written"), os.fdopen(create_file(partial), "wb") as file:
        for start in range(0, size := source.files[CORRECTIONS_FILE], _CHUNK):
            file.write(source.folder.read(CORRECTIONS_FILE, start, min(start + _CHUNK, size)))
    rename(partial, target)


def _values(checkpoint: Checkpoint, info: TensorInfo) -> NDArray[np.float32]:
    data = checkpoint.read(info.name, 0, info.nbytes)
    return widen(data, info.dtype).astype(np.float32).reshape(info.shape)
