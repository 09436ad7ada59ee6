"""File of finished cells of a comparison, from which an interrupted one goes on."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hf_frmerge.checkpoints.disk import disk_errors, write_file
from hf_frmerge.checkpoints.json_text import parse_json
from hf_frmerge.comparison.candidates import Cell
from hf_frmerge.comparison.evaluator import Measured
from hf_frmerge.comparison.texts import Split, TextLosses
from hf_frmerge.errors import ResumeError

CELLS_FILE = "cells.jsonl"
_FORMAT = 1


@dataclass(frozen=True)
class CellResult:
    """
    Result of one cell on one split.

    Attributes:
        measured: `None` if the merge failed.
        seconds: of the merge, in memory, and of its fit.
        memory: most bytes the merge was allowed to hold at a time, beside the model.
        failure: why there is no merge.
        n_prompts: number of prompts it was fitted to; 0 without a fit.
    """

    measured: Measured | None
    seconds: float = 0.0
    memory: int = 0
    failure: str | None = None
    n_prompts: int = 0


class CellFile:
    """
    JSON lines: what the comparison is of, then one line for each finished cell.

    Attributes:
        results: key of a cell and split -> result.

    Args:
        folder: Folder of the comparison.
        subject: What every result depends on beside the cell: models, texts and settings, by name.
        overwrite: Begin anew.

    Raises:
        ResumeError: If the folder holds a comparison of something else.
    """

    def __init__(self, folder: Path, subject: dict[str, Any], *, overwrite: bool) -> None:
        self._path = folder / CELLS_FILE
        self.results: dict[tuple[str, Split], CellResult] = {}
        subject = json.loads(json.dumps({"format": _FORMAT, **subject}))  # as it is read back
        lines = [] if overwrite else self._read(subject)
        write_file(self._path, b"".join(line + b"\n" for line in [json.dumps(subject).encode(), *lines]))

    def find(self, cell: Cell, split: Split) -> CellResult | None:
        """Return the result of a cell, if it is finished."""
        return self.results.get((cell.key, split))

    def add(self, cell: Cell, split: Split, result: CellResult) -> None:
        """Record a finished cell."""
        self.results[cell.key, split] = result
        line = json.dumps({"cell": cell.key, "split": split, "result": _to_json(result)}).encode() + b"\n"
        with disk_errors(self._path, "written"), self._path.open("ab", buffering=0) as file:
            file.write(line)
            os.fsync(file.fileno())

    def _read(self, subject: dict[str, Any]) -> list[bytes]:
        """Read the finished cells of an earlier run; return their lines, without what a kill cut short."""
        if not self._path.exists():
            return []
        with disk_errors(self._path, "read"):
            first, *lines = self._path.read_bytes().splitlines() or [b""]
        before = _parsed(first) or {}
        changed = [name for name in subject if before.get(name) != subject[name]]
        if changed:
            raise ResumeError(
                f"{self._path.parent} holds a comparison with other {', '.join(changed)}. Choose another folder "
                "(--output-dir, output_dir), or pass --overwrite (overwrite=True) to replace it."
            )
        whole = []
        for line in lines:
            entry = _parsed(line)
            if entry is not None:
                self.results[entry["cell"], entry["split"]] = _from_json(entry["result"])
                whole.append(line)
        return whole


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        entry = parse_json(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None


def _to_json(result: CellResult) -> dict[str, Any]:
    entry = asdict(result)
    if result.measured is not None:
        entry["measured"]["losses"] = {
            domain: {"sums": losses.sums.tolist(), "counts": losses.counts.tolist()}
            for domain, losses in result.measured.losses.items()
        }
    return entry


def _from_json(entry: dict[str, Any]) -> CellResult:
    measured = entry["measured"]
    if measured is not None:
        losses = {
            domain: TextLosses(np.array(columns["sums"]), np.array(columns["counts"]))
            for domain, columns in measured["losses"].items()
        }
        measured = Measured(**{**measured, "losses": losses})
    return CellResult(**{**entry, "measured": measured})
