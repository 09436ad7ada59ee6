"""
Parse and check the header of a GGUF file before anybody else reads it.

The readers of the gguf package and of transformers believe the counts, lengths and offsets in the file. What they get
has been walked through here: every length fits into the file, and there is no more of anything than a model has.
"""

from __future__ import annotations

import math
import struct
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hf_frmerge.errors import CheckpointError, some

if TYPE_CHECKING:
    from hf_frmerge.checkpoints.local_folder import LocalFolder
    from hf_frmerge.checkpoints.remote_folder import RemoteFolder

EXTRA = "pip install -U 'hf_frmerge[gguf]'"

FLOATS = {0: "F32", 1: "F16", 30: "BF16"}
"""Types whose elements are plain numbers -> dtype code."""

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9

_CHUNK = 1 << 20
_MAX_HEADER_BYTES = 100_000_000  # ten times that of the largest vocabularies
_MAX_ELEMENTS = 1 << 22  # of all arrays; a vocabulary of 262,144 tokens has 1.3 million with its scores and merges
_MAX_ENTRIES = 1 << 17  # of the settings, and of the tensors
_MAX_COUNT = 4096
_MAX_DIMENSIONS = 4  # of ggml
_MAX_ALIGNMENT = 1 << 20


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """
    One tensor of a file.

    Attributes:
        name: its name in the file, such as `"blk.0.attn_q.weight"`.
        type: number of its ggml type.
        shape: number of elements along each dimension, the last one changes fastest.
        offset, nbytes: where its bytes are in the file.
        row_bytes: bytes of the elements that its last index runs over.
    """

    name: str
    type: int
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    row_bytes: int


@dataclass(frozen=True)
class GgufHeader:
    """What a file says of itself: its settings, with None in the place of a list, and its tensors in file order."""

    settings: Mapping[str, Any]
    tensors: tuple[GgufTensor, ...]

    @property
    def architecture(self) -> str:
        """Name that llama.cpp has for the kind of model."""
        return str(self.settings["general.architecture"])


def read_gguf_header(folder: LocalFolder | RemoteFolder, file: str, spec: str) -> GgufHeader:
    """
    Read and check the header of one GGUF file; `spec` names the model in errors.

    Raises:
        CheckpointError: If the gguf package, which knows the types of tensors, is not installed, or the file is
            truncated, or has a header that makes no sense.
    """
    try:
        from gguf.constants import GGML_QUANT_SIZES
    except ImportError as error:
        raise CheckpointError(
            f"{spec!r} is a GGUF file. It can be dequantised while it is read with a package that is not installed: "
            f"{EXTRA}. Or merge the checkpoints that it was made from."
        ) from error
    where, size = f"{spec!r}: {file}", folder.size(file)
    cursor = _Cursor(folder, file, size, where)
    n_tensors, settings = _read_settings(cursor, where)
    blocks = {int(kind): sizes for kind, sizes in GGML_QUANT_SIZES.items()}
    tensors = [_read_tensor(cursor, blocks, where) for _ in range(n_tensors)]
    alignment = settings.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 0 < alignment <= _MAX_ALIGNMENT or alignment & (alignment - 1):
        raise CheckpointError(f"{where}: general.alignment is {alignment!r}, expected a power of two.")
    start = -(-cursor.at // alignment) * alignment
    placed = [
        GgufTensor(each.name, each.type, each.shape, start + each.offset, each.nbytes, each.row_bytes)
        for each in sorted(tensors, key=lambda each: (each.offset, each.nbytes))
    ]
    _check_extents(placed, start, size, where)
    return GgufHeader(settings, tuple(placed))


def plain_dtype(types: Iterable[int]) -> str | None:
    """Return the dtype code that a file without codes was written in; None if it has codes."""
    kinds = set(types)
    if not kinds <= FLOATS.keys():
        return None
    # Short tensors are float32 in every file, so the other dtype is the model's.
    return next((FLOATS[kind] for kind in (30, 1) if kind in kinds), "F32")


class _Cursor:
    """Reads a header from its start, in large pieces, and never beyond the file."""

    def __init__(self, folder: LocalFolder | RemoteFolder, file: str, size: int, where: str) -> None:
        self._folder, self._file, self._size, self._where = folder, file, size, where
        self._held = bytearray()
        self.at = 0

    def take(self, count: int) -> bytes:
        """Return the next bytes."""
        end = self.at + count
        if end > self._size:
            raise CheckpointError(
                f"{self._where} is truncated or damaged: its header needs at least {end} bytes, the file has "
                f"{self._size}. Download it again."
            )
        if end > _MAX_HEADER_BYTES:
            raise CheckpointError(
                f"{self._where} has a header of more than {_MAX_HEADER_BYTES} bytes, which no model needs. Download "
                "it again."
            )
        if end > len(self._held):
            self._held += self._folder.read(self._file, len(self._held), min(self._size, end + _CHUNK))
            if end > len(self._held):
                raise CheckpointError(f"{self._where} became shorter while it was read. Download it again.")
        taken = bytes(self._held[self.at : end])
        self.at = end
        return taken

    def number(self, code: str) -> Any:
        """Return the next number, of a type of `struct`."""
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def text(self, what: str) -> str:
        """Return the next string."""
        try:
            return self.take(self.number("Q")).decode()
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self._where} is damaged: {what} is not UTF-8. Download it again.") from error


