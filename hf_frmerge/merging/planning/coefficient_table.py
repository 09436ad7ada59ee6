"""Read and write coefficient tables, and check one that takes the place of a method against the tensors of a merge."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from xxhash import xxh3_128_hexdigest

from hf_frmerge.checkpoints.disk import write_file
from hf_frmerge.checkpoints.folders import open_folder
from hf_frmerge.checkpoints.json_text import parse_json
from hf_frmerge.checkpoints.tensors.floats import widen
from hf_frmerge.checkpoints.tensors.header import read_header
from hf_frmerge.checkpoints.tensors.reader import some
from hf_frmerge.errors import ArgumentError, CheckpointError, NonFiniteError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hf_frmerge.merging.planning.tensor_step import TensorStep

COEFFICIENTS_FILE = "merge_coefficients.safetensors"


@dataclass(frozen=True)
class CoefficientTable:
    """
    Coefficients of every tensor, on the points of a merge.

    Attributes:
        origin: path it was read from, for messages.
        rows: tensor -> `(blocks, experts)`, float64.
        space: whether the points are weights or deltas, if the file says so.
        digest: digest of the file. The journal keeps it, so that a resume with another table is refused.
    """

    origin: str
    rows: dict[str, NDArray[np.float64]]
    space: str | None
    digest: str


def read_coefficients(path: str | Path) -> CoefficientTable:
    """
    Read a coefficient table.

    Args:
        path: A safetensors file, or the folder of a merge, local or behind a URL.

    Raises:
        CheckpointError: If there is no table, it is damaged, or a tensor in it is not a matrix of floats.
        NonFiniteError: If a coefficient is NaN or infinite.
    """
    where, name = str(path), COEFFICIENTS_FILE
    if where.endswith(".safetensors"):
        where, _, name = where.rpartition("/")
    folder = open_folder(where or ".")
    where = f"{where}/{name}" if where else name
    if not folder.exists(name):
        raise CheckpointError(
            f"There is no table of coefficients {where}. Pass a safetensors file, or the folder of a finished merge."
        )
    try:
        infos, size = read_header(folder, name, where)
        data = folder.read(name, 0, size)
    except (CheckpointError, OSError) as error:
        raise CheckpointError(f"{where} is damaged: {error} Restore the file, or merge again.") from error
    rows = {}
    for info in infos:
        if len(info.shape) != 2 or not info.is_float or 0 in info.shape:
            raise CheckpointError(
                f"{where}: {info.name!r} is {info.dtype} of shape {list(info.shape)}, expected floating-point "
                "numbers, blocks down and experts across."
            )
        stored = np.frombuffer(data, np.uint8, info.nbytes, info.offset)
        rows[info.name] = widen(stored, info.dtype).astype(np.float64).reshape(info.shape)
        if not np.isfinite(rows[info.name]).all():
            raise NonFiniteError(f"{where}: a coefficient of {info.name!r} is not a finite number. Correct it.")
    return CoefficientTable(str(path), rows, _space(data), xxh3_128_hexdigest(data))


def write_coefficients(folder: Path, rows: Mapping[str, NDArray[np.float64]], space: str) -> None:
    """
    Write a coefficient table: tensor -> float64 `(blocks, experts)`, on the points of a merge.

    With it and the experts, the merged tensors can be derived again bit for bit.
    """
    from safetensors.numpy import save

    # One entry: safetensors writes several in any order, and the file is compared bit for bit.
    write_file(folder / COEFFICIENTS_FILE, save(dict(rows), metadata={"space": space}))


def _space(data: bytes) -> str | None:
    """Return the space that the metadata of a table names, if any."""
    metadata = parse_json(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__")
    space = metadata.get("space") if isinstance(metadata, dict) else None
    return space if space in ("weights", "deltas") else None


def cut_as_given(steps: Sequence[TensorStep], table: CoefficientTable, n_experts: int) -> list[TensorStep]:
    """
    Cut every merged tensor into as many blocks as the table has rows for it; each tensor is a group of its own.

    Raises:
        ArgumentError: If a tensor has no coefficients, or they do not fit it or the experts; or if the table has
            coefficients for a tensor that is not merged.
    """
    merged = {step.name for step in steps if step.action == "merge"}
    missing, unknown = sorted(merged - table.rows.keys()), sorted(table.rows.keys() - merged)
    if missing:
        raise ArgumentError(
            f"{table.origin} has no coefficients for {some(missing)}, which would be merged. Add a row of them for "
            "every such tensor."
        )
    if unknown:
        raise ArgumentError(
            f"{table.origin} has coefficients for {some(unknown)}, which is no tensor to merge here. Leave it out, or "
            "pass the models that the table is for."
        )
    return [_cut(step, table, n_experts) if step.action == "merge" else step for step in steps]


def cut_as_fitted(steps: Sequence[TensorStep], table: CoefficientTable, n_experts: int) -> list[TensorStep]:
    """Cut the merged tensors that a fit found coefficients for as `cut_as_given` does; others stay as they are."""
    return [
        _cut(step, table, n_experts) if step.action == "merge" and step.name in table.rows else step for step in steps
    ]


def _cut(step: TensorStep, table: CoefficientTable, n_experts: int) -> TensorStep:
    n_blocks, n_columns = table.rows[step.name].shape
    if n_columns != n_experts:
        raise ArgumentError(
            f"{table.origin}: {step.name!r} has coefficients for {n_columns} experts, but {n_experts} are given."
        )
    # Of a tensor that stacks matrices the rows of each count, too.
    n_rows = math.prod(step.shape[:-1] or step.shape)
    if n_blocks > 1 and n_rows % n_blocks:
        raise ArgumentError(
            f"{table.origin}: {step.name!r} has {n_blocks} rows of coefficients, but a tensor of shape "
            f"{list(step.shape)} cannot be cut into that many blocks of whole rows. Give one, or as many as divide it."
        )
    return replace(step, group=step.name, n_blocks=n_blocks, block_len=step.numel // n_blocks)
