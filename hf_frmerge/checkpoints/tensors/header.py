"""Parse and check the headers of safetensors files, so that a broken file is refused before any work starts."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from hf_frmerge.checkpoints.json_text import parse_json
from hf_frmerge.checkpoints.local_folder import LocalFolder
from hf_frmerge.checkpoints.remote_folder import RemoteFolder
from hf_frmerge.errors import CheckpointError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# Bits per element of every dtype code in the safetensors format, in the order its own writer sorts by: smallest
# alignment first.
DTYPE_BITS = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}
FLOAT_DTYPES = frozenset({"BF16", "F16", "F32", "F64"})

_MAX_HEADER_BYTES = 100_000_000  # limit of the safetensors format
_MAX_DIMENSIONS = 64  # of a numpy array; torch has no limit of its own
_MAX_NUMBER = 2**63 - 1  # of a size or an offset, which others read as 64-bit integers


class Recipe(Protocol):
    """How a tensor is read that is made of stored ones: rows of a stack, or numbers from the codes of a quantiser."""

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        """The tensors it is made of."""
        ...

    def read(self, source: TensorSource, start: int, stop: int) -> NDArray[np.uint8]:
        """Return bytes `[start, stop)` of the tensor; what `source` reads for that is copied, and released."""
        ...


class TensorSource(Protocol):
    """Reader of the tensors of a checkpoint."""

    def read_info(self, info: TensorInfo, start: int = 0, stop: int | None = None) -> NDArray[np.uint8]:
        """Return bytes `[start, stop)` of a tensor."""
        ...

    def release_info(self, info: TensorInfo, start: int = 0, stop: int | None = None) -> None:
        """Unmap the pages of a range that was read."""
        ...


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """
    Name, dtype, shape and location of one tensor: `nbytes` bytes from byte `offset` of `file`.

    A tensor that is made of stored ones has a `recipe`, which reads it; `file` and `offset` then mean nothing.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    offset: int
    nbytes: int
    recipe: Recipe | None = None

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def stored(self) -> tuple[TensorInfo, ...]:
        """The stored tensors it is read from: itself, or the parts of its recipe and of theirs."""
        return (self,) if self.recipe is None else tuple(each for part in self.recipe.parts for each in part.stored)

    @property
    def is_float(self) -> bool:
        """Whether the elements are bf16, fp16, fp32 or fp64, and so can be averaged."""
        return self.dtype in FLOAT_DTYPES


def read_header(folder: LocalFolder | RemoteFolder, file: str, spec: str) -> tuple[list[TensorInfo], int]:
    """
    Read and check the header of one safetensors file.

    Args:
        folder (`LocalFolder` or `RemoteFolder`):
            Folder that holds the file.
        file (`str`):
            File name.
        spec (`str`):
            Name of the checkpoint, for errors.

    Returns:
        `tuple[list[TensorInfo], int]`: Tensors in file order, and the size of the file in bytes.

    Raises:
        CheckpointError: If the file is truncated, has bytes nobody owns, or a header that makes no sense.
    """
    where = f"{spec!r}: {file}"
    size = folder.size(file)
    head = folder.read(file, 0, min(8, size))
    if len(head) < 8:
        raise CheckpointError(f"{where} has {size} bytes, too few for a safetensors file. Download it again.")
    (length,) = struct.unpack("<Q", head)
    if length > _MAX_HEADER_BYTES:
        hint = " It looks like a Git LFS pointer; run `git lfs pull`." if head == b"version " else ""
        raise CheckpointError(
            f"{where} is not a safetensors file: it announces a header of {length} bytes, "
            f"{_MAX_HEADER_BYTES} is the most allowed.{hint}"
        )
    if 8 + length > size:
        raise CheckpointError(
            f"{where} is truncated: its header alone needs {8 + length} bytes, the file has {size}. Download it again."
        )
    try:
        header = parse_json(folder.read(file, 8, 8 + length), finite=True)
    except ValueError as error:
        raise CheckpointError(f"{where} has a header that is not JSON: {error}. Download it again.") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{where} has a header that is not a JSON object. Download it again.")
    header.pop("__metadata__", None)
    infos = [_parse_entry(name, entry, file, 8 + length, where) for name, entry in header.items()]
    infos.sort(key=lambda info: (info.offset, info.nbytes, info.name))
    _check_extents(infos, 8 + length, size, where)
    return infos, size


def _parse_entry(name: str, entry: Any, file: str, data_start: int, where: str) -> TensorInfo:
    if not _is_entry(entry):
        shown = repr(entry) if len(repr(entry)) <= 200 else f"{entry!r:.200}..."
        raise CheckpointError(f"{where} has a broken header entry for tensor {name!r}: {shown}. Download it again.")
    dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype not in DTYPE_BITS:
        raise CheckpointError(
            f"{where}: tensor {name!r} has dtype {dtype!r}, which is not one of {', '.join(DTYPE_BITS)}. "
            "Convert the checkpoint to one of them."
        )
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if bits != 8 * (end - begin):
        raise CheckpointError(
            f"{where}: tensor {name!r} of shape {tuple(shape)} and dtype {dtype} needs {-(-bits // 8)} bytes, its "
            f"header gives it {end - begin}. The file is damaged; download it again."
        )
    return TensorInfo(name, dtype, tuple(shape), file, data_start + begin, end - begin)


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        return False
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    if not (isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2):
        return False
    # Bounded before they are multiplied. type() rather than isinstance(): JSON's true would pass as the integer 1.
    numbers = (*shape, *offsets)
    are_sizes = set(map(type, numbers)) == {int} and min(numbers) >= 0 and max(numbers) <= _MAX_NUMBER
    return are_sizes and len(shape) <= _MAX_DIMENSIONS and offsets[0] <= offsets[1]


def _check_extents(infos: list[TensorInfo], data_start: int, size: int, where: str) -> None:
    """Check that the tensors fill the file from the header to its end, without holes and without overlaps."""
    end = data_start
    previous = "the header"
    for info in infos:
        if info.offset != end:
            fault = "overlaps" if info.offset < end else "leaves a hole after"
            raise CheckpointError(
                f"{where}: tensor {info.name!r} starts at byte {info.offset} and {fault} {previous}, which ends at "
                f"byte {end}. The file is damaged; download it again."
            )
        end = info.offset + info.nbytes
        previous = f"tensor {info.name!r}"
    if size < end:
        raise CheckpointError(
            f"{where} is truncated: its header announces {end} bytes, the file has {size}. Download it again."
        )
    if size > end:
        raise CheckpointError(
            f"{where} has {size - end} bytes after the last tensor: its header announces {end} bytes, the file has "
            f"{size}. The file is damaged; download it again."
        )
