"""Store the predictions of models on disk, token by token, so that each later model is compared with them."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hf_frmerge.errors import MergeError
from hf_frmerge.evaluation.models.predictions import Predictions

# Column name -> dtype and width; width 1 is one number a token.
Columns = Mapping[str, tuple[str, int]]

# safetensors files are little-endian on every machine.
_DTYPES = {"F64": "<f8", "F32": "<f4", "I32": "<i4"}
# Golden ratio minus 1. The fractional parts of its multiples fill [0, 1) most evenly (a Weyl sequence).
_GOLDEN = 0.6180339887498949


class TokenTable:
    """
    Table with one row per predicted token, in a safetensors file, read and written in ranges of rows.

    Several processes may write different rows of one table. No row is kept in memory.

    Args:
        path (`Path`): File of the table.
        n_rows (`int`): Number of predicted tokens.
        columns (`Columns`): Name -> dtype (`F64`, `F32`, `I32`) and width.
    """

    def __init__(self, path: Path, n_rows: int, columns: Columns) -> None:
        self.path, self.n_rows, self.columns = path, n_rows, dict(columns)
        header, self._offsets, self._size = _layout(n_rows, columns)
        self._header = header
        self._fd = -1

    def create(self) -> TokenTable:
        """Create the file, filled with zeros; an older one is overwritten."""
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            os.ftruncate(fd, self._size)  # sparse: disk blocks are taken by `write`, which reports a full disk
            os.pwrite(fd, self._header, 0)
        finally:
            os.close(fd)
        return self

    def open(self, *, write: bool = False) -> TokenTable:
        """
        Open the file, and check its size and header.

        Args:
            write (`bool`, *optional*, defaults to `False`): Open for reading and writing; else for reading.

        Raises:
            ValueError: If the file is truncated or has other columns or another number of rows.
        """
        self._fd = os.open(self.path, os.O_RDWR if write else os.O_RDONLY)
        if os.fstat(self._fd).st_size != self._size or os.pread(self._fd, len(self._header), 0) != self._header:
            self.close()
            raise ValueError(f"{self.path} is damaged.")
        return self

    def close(self) -> None:
        """Close the file; does nothing if it is closed."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def write(self, column: str, start: int, values: NDArray[np.generic]) -> None:
        """
        Write values of a column to the rows from `start` on.

        Args:
            column (`str`): Name of the column.
            start (`int`): First row.
            values (`np.ndarray`): `(n,)`, or `(n, width)` for a wider column; converted to the column's dtype.

        Raises:
            MergeError: If the disk is full.
        """
        dtype = _DTYPES[self.columns[column][0]]
        data = np.ascontiguousarray(values, dtype=dtype).reshape(-1).view(np.uint8)
        position = self._position(column, start)
        view = data.data
        try:
            while view:  # pwrite may write less than it is given: on Linux at most 2 GiB
                count = os.pwrite(self._fd, view, position)
                view, position = view[count:], position + count
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            free = shutil.disk_usage(self.path.parent).free
            raise MergeError(
                f"No room in {self.path.parent} for the outputs of the experts: {self._size / 1e9:.2f} GB a model and "
                f"text, {free / 1e9:.2f} GB are free. Make room, lower `top_k`, or set HF_FRMERGE_CACHE."
            ) from error

    def read(self, column: str, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """
        Read rows `[start, stop)` of a column, by default to the end: `(n,)`, or `(n, width)` for a wider column.

        Raises:
            MergeError: If the file became shorter since it was opened.
        """
        dtype, width = self.columns[column]
        stop = self.n_rows if stop is None else stop
        out = np.empty((stop - start, width), _DTYPES[dtype])
        view, position = out.reshape(-1).view(np.uint8).data, self._position(column, start)
        while view:
            count = os.preadv(self._fd, [view], position)
            if count == 0:
                raise MergeError(f"{self.path} was cut short by another program. Evaluate again.")
            view, position = view[count:], position + count
        return out[:, 0] if width == 1 else out

    def _position(self, column: str, row: int) -> int:
        """Return the offset of a row in the file, in bytes."""
        dtype, width = self.columns[column]
        return self._offsets[column] + row * width * np.dtype(_DTYPES[dtype]).itemsize


def _layout(n_rows: int, columns: Columns) -> tuple[bytes, dict[str, int], int]:
    """Return the safetensors header, the offset of every column in the file, and the file's size in bytes."""
    entries, end = {}, 0
    for name, (dtype, width) in columns.items():
        start, end = end, end + n_rows * width * np.dtype(_DTYPES[dtype]).itemsize
        shape = [n_rows] if width == 1 else [n_rows, width]
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(entries).encode()
    # The format asks for data aligned to 8 bytes, and pads the header with spaces.
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    offsets = {name: len(header) + entry["data_offsets"][0] for name, entry in entries.items()}  # type: ignore[index,operator]
    return header, offsets, len(header) + end


@dataclass(frozen=True)
class OutputFormat:
    """
    Storage of next-token distributions: in full, or as a sketch.

    A sketch holds the `top_k` likeliest outcomes and `top_k` more drawn from the tail, that is, all others. The draws
    are spaced evenly over the cumulative probability of the tail, with an offset that depends only on the token's
    position in the text. So the same text gives the same sketch for any batch size and number of processes.

    Attributes:
        vocab_size: number of outcomes, V.
        top_k: likeliest outcomes kept; 0, or `vocab_size` and more, stores full distributions.
    """

    vocab_size: int
    top_k: int

    @property
    def is_exact(self) -> bool:
        """Whether full distributions are stored."""
        return not 0 < self.top_k < self.vocab_size

    @property
    def columns(self) -> Columns:
        """Columns of the table of a model on a text."""
        scores = {"log_prob": ("F64", 1), "first": ("I32", 1)}
        if self.is_exact:
            return scores | {"log_probs": ("F32", self.vocab_size)}
        return scores | {"ids": ("I32", 2 * self.top_k), "log_probs": ("F32", 2 * self.top_k), "tail": ("F64", 1)}

    def write(self, table: TokenTable, start: int, rows: Predictions) -> None:
        """Write distributions to the rows from `start` on; the caller writes `log_prob` and `first`."""
        if self.is_exact:
            table.write("log_probs", start, rows.log_probs())
            return
        top = rows.logits.topk(self.top_k, dim=-1).indices
        tail = rows.exponentials.scatter(1, top, 0.0)
        ids = np.concatenate([top.cpu().numpy(), _draw(tail, self.top_k, start)], axis=1)
        table.write("ids", start, ids)
        table.write("log_probs", start, rows.log_probs(ids))
        whole = rows.exponentials.sum(dim=-1, dtype=torch.float64)
        table.write("tail", start, (tail.sum(dim=-1, dtype=torch.float64) / whole).cpu().numpy())


def _draw(tail: torch.Tensor, n: int, position: int) -> NDArray[np.int64]:
    """
    Draw a systematic sample of `n` outcomes a row, `(rows, n)`, in proportion to `tail`, `(rows, V)`.

    An outcome with share `s` of the tail is drawn `n * s` times, rounded up or down; independent draws are noisier.
    """
    cumulated = tail.cumsum(dim=-1)
    offsets = np.modf(_GOLDEN * (1 + position + np.arange(len(tail))))[0]
    grid = torch.from_numpy((np.arange(n) + offsets[:, None]) / n).to(tail.device)
    # right=True never picks an outcome of probability 0; the clamp is for a last grid point that rounding puts past V.
    drawn = torch.searchsorted(cumulated, (grid * cumulated[:, -1:]).to(tail.dtype), right=True)
    return drawn.clamp_(max=tail.shape[-1] - 1).cpu().numpy()


class OutputCache:
    """
    Cache of table folders, each complete or absent, under a key that identifies what they were computed from.

    A run fills a hidden folder and renames it when it is complete, so an interrupted run leaves nothing half done.

    Args:
        folder (`Path`): Folder of the cache; several runs may share it.
        run (`str`): Name of this run, the same on every process; it keeps unfinished folders of runs apart.
    """

    def __init__(self, folder: Path, run: str) -> None:
        self.folder, self.run = folder, run

    def path(self, key: str) -> Path:
        """Return the folder of a key, whether it exists or not."""
        return self.folder / key

    def unfinished(self, key: str) -> Path:
        """Return the hidden folder that this run fills for a key."""
        return self.folder / f".{key}.{self.run}"

    def has(self, key: str) -> bool:
        """Return whether the folder of a key is complete."""
        return self.path(key).is_dir()

    def begin(self, key: str) -> Path:
        """Create the folder to fill; call it on one process."""
        path = self.unfinished(key)
        path.mkdir(parents=True, exist_ok=True)
        return path

    def publish(self, key: str) -> None:
        """Rename the filled folder to its key; call it on one process, after all have written."""
        try:
            self.unfinished(key).rename(self.path(key))
        except OSError:
            # Another run published the same key first; equal keys mean equal content.
            if not self.path(key).is_dir():
                raise

    def discard_all_of(self, key: str) -> None:
        """Remove the complete folders of a model, its comparisons with other models included."""
        for path in self.folder.glob(f"*{key}*"):
            shutil.rmtree(path, ignore_errors=True)

    def clear(self) -> None:
        """Remove the unfinished folders of this run."""
        with suppress(FileNotFoundError):
            for path in self.folder.glob(f".*.{self.run}"):
                shutil.rmtree(path, ignore_errors=True)
