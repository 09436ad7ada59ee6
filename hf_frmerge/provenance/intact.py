"""Check before a push that the files in a folder are still those the merge wrote, by the manifest's checksums."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from hf_frmerge.checkpoints.local_folder import LocalFolder
from hf_frmerge.checkpoints.resolve import Source
from hf_frmerge.checkpoints.tensors.reader import DTYPE_BITS, open_checkpoint
from hf_frmerge.checkpoints.tensors.small_files import read_config
from hf_frmerge.errors import CheckpointError, HubError
from hf_frmerge.kernels.interface import digest
from hf_frmerge.merging.operands.tensor_inputs import join_digests
from hf_frmerge.merging.planning.blocks import block_shape, head_dim_of, pieces
from hf_frmerge.merging.record.checksums import header_digest, sha256_of
from hf_frmerge.merging.record.manifest import read_manifest

if TYPE_CHECKING:
    from hf_frmerge.checkpoints.tensors.reader import Checkpoint
    from hf_frmerge.merging.record.manifest import Manifest


def check_unaltered(folder: Path, sha256: Mapping[str, str]) -> None:
    """
    Check every file of the manifest by its SHA-256 or, if the merge did not record one, by the digests of its tensors.

    Args:
        folder (`Path`):
            Output of a finished merge.
        sha256 (`Mapping[str, str]`):
            SHA-256 of files that the caller has already hashed; the others are hashed here if need be.

    Raises:
        HubError: If a file is missing or was changed, naming the first; or if the manifest or weights cannot be read.
    """
    try:
        manifest = read_manifest(folder)
        unhashed = []
        for name, entry in manifest.files.items():
            if not (folder / name).is_file():
                raise _altered(folder, f"{name} is missing")
            if (folder / name).stat().st_size != entry.size:
                raise _altered(folder, f"{name} has another size than the merge gave it")
            if entry.sha256 is None:
                unhashed.append(name)
            # The file is only read if the caller's hash is missing or differs: a push may hash a cleaned config.
            elif sha256.get(name, "") != entry.sha256 != sha256_of(folder / name):
                raise _altered(folder, f"{name} was changed after the merge")
        if unhashed:
            _check_tensors(folder, manifest, unhashed)
    except CheckpointError as error:
        raise HubError(f"{folder} cannot be pushed: {error}") from error


def _check_tensors(folder: Path, manifest: Manifest, files: list[str]) -> None:
    """Check weight files without a SHA-256 by the digests of their headers and tensors."""
    for name in files:
        if header_digest(folder / name) != manifest.files[name].header_xxh3_128:
            raise _altered(folder, f"the header of {name} was changed after the merge")
    block = manifest.arguments["block"]
    config = read_config(LocalFolder(str(folder)), str(folder))
    head_dim = head_dim_of(config) if block == "head" else None
    with open_checkpoint(Source(str(folder), manifest.output_kind, str(folder))) as model:
        for name, info in model.tensors.items():
            if info.file not in files:
                continue
            entry = manifest.tensors.get(name)
            if entry is None:
                raise _altered(folder, f"tensor {name!r} in {info.file} is not in the manifest")
            # The digest depends on the cut, and a tensor that a callback skipped was cut as if it were merged.
            cut = block_shape(name, info.shape, block if entry.action != "copy" else "tensor", head_dim)
            if _tensor_digest(model, name, *cut) != entry.output:
                raise _altered(folder, f"tensor {name!r} in {info.file} was changed after the merge")


def _tensor_digest(model: Checkpoint, name: str, n_blocks: int, block_len: int) -> str:
    """Compute the digest of a tensor as the engine does: a digest of the digests of its pieces."""
    bits = DTYPE_BITS[model.tensors[name].dtype]
    parts = []
    for piece in pieces(n_blocks, block_len):
        start, stop = piece.start * bits // 8, piece.stop * bits // 8
        parts.append(digest(model.read(name, start, stop)))
        model.release(name, start, stop)  # a piece at a time, so that memory does not grow with the model
    return join_digests(parts)


def _altered(folder: Path, what: str) -> HubError:
    """Build the error for a changed file."""
    return HubError(
        f"{folder} is not what the merge wrote: {what}. Only what can be verified is pushed: restore the file or "
        "merge again. `frmerge verify` says more."
    )
