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
from hf_frmerge.merging.planning.coefficient_table import COEFFICIENTS_FILE, read_coefficients
from hf_frmerge.merging.planning.corrections import CORRECTIONS_FILE, CalibrationRecord, read_corrections
from hf_frmerge.merging.record.check_types import check_types

RECORD_FILE = "calibration.json"
"""Record of a fit that ended, until the merge has."""


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


def write_record(path: Path, record: CalibrationRecord) -> None:
    """Keep the record of a fit that ended, with the digests of what the fit wrote beside it."""
    write_kept(path, {**record.to_dict(), "digests": _digests(path.parent)})


def read_record(path: Path) -> CalibrationRecord:
    """Read the record of a fit that an interrupted merge had ended. Raises `ResumeError` if it is damaged."""
    values = read_kept(path)
    kept, found = values.pop("digests", None), _digests(path.parent)
    if kept != found:
        changed = [name for name in found if not isinstance(kept, dict) or kept.get(name) != found[name]]
        raise damaged(path.with_name(changed[0]), "its digest is of other content")
    try:
        record = CalibrationRecord.from_dict(values)
        check_types(record)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ResumeError(
            f"{path} is not what a calibration writes ({type(error).__name__}: {error}). Pass --overwrite to start "
            "anew."
        ) from error
    return record


def _digests(staging: Path) -> dict[str, str | None]:
    """Return the digests of what a fit wrote, by file; `None` of what it did not write."""
    return {
        CORRECTIONS_FILE: read_corrections(str(staging)).digest if (staging / CORRECTIONS_FILE).exists() else None,
        COEFFICIENTS_FILE: read_coefficients(staging).digest if (staging / COEFFICIENTS_FILE).exists() else None,
    }
