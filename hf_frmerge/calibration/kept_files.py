"""What an interrupted calibration keeps carries a digest, and is refused where it is not what was written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from xxhash import xxh3_128

from hf_frmerge.checkpoints.disk import disk_errors, write_file
from hf_frmerge.errors import ResumeError
from hf_frmerge.merging.engine.journal import read_signed_line, signed_line


def write_kept(path: Path, values: dict[str, Any]) -> None:
    """Write a JSON object with its digest."""
    write_file(path, signed_line(values))


def read_kept(path: Path) -> dict[str, Any]:
    """
    Read what `write_kept` wrote.

    Raises:
        ResumeError: If it was altered since.
    """
    with disk_errors(path, "read"):
        values = read_signed_line(path.read_bytes())
    if not isinstance(values, dict):
        raise damaged(path, "its digest is of other content")
    return values


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the XXH3-128 of tensors: their names, dtypes, shapes and bytes, in whatever order."""
    digest = xxh3_128()
    for name in sorted(tensors):
        values = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {values.dtype} {tuple(values.shape)}\n".encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def damaged(path: Path, reason: object) -> ResumeError:
    """Return the error to raise for a file that cannot be trusted."""
    return ResumeError(f"{path} of the interrupted calibration is damaged: {reason}. Pass --overwrite to start anew.")
