"""What a measurement depends on, as a key: equal keys, equal figures."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
import xxhash

from hf_frmerge.checkpoints.local_folder import LocalFolder
from hf_frmerge.checkpoints.resolve import Source

_READ_BYTES = 8 << 20
# Files of a model folder that its outputs depend on; the tokenizer's are seen in the tokens.
_PATTERNS = ("*.safetensors", "config.json", "generation_config.json", "adapter_config.json")


def model_identity(source: Source) -> str:
    """Return what a checkpoint is: its commit on the Hub, or a digest of its files."""
    if source.commit is not None:
        return f"{source.repo_id}@{source.commit}"
    return _digest_folder(Path(source.path))


def file_marks(source: Source) -> dict[str, str]:
    """Return a cheap mark of every file that `model_identity` digests: equal marks, equal files."""
    folder = LocalFolder(source.path)
    return {path.name: folder.identity(path.name) for path in _files(Path(source.path))}


def tokens_identity(tokens: torch.Tensor) -> str:
    """Return a digest of tokens, `(M,)` int64."""
    return xxhash.xxh3_128_hexdigest(tokens.numpy().tobytes())


def key_of(parts: Any) -> str:
    """Return a short name for anything JSON can hold."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _digest_folder(folder: Path) -> str:
    digest = xxhash.xxh3_128()
    for path in _files(folder):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while chunk := file.read(_READ_BYTES):
                digest.update(chunk)
    return digest.hexdigest()


def _files(folder: Path) -> list[Path]:
    return sorted({path for pattern in _PATTERNS for path in folder.glob(pattern)})
