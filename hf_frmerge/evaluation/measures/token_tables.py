"""What models predicted, token by token, on disk: written once, compared with every later model."""

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

# Column -> dtype and width; width 1 is one number a token.
Columns = Mapping[str, tuple[str, int]]

_DTYPES = {"F64": "<f8", "F32": "<f4", "I32": "<i4"}
# Step of a sequence that fills [0, 1) as evenly as any (Weyl): the golden ratio's.
_GOLDEN = 0.6180339887498949


class TokenTable:
    """
    Numbers of every predicted token, one safetensors file, read and written in ranges of rows.

    Several processes may write rows of one table. Nothing of it stays in memory.

    Args:
        path (`Path`): The file.
        n_rows (`int`): Predicted tokens.
        columns (`Columns`): Name -> dtype (`F64`, `F32`, `I32`) and width.
    """

    def __init__(self, path: Path, n_rows: int, columns: Columns) -> None:
        self.path, self.n_rows, self.columns = path, n_rows, dict(columns)
        header, self._offsets, self._size = _layout(n_rows, columns)
        self._header = header
        self._fd = -1

    def create(self) -> TokenTable:
        """Make the file, filled with zeros."""
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            os.ftruncate(fd, self._size)
            os.pwrite(fd, self._header, 0)
        finally:
            os.close(fd)
        return self

    def open(self, *, write: bool = False) -> TokenTable:
        """
        Open the file.

        Raises:
            ValueError: If it is not of this shape.
        """
        self._fd = os.open(self.path, os.O_RDWR if write else os.O_RDONLY)
        if os.fstat(self._fd).st_size != self._size or os.pread(self._fd, len(self._header), 0) != self._header:
            self.close()
            raise ValueError(f"{self.path} is damaged.")
        return self

    def close(self) -> None:
        """Close the file; a second time does nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def write(self, column: str, start: int, values: NDArray[np.generic]) -> None:
        """
        Write rows from `start` on.

        Raises:
            MergeError: If the disk is full.
        """
        dtype = _DTYPES[self.columns[column][0]]
        data = np.ascontiguousarray(values, dtype=dtype).reshape(-1).view(np.uint8)
        position = self._position(column, start)
        view = data.data
        try:
            while view:
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
        """Read rows `[start, stop)`: `(n,)`, or `(n, width)` if the column is wider than 1."""
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
        dtype, width = self.columns[column]
        return self._offsets[column] + row * width * np.dtype(_DTYPES[dtype]).itemsize


def _layout(n_rows: int, columns: Columns) -> tuple[bytes, dict[str, int], int]:
    """Header of the safetensors file, where every column starts, and the file's size."""
    entries, end = {}, 0
    for name, (dtype, width) in columns.items():
        start, end = end, end + n_rows * width * np.dtype(_DTYPES[dtype]).itemsize
        shape = [n_rows] if width == 1 else [n_rows, width]
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    offsets = {name: len(header) + entry["data_offsets"][0] for name, entry in entries.items()}  # type: ignore[index,operator]
    return header, offsets, len(header) + end


@dataclass(frozen=True)
class OutputFormat:
    """
    How the distribution of a token is stored.

    Whole, or as a sketch: the `top_k` likeliest outcomes, and as many drawn from all others. The draws are spread
    evenly over the tail's cumulative probability, with an offset that depends on the token's place in the text alone:
    nothing is left to a random generator, to the batch or to the process.

    Attributes:
        vocab_size: outcomes, V.
        top_k: 0 for the whole distribution.
    """

    vocab_size: int
    top_k: int

    @property
    def is_exact(self) -> bool:
        """Whether nothing is left out."""
        return not 0 < self.top_k < self.vocab_size

    @property
    def columns(self) -> Columns:
        """Columns of the table of one model on one text."""
        scores = {"log_prob": ("F64", 1), "first": ("I32", 1)}
        if self.is_exact:
            return scores | {"log_probs": ("F32", self.vocab_size)}
        return scores | {"ids": ("I32", 2 * self.top_k), "log_probs": ("F32", 2 * self.top_k), "tail": ("F64", 1)}

    def write(self, table: TokenTable, start: int, rows: Predictions) -> None:
        """Store predictions, the first of which is number `start` of the text."""
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
    """Systematic sample of `n` outcomes a row, `(rows, n)`, with probability in proportion to `tail`, `(rows, V)`."""
    cumulated = tail.cumsum(dim=-1)
    offsets = np.modf(_GOLDEN * (1 + position + np.arange(len(tail))))[0]
    grid = torch.from_numpy((np.arange(n) + offsets[:, None]) / n).to(tail.device)
    drawn = torch.searchsorted(cumulated, (grid * cumulated[:, -1:]).to(tail.dtype), right=True)
    return drawn.clamp_(max=tail.shape[-1] - 1).cpu().numpy()


class OutputCache:
    """
    Folders of tables, each whole or absent, named by what they were computed from.

    Args:
        folder (`Path`): Where they are kept; may be shared by several runs.
        run (`str`): Name of this run, the same on every process: tells its unfinished folders from others'.
    """

    def __init__(self, folder: Path, run: str) -> None:
        self.folder, self.run = folder, run

    def path(self, key: str) -> Path:
        """Return the folder of a key, finished or not yet there."""
        return self.folder / key

    def unfinished(self, key: str) -> Path:
        """Return the folder this run fills for a key."""
        return self.folder / f".{key}.{self.run}"

    def has(self, key: str) -> bool:
        """Tell whether a finished folder is there."""
        return self.path(key).is_dir()

    def begin(self, key: str) -> Path:
        """Make the folder to fill; one process does it."""
        path = self.unfinished(key)
        path.mkdir(parents=True, exist_ok=True)
        return path

    def publish(self, key: str) -> None:
        """Give the filled folder its name; one process does it, after all have written."""
        try:
            self.unfinished(key).rename(self.path(key))
        except OSError:
            # Another run was faster; its folder holds the same.
            if not self.path(key).is_dir():
                raise

    def discard_all_of(self, key: str) -> None:
        """Remove the finished folders of a model: its own, and those that compare it with others."""
        for path in self.folder.glob(f"*{key}*"):
            shutil.rmtree(path, ignore_errors=True)

    def clear(self) -> None:
        """Remove what this run left unfinished."""
        with suppress(FileNotFoundError):
            for path in self.folder.glob(f".*.{self.run}"):
                shutil.rmtree(path, ignore_errors=True)
