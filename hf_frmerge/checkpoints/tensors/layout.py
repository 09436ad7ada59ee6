"""Plan the output files before a byte is written: shards, headers and offsets, as `save_pretrained` makes them."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hf_frmerge.checkpoints.tensors.reader import DTYPE_BITS, FLOAT_DTYPES, SINGLE_FILE

MAX_SHARD_BYTES = 50 * 10**9  # the default of save_pretrained


@dataclass(frozen=True, slots=True)
class Shard:
    """One output file: its name, its header as bytes on disk, its tensors in file order, its size in bytes."""

    file: str
    header: bytes
    names: tuple[str, ...]
    size: int


@dataclass(frozen=True, slots=True)
class ShardLayout:
    """
    Shard and offset of every output tensor.

    Shard names, the split and the index are those of `save_pretrained`. Header and order inside a file are those of
    `safetensors.save_file`, so that the same tensors give the same bytes.
    """

    shards: tuple[Shard, ...]
    places: dict[str, tuple[int, int]]  # name -> (index of the shard, byte offset in its file)
    nbytes: dict[str, int]
    total_size: int  # bytes of all tensors
    total_parameters: int  # elements of the float tensors

    @classmethod
    def plan(
        cls, tensors: Iterable[tuple[str, str, Sequence[int]]], max_shard_size: int = MAX_SHARD_BYTES
    ) -> ShardLayout:
        """
        Split tensors into shards, greedily and in the given order.

        Args:
            tensors (`Iterable[tuple[str, str, Sequence[int]]]`):
                Name, safetensors dtype code and shape of each tensor.
            max_shard_size (`int`, *optional*, defaults to 50 GB):
                Upper limit for the tensors in one file, in bytes. A larger tensor gets its own file.

        Returns:
            `ShardLayout`: The plan.
        """
        entries = {name: (dtype, tuple(shape)) for name, dtype, shape in tensors}
        nbytes = {name: math.prod(shape) * DTYPE_BITS[dtype] // 8 for name, (dtype, shape) in entries.items()}
        groups = _split(nbytes, max_shard_size)
        shards = []
        places = {}
        for index, group in enumerate(groups):
            file = SINGLE_FILE if len(groups) == 1 else f"model-{index + 1:05d}-of-{len(groups):05d}.safetensors"
            # safetensors sorts by dtype, widest first, so that every tensor is aligned to its element size.
            order = list(DTYPE_BITS)
            names = sorted(group, key=lambda name: (-order.index(entries[name][0]), name))
            header = _header([(name, *entries[name], nbytes[name]) for name in names])
            offset = len(header)
            for name in names:
                places[name] = (index, offset)
                offset += nbytes[name]
            shards.append(Shard(file, header, tuple(names), offset))
        parameters = sum(math.prod(shape) for dtype, shape in entries.values() if dtype in FLOAT_DTYPES)
        return cls(tuple(shards), places, nbytes, sum(nbytes.values()), parameters)

    def where(self, name: str) -> tuple[int, int]:
        """Return the index of the shard that holds `name`, and the byte offset of its data in that file."""
        return self.places[name]

    @property
    def file_bytes(self) -> int:
        """Size of all shards together, headers included."""
        return sum(shard.size for shard in self.shards)

    def index_json(self) -> str | None:
        """Return the text of `model.safetensors.index.json`; None for a single file, which has no index."""
        if len(self.shards) == 1:
            return None
        index = {
            "metadata": {"total_parameters": self.total_parameters, "total_size": self.total_size},
            "weight_map": {name: self.shards[shard].file for name, (shard, _) in self.places.items()},
        }
        return json.dumps(index, indent=2, sort_keys=True) + "\n"


def _split(nbytes: dict[str, int], limit: int) -> list[list[str]]:
    """
    Group names as huggingface_hub does.

    A tensor above the limit does not close the open group, so its own group comes before that.
    """
    groups: list[list[str]] = []
    current: list[str] = []
    filled = 0
    for name, size in nbytes.items():
        if size > limit:
            groups.append([name])
            continue
        if filled + size > limit:
            groups.append(current)
            current, filled = [], 0
        current.append(name)
        filled += size
    return [*groups, current] if current else groups


def _header(entries: list[tuple[str, str, tuple[int, ...], int]]) -> bytes:
    """Return the length and the JSON text of a safetensors header, padded to a multiple of 8 bytes."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, dtype, shape, size in entries:
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
