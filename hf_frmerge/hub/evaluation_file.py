"""Evaluation rows kept beside the card, so that writing the card again does not lose them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from hf_frmerge.hub.card_data import EvaluationRow
from hf_frmerge.merging.manifest import COEFFICIENTS_FILE

EVALUATION_FILE = "merge_evaluation.json"


def save_evaluation(folder: Path, rows: Sequence[EvaluationRow]) -> None:
    """Keep evaluation rows beside the card, marked with the merge they belong to."""
    entry = {"merge": _merge_digest(folder), "rows": list(rows)}
    (folder / EVALUATION_FILE).write_text(json.dumps(entry, indent=1) + "\n", encoding="utf-8")


def load_evaluation(folder: Path) -> list[EvaluationRow]:
    """Read the rows kept beside the card; none if they are of a merge that was since replaced."""
    path = folder / EVALUATION_FILE
    if not path.is_file():
        return []
    entry = json.loads(path.read_text(encoding="utf-8"))
    return entry["rows"] if entry["merge"] == _merge_digest(folder) else []


def _merge_digest(folder: Path) -> str | None:
    """The coefficient table identifies a merge of given experts."""
    path = folder / COEFFICIENTS_FILE
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