def _read_settings(cursor: _Cursor, where: str) -> tuple[int, dict[str, Any]]:
    """Return the number of tensors, and the settings."""
    magic = cursor.take(4)
    if magic != _MAGIC:
        way_out = "It looks like a Git LFS pointer; run `git lfs pull`" if magic == b"vers" else "Download it again"
        raise CheckpointError(f"{where} is not a GGUF file: it does not begin with {_MAGIC.decode()}. {way_out}.")
    version = cursor.number("I")
    if version not in _VERSIONS:
        swapped = " It is big-endian, which is not read." if version >> 16 and not version & 0xFFFF else ""
        raise CheckpointError(f"{where} is of version {version} of GGUF, expected one of {_VERSIONS}.{swapped}")
    n_tensors, n_settings = cursor.number("Q"), cursor.number("Q")
    for count, what in ((n_tensors, "tensors"), (n_settings, "settings")):
        if count > _MAX_ENTRIES:
            raise CheckpointError(f"{where} announces {count} {what}, more than any model has. Download it again.")
    settings: dict[str, Any] = {}
    n_elements = 0
    for _ in range(n_settings):
        key = cursor.text("the name of a setting")
        if key in settings:
            raise CheckpointError(f"{where} is damaged: it has the setting {key!r} twice. Download it again.")
        settings[key], count = _read_value(cursor, key, _MAX_ELEMENTS - n_elements, where)
        n_elements += count
    architecture = settings.get("general.architecture")
    if not isinstance(architecture, str):
        raise CheckpointError(f"{where} does not say of which architecture it is (general.architecture).")
    for key, value in settings.items():
        is_count = key.startswith(f"{architecture}.") and key.endswith("_count")  # of layers, heads, experts
        if is_count and isinstance(value, (int, float)) and not 0 <= value <= _MAX_COUNT:
            raise CheckpointError(f"{where} is damaged: {key} is {value}, which no model has. Download it again.")
    return n_tensors, settings


def _read_value(cursor: _Cursor, key: str, most: int, where: str) -> tuple[Any, int]:
    """Return a value, None for a list, and the number of entries of that list; there may be `most`."""
    kind = cursor.number("I")
    if kind in _NUMBERS:
        return cursor.number(_NUMBERS[kind]), 0
    if kind == _STRING:
        return cursor.text(f"the setting {key!r}"), 0
    if kind == _ARRAY:
        kind, count = cursor.number("I"), cursor.number("Q")
        if count > most:
            raise CheckpointError(
                f"{where} has lists of more than {_MAX_ELEMENTS} entries, up to {key!r}, more than any model needs. "
                "Download it again."
            )
        if kind in _NUMBERS:
            cursor.take(struct.calcsize(f"<{_NUMBERS[kind]}") * count)
            return None, count
        if kind == _STRING:
            for _ in range(count):
                cursor.take(cursor.number("Q"))
            return None, count
    raise CheckpointError(
        f"{where} is damaged: the setting {key!r} is of type {kind}, which is none. Download it again."
    )


def _read_tensor(cursor: _Cursor, blocks: Mapping[int, tuple[int, int]], where: str) -> GgufTensor:
    """Return a tensor with its offset from the first; `blocks`: type -> elements and bytes of a block."""
    name = cursor.text("the name of a tensor")
    n_dimensions = cursor.number("I")
    if n_dimensions > _MAX_DIMENSIONS:
        raise CheckpointError(f"{where} is damaged: tensor {name!r} has {n_dimensions} dimensions. Download it again.")
    lengths = tuple(cursor.number("Q") for _ in range(n_dimensions))
    kind, offset = cursor.number("I"), cursor.number("Q")
    if kind not in blocks:
        raise CheckpointError(
            f"{where}: tensor {name!r} is of type {kind}, which the gguf package does not know. A newer one may: "
            f"{EXTRA}."
        )
    per_block, block_bytes = blocks[kind]
    row = lengths[0] if lengths else 1
    if row % per_block:
        raise CheckpointError(
            f"{where} is damaged: a row of tensor {name!r} has {row} elements, which are no blocks of {per_block}. "
            "Download it again."
        )
    row_bytes = row // per_block * block_bytes
    return GgufTensor(name, kind, lengths[::-1], offset, row_bytes * math.prod(lengths[1:]), row_bytes)


def _check_extents(tensors: list[GgufTensor], start: int, size: int, where: str) -> None:
    """Raise if tensors share a name or bytes, or do not lie in the file."""
    twice = [name for name, count in Counter(each.name for each in tensors).items() if count > 1]
    if twice:
        raise CheckpointError(f"{where} is damaged: it has tensors twice ({some(twice)}). Download it again.")
    end = start
    for each in tensors:
        if each.offset < end:
            raise CheckpointError(
                f"{where} is damaged: tensor {each.name!r} begins at byte {each.offset}, and the one before it ends "
                f"at byte {end}. Download it again."
            )
        end = each.offset + each.nbytes
    if end > size:
        raise CheckpointError(
            f"{where} is truncated: its header announces {end} bytes, the file has {size}. Download it again."
        )
