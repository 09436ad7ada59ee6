"""Index of a sharded checkpoint: which file every tensor is in."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath

from hf_frmerge.checkpoints.local_folder import LocalFolder
from hf_frmerge.checkpoints.remote_folder import RemoteFolder
from hf_frmerge.checkpoints.source import SAFETENSORS
from hf_frmerge.checkpoints.tensors.header import TensorInfo
from hf_frmerge.checkpoints.tensors.small_files import read_json
from hf_frmerge.errors import CheckpointError, some

INDEX_FILE = SAFETENSORS.index


def weight_map(folder: LocalFolder | RemoteFolder, spec: str, index: str = INDEX_FILE) -> dict[str, str]:
    """
    Read from the index of a sharded checkpoint, the file `index`, which file every tensor is in.

    Raises:
        CheckpointError: If it does not say, or names what is not a file of the folder itself.
    """
    placed = read_json(folder, index, spec).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise CheckpointError(f"{spec!r}: {index} has no `weight_map` from tensor names to shards.")
    wrong = [name for name, file in placed.items() if not isinstance(file, str)]
    if wrong:
        raise CheckpointError(f"{spec!r}: {index} maps {some(wrong)} to something that is not a file name.")
    for file in set(placed.values()):
        _refuse_outside(file, spec, index)
    return placed


def check_index(
    tensors: Mapping[str, TensorInfo], placed: Mapping[str, str], spec: str, index: str = INDEX_FILE
) -> None:
    """Raise `CheckpointError` if the tensors are not in the files that `weight_map` returned for them."""
    misplaced = [
        f"{name!r} ({file})" for name, file in placed.items() if name not in tensors or tensors[name].file != file
    ]
    if misplaced:
        raise CheckpointError(
            f"{spec!r}: {index} lists {len(misplaced)} tensors that are not in the shard it names: "
            f"{some(misplaced)}. The index belongs to other shards; download the folder again."
        )
    unlisted = [f"{name!r} ({info.file})" for name, info in tensors.items() if name not in placed]
    if unlisted:
        raise CheckpointError(
            f"{spec!r}: the shards hold {len(unlisted)} tensors that {index} does not list: {some(unlisted)}. "
            "The index belongs to other shards; download the folder again."
        )


def _refuse_outside(file: str, spec: str, index: str) -> None:
    path = PurePosixPath(file)
    if path.is_absolute() or ".." in path.parts or "\\" in file or ":" in file or path.name != file:
        raise CheckpointError(
            f"{spec!r}: {index} names {file!r}, which is not a file of the folder itself. Shards must lie beside "
            "the index; nothing outside is read."
        )
