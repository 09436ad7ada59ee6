"""
SHA-256 of the files that went into a merge and came out of it: small ones at once, large ones when there is time.

Hashing tens of gigabytes takes longer than merging them. A merge therefore records the SHA-256 of small files and of
what the Hub names by it anyway; every tensor has a faster digest from the start.
`write_manifest.record_checksums` fills in the rest, when a model is pushed or verified with `--sha256`.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xxhash import xxh3_128_hexdigest

from hf_frmerge.checkpoints.beside.donor import CONFIG_FILE
from hf_frmerge.checkpoints.disk import disk_errors
from hf_frmerge.checkpoints.folders import open_folder
from hf_frmerge.checkpoints.local_folder import LocalFolder
from hf_frmerge.merging.record.manifest_entries import RecordedFile

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from hf_frmerge.checkpoints.beside.look_beside import CarriedFile
    from hf_frmerge.checkpoints.source import Source
    from hf_frmerge.checkpoints.tensors.reader import Checkpoint

SMALL_FILE = 16 * 2**20
"""Bytes up to which a weight file is hashed during the merge: some hundredths of a second."""


def sha256_of(path: Path | str) -> str:
    """SHA-256 of a file of any size, as hexadecimal digits."""
    with disk_errors(Path(path), "read"), Path(path).open("rb") as file:
        digest = hashlib.sha256()
        while piece := file.read(2**20):
            digest.update(piece)
        return digest.hexdigest()


def header_digest(path: Path) -> str:
    """Return the XXH3-128 digest of the header of a safetensors file, its length included."""
    with path.open("rb") as file:
        length = file.read(8)
        return xxh3_128_hexdigest(length + file.read(int.from_bytes(length, "little")))


def file_entry(path: Path) -> RecordedFile:
    """Size and SHA-256 of a file."""
    return RecordedFile(path.stat().st_size, sha256_of(path))


def input_files(source: Source, weights: Checkpoint, carried: Sequence[CarriedFile]) -> dict[str, RecordedFile]:
    """
    List the files of a model that a merge reads, with their sizes and, where it costs little, their SHA-256.

    Args:
        source: Where the model is.
        weights: Its weights.
        carried: Files that the merged model takes over, from this model and others.
    """
    folder = open_folder(source.path)
    names = [*weights.files]
    names += [name for name in (source.weight_files.index, CONFIG_FILE, "adapter_config.json") if folder.exists(name)]
    names += [file.name for file in carried if file.source == source]
    return {name: _input_entry(folder, name) for name in dict.fromkeys(names)}


def modification_marks(path: str, files: Mapping[str, RecordedFile]) -> dict[str, str]:
    """Mark of every local file without a SHA-256, which changes when it is rewritten."""
    folder = open_folder(path)
    unknown = [name for name, entry in files.items() if entry.sha256 is None]
    return {name: folder.identity(name) for name in unknown} if isinstance(folder, LocalFolder) else {}


def is_unchanged(path: str, name: str, marks: dict[str, str]) -> bool:
    """Whether a local file is still the one that was marked."""
    folder = open_folder(path)
    return isinstance(folder, LocalFolder) and folder.exists(name) and folder.identity(name) == marks.get(name)


def _input_entry(folder: Any, name: str) -> RecordedFile:
    size, sha256 = folder.size(name), folder.known_sha256(name)
    if sha256 is None and size <= SMALL_FILE:
        sha256 = hashlib.sha256(folder.read(name)).hexdigest()
    return RecordedFile(size, sha256)
