"""Compute cache keys from everything a measurement depends on, so that equal keys mean equal results."""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import xxhash

from hf_frmerge.checkpoints.local_folder import LocalFolder
from hf_frmerge.checkpoints.resolve import Source

_READ_BYTES = 8 << 20
# Files of a model folder that its outputs depend on. The tokenizer is covered by the digest of the tokens.
_PATTERNS = (
    "*.safetensors",
    "pytorch_model*.bin",
    "adapter_model.bin",
    "config.json",
    "generation_config.json",
    "adapter_config.json",
)


def model_identity(source: Source) -> str:
    """Return the identity of a checkpoint: its commit on the Hub, or a digest of its files."""
    if source.commit is not None:
        return f"{source.repo_id}@{source.commit}"
    return _digest_folder(source.path, tuple(file_marks(source).items()))


def file_marks(source: Source) -> dict[str, str]:
    """Return a cheap mark (no contents are read) of every file in `model_identity`; it changes when the file does."""
    folder = LocalFolder(source.path)
    return {path.name: folder.identity(path.name) for path in _files(Path(source.path))}


def tokens_identity(tokens: torch.Tensor) -> str:
    """Return a digest of tokens, `(M,)` int64."""
    return xxhash.xxh3_128_hexdigest(tokens.numpy().tobytes())


def key_of(parts: Any) -> str:
    """Return a digest of a JSON value, 32 hex digits."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


@lru_cache(maxsize=64)
def _digest_folder(folder: str, marks: tuple[tuple[str, str], ...]) -> str:
    """Digest names and contents of a folder's model files, again only if the marks of a file have changed."""
    digest = xxhash.xxh3_128()
    for path in _files(Path(folder)):
        # The name counts too: the same bytes under another name are another model.
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while chunk := file.read(_READ_BYTES):
                digest.update(chunk)
    return digest.hexdigest()


def _files(folder: Path) -> list[Path]:
    """Return the model files of a folder, sorted, because the order of a directory differs between machines."""
    return sorted({path for pattern in _PATTERNS for path in folder.glob(pattern)})
