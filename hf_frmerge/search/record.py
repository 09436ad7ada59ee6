"""Result of a search for weights, as plain numbers: one JSON file, and one row a number in a parquet file."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from hf_frmerge.checkpoints.disk import write_file

RECORD_FILE = "search.json"
TABLE_FILE = "search.parquet"


@dataclass(frozen=True)
class Tried:
    """
    A merge by its weights and scale, with a score at every task.

    Attributes:
        weights: of the experts; they sum to 1.
        scale: factor of the merged delta; `None` in weight space.
        scores: task -> measured on the validation texts; in a front: predicted.
    """

    weights: tuple[float, ...]
    scale: float | None
    scores: dict[str, float]


@dataclass(frozen=True)
class Chosen:
    """
    A merge that was chosen, and measured on texts that nothing was chosen on.

    Attributes:
        names: what it was chosen as: `balanced`, `best worst case`, `best for math`, `greedy soup`, `all alike`, ...
        weights, scale: as in `Tried`.
        predicted: task -> score by the surrogates; empty if it was not chosen by them.
        validation: task -> score measured on the validation texts.
        score: on the test texts: mean share of the experts' gains that is kept, or minus the mean loss.
        error: standard error of the score over texts.
        by_place: score of every expert, or domain.
        is_tied: whether the best of those chosen cannot be told from it.
        command: command that makes it, as arguments.
    """

    names: tuple[str, ...]
    weights: tuple[float, ...]
    scale: float | None
    predicted: dict[str, float]
    validation: dict[str, float]
    score: float
    error: float
    by_place: dict[str, float]
    is_tied: bool
    command: list[str]

    @property
    def label(self) -> str:
        """Its names in one."""
        return ", ".join(self.names)


@dataclass(frozen=True)
class SearchRecord:
    """
    Result of a search.

    Attributes:
        experts, base_model: as the user named them.
        by: how it was searched.
        method: label of the method, with its options.
        unit: what scores are: `"share"` of the experts' gains over the base that is kept, or minus the `"loss"`, in
            nats.
        texts: split -> domain -> number of texts and of predictions.
        settings: scales, number of evaluations, seed.
        tried: every merge that was measured on the validation texts, in this order.
        fit: task -> R² of its surrogate on merges left out of the fit; `None` if none could be left out. Empty for a
            greedy soup.
        front: merges of which none is predicted to be better than another at every task, at most a hundred.
        chosen: best first.
        notes: what the user should know.
    """

    experts: list[str]
    base_model: str | None
    by: str
    method: str
    unit: Literal["share", "loss"]
    texts: dict[str, dict[str, dict[str, int]]]
    settings: dict[str, Any]
    tried: list[Tried]
    fit: dict[str, float | None]
    front: list[Tried]
    chosen: list[Chosen]
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Return the record as JSON values."""
        return asdict(self)


def finite(number: float) -> float | None:
    """Return a number as JSON has it: `None` if it is not finite."""
    return number if math.isfinite(number) else None


def save_record(folder: Path, record: SearchRecord) -> None:
    """Write the record as JSON."""
    write_file(folder / RECORD_FILE, json.dumps(record.to_dict(), indent=1, ensure_ascii=False) + "\n")


def save_table(folder: Path, record: SearchRecord) -> None:
    """
    Write all scores as a tidy table: a row for every merge and task.

    Columns: kind (`tried`, `front` or `chosen`), name, weights, scale, split (`predicted`, `validation` or `test`),
    task, score. The scores of `chosen` on the test texts are by expert.
    """
    import pyarrow
    from pyarrow import parquet

    texts, number = pyarrow.string(), pyarrow.float64()
    columns = {"kind": texts, "name": texts, "weights": pyarrow.list_(number), "scale": number}
    schema = pyarrow.schema({**columns, "split": texts, "task": texts, "score": number})
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.Table.from_pylist(list(_rows(record)), schema), sink)
    write_file(folder / TABLE_FILE, sink.getvalue().to_pybytes())


def _rows(record: SearchRecord) -> Iterator[dict[str, Any]]:
    def rows(kind: str, name: str | None, merge: Tried | Chosen, split: str, scores: dict[str, float]) -> Any:
        same = {"kind": kind, "name": name, "weights": list(merge.weights), "scale": merge.scale, "split": split}
        return ({**same, "task": task, "score": score} for task, score in scores.items())

    for one in record.tried:
        yield from rows("tried", None, one, "validation", one.scores)
    for one in record.front:
        yield from rows("front", None, one, "predicted", one.scores)
    for chosen in record.chosen:
        yield from rows("chosen", chosen.label, chosen, "predicted", chosen.predicted)
        yield from rows("chosen", chosen.label, chosen, "validation", chosen.validation)
        yield from rows("chosen", chosen.label, chosen, "test", chosen.by_place)
