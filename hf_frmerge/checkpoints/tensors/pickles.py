"""
Read where the tensors of a pickle of torch lie in its file. Imports torch.

`torch.save` writes a zip file: a pickle that describes the tensors, and their bytes beside it, uncompressed. Only the
description is opened here, by `torch.load(weights_only=True)`, which runs none of the code that a pickle may name, and
without loading anything; the bytes are read in place afterwards, like those of a safetensors file.
"""

from __future__ import annotations

import io
import pickle
import re
import zipfile
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from hf_frmerge.checkpoints.local_folder import LocalFolder
from hf_frmerge.checkpoints.remote_folder import RemoteFolder
from hf_frmerge.checkpoints.tensors.header import DTYPE_BITS, TensorInfo
from hf_frmerge.errors import CheckpointError

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from hf_frmerge.checkpoints.tensors.header import TensorSource

_CODES = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "int16": "I16", "int32": "I32", "int64": "I64", "float16": "F16",
    "bfloat16": "BF16", "float32": "F32", "float64": "F64", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
}  # fmt: skip

_BUFFER = 1 << 16
_ZIP = b"PK\x03\x04"
_CODE = re.compile(r"GLOBAL (\S+)")


def read_pickle(folder: LocalFolder | RemoteFolder, file: str, spec: str) -> tuple[list[TensorInfo], int]:
    """
    Find the tensors in a file of `torch.save`; as `read_header` for a safetensors file, and of its arguments.

    Tensors that share memory get the same bytes. One whose elements lie in another order is read through a recipe.

    Returns:
        `tuple[list[TensorInfo], int]`: Tensors in the order of the dictionary, and the size of the file in bytes.

    Raises:
        CheckpointError: If the file holds anything but tensors by name, or is truncated, damaged or in an old format.
    """
    where, size = f"{spec!r}: {file}", folder.size(file)
    if folder.read(file, 0, min(len(_ZIP), size)) != _ZIP:
        raise CheckpointError(
            f"{where} is no zip file, as torch writes it since 1.6, and cannot be read in place. Save it anew:\n"
            "    import torch\n"
            f'    file = "FOLDER/{file}"\n'
            "    torch.save(torch.load(file, weights_only=True), file)"
        )
    opened = io.BufferedReader(_Opened(folder, file, size), _BUFFER)
    try:
        extents = _extents(opened, size)
        opened.seek(0)
        tensors = _describe(opened)
    except pickle.UnpicklingError as error:
        code = _CODE.search(str(error))
        raise CheckpointError(
            f"{where} holds more than tensors{f' ({code[1]})' if code else ''}: to open it, code that it names would "
            "have to run, which is never done. Ask those who made it for the weights as safetensors."
        ) from error
    except (EOFError, KeyError, RuntimeError, ValueError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{where} is truncated or damaged ({error}). Download it again.") from error
    if not (isinstance(tensors, Mapping) and all(isinstance(name, str) for name in tensors)):
        raise CheckpointError(f"{where} holds a {type(tensors).__name__}, expected tensors by name, a `state_dict`.")
    return [_info(name, tensor, file, extents, where) for name, tensor in tensors.items()], size


@dataclass(frozen=True)
class Strided:
    """Elements of stored bytes at regular distances, such as a matrix that was transposed before it was saved."""

    stored: TensorInfo
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    """Distances in elements."""

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        """The tensors it is made of."""
        return (self.stored,)

    @cached_property
    def _row_bytes(self) -> int:
        return int(np.prod(self.shape[1:])) * DTYPE_BITS[self.stored.dtype] // 8

    def read(self, source: TensorSource, start: int, stop: int) -> NDArray[np.uint8]:
        """Return bytes `[start, stop)`; the rows they are in are put together for it."""
        size = DTYPE_BITS[self.stored.dtype] // 8
        first, last = start // self._row_bytes, -(-stop // self._row_bytes)
        elements = source.read_info(self.stored).view(f"V{size}")
        whole = np.lib.stride_tricks.as_strided(elements, self.shape, [size * step for step in self.strides])
        rows = np.ascontiguousarray(whole[first:last]).reshape(-1).view(np.uint8)
        source.release_info(self.stored)
        return rows[start - first * self._row_bytes : stop - first * self._row_bytes]


class _Opened(io.RawIOBase):
    """File of a folder, which may be remote, for those that read files."""

    def __init__(self, folder: LocalFolder | RemoteFolder, file: str, size: int) -> None:
        self._folder, self._file, self._size, self._at = folder, file, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        stop = min(self._at + len(buffer), self._size)
        data = self._folder.read(self._file, self._at, stop) if stop > self._at else b""
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


@dataclass(frozen=True)
class _Extents:
    """Where the entries of the zip file lie that are stored uncompressed: first byte of the header, last byte."""

    starts: tuple[int, ...]
    ends: tuple[int, ...]

    def hold(self, start: int, stop: int) -> bool:
        """Whether bytes `[start, stop)` are those of one entry."""
        place = bisect_right(self.starts, start) - 1
        return place >= 0 and stop <= self.ends[place]


def _extents(opened: IO[bytes], size: int) -> _Extents:
    with zipfile.ZipFile(opened) as archive:
        entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
        order = next((archive.read(entry) for entry in entries if entry.filename.endswith("/byteorder")), b"little")
    if order != b"little":
        raise ValueError("its numbers are big-endian")
    ends = [*(entry.header_offset for entry in entries[1:]), size]
    plain = [
        (entry.header_offset, end) for entry, end in zip(entries, ends) if entry.compress_type == zipfile.ZIP_STORED
    ]
    return _Extents(tuple(start for start, _ in plain), tuple(end for _, end in plain))


def _describe(opened: IO[bytes]) -> Any:
    """Return what was saved, its tensors without their elements."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode  # the documented way to load a description alone

    with FakeTensorMode():
        return torch.load(opened, weights_only=True)


def _info(name: str, tensor: Any, file: str, extents: _Extents, where: str) -> TensorInfo:
    import torch

    if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.is_neg():
        raise CheckpointError(
            f"{where} holds a {type(tensor).__name__} under {name!r}, expected tensors by name alone. If the weights "
            "are in there, save what holds them under this file name: "
            "`torch.save(torch.load(FILE, weights_only=True)[NAME], FILE)`."
        )
    code = _CODES.get(str(tensor.dtype).removeprefix("torch."))
    if code is None:
        raise CheckpointError(f"{where}: tensor {name!r} is {tensor.dtype}, which cannot be read. Convert it first.")
    begin = _offset(tensor, where)
    size = DTYPE_BITS[code] // 8
    steps = zip(tensor.shape, tensor.stride())
    reach = int(1 + sum((length - 1) * step for length, step in steps)) if tensor.numel() else 0
    start = begin + int(tensor.storage_offset()) * size
    if min(tensor.stride(), default=0) < 0 or not extents.hold(start, start + reach * size):
        raise CheckpointError(
            f"{where}: the bytes of tensor {name!r} are not where the file says. It is damaged; download it again."
        )
    shape = tuple(tensor.shape)
    if tensor.is_contiguous():
        return TensorInfo(name, code, shape, file, start, reach * size)
    stored = TensorInfo(name, code, (reach,), file, start, reach * size)
    recipe = Strided(stored, shape, tuple(tensor.stride()))
    return TensorInfo(name, code, shape, file, 0, tensor.numel() * size, recipe)


def _offset(tensor: torch.Tensor, where: str) -> int:
    """Return the byte of the file at which the memory of a tensor begins."""
    offset = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    if offset is None:
        raise CheckpointError(f"{where} is a pickle, which is read with torch 2.7 or later: pip install -U torch.")
    return int(offset)
