"""Open a checkpoint folder: local, behind a URL, or on the Hub."""

from __future__ import annotations

from pathlib import Path

from hf_frmerge.checkpoints.local_folder import LocalFolder
from hf_frmerge.checkpoints.remote_folder import RemoteFolder
from hf_frmerge.checkpoints.source import GGUF_SUFFIX, HUB_SCHEME

Folder = LocalFolder | RemoteFolder


def open_folder(path: str) -> Folder:
    """Open a checkpoint folder given as a local path, as an fsspec URL, as `hub://org/name@commit`, or a GGUF file."""
    if path.startswith(HUB_SCHEME):
        from hf_frmerge.checkpoints.hub.folder import hub_folder  # the Hub's client takes half a second to import

        return hub_folder(path)
    if path.endswith(GGUF_SUFFIX) and Path(path).is_file():
        from hf_frmerge.checkpoints.gguf.folder import GgufFolder

        return GgufFolder(path)
    return RemoteFolder(path) if "://" in path else LocalFolder(path)
