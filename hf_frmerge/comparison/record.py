"""Results of a comparison, as plain numbers: one JSON file, and one row a number in a parquet file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from hf_frmerge.checkpoints.disk import write_file
from hf_frmerge.comparison.bench import Trial
from hf_frmerge.comparison.cell_file import CellResult
from hf_frmerge.comparison.texts import Split
from hf_frmerge.comparison.yardstick import Standing

RECORD_FILE = "comparison.json"
TABLE_FILE = "comparison.parquet"


@dataclass(frozen=True)
class MethodResult:
    """
    One method with the scale and the weights that were best on the validation texts.

    Attributes:
        label: name of the method with its options.
        method, options, scale, weights: how it was merged; `scale` is `None` in weight space, `weights` where all are
            alike.
        is_edge: whether the chosen scale is the smallest or the largest that was tried.
        validation: score on the validation texts.
        score: on the test texts: mean share of the experts' gains that is kept, or minus the mean loss.
        error: standard error of the score over texts.
        by_place: score of every expert, or domain.
        is_tied: whether the best cannot be told from it.
        distance: to the experts' predictions, each on its own text, mean, in radians.
        effective_rank, activation_variance: of the layer that lost most, over the mean of the experts.
        seconds: of the merge in memory; the first of the span methods includes measuring for all of them.
        memory: most bytes the merge may hold at a time, beside the model.
        failure: why there is no merge; the numbers are then NaN.
    """

    label: str
    method: str
    options: dict[str, str]
    scale: float | None
    weights: tuple[float, ...] | None
    is_edge: bool
    validation: float
    score: float
    error: float
    by_place: dict[str, float]
    is_tied: bool
    distance: float | None
    effective_rank: float | None
    activation_variance: float | None
    seconds: float
    memory: int
    failure: str | None = None


@dataclass(frozen=True)
class ComparisonRecord:
    """
    Result of a comparison.

    Attributes:
        experts, base_model: as the user named them.
        unit: what the scores are: `"share"` of the experts' gains over the base that is kept, or minus the `"loss"`,
            in nats.
        texts: split -> domain -> number of texts and of predictions.
        settings: scales, seed, and how it was evaluated.
        methods: best first; those that failed last.
        command: command that makes the best merge, as arguments.
        notes: what the user should know.
    """

    experts: list[str]
    base_model: str | None
    unit: Literal["share", "loss"]
    texts: dict[str, dict[str, dict[str, int]]]
    settings: dict[str, Any]
    methods: list[MethodResult]
    command: list[str]
    notes: list[str]

    @property
    def best(self) -> MethodResult:
        """The method with the highest score."""
        return self.methods[0]

    @property
    def tied(self) -> list[MethodResult]:
        """Methods that cannot be told from the best, without it."""
        return [row for row in self.methods[1:] if row.is_tied]

    def to_dict(self) -> dict[str, Any]:
        """Return the record as JSON values; numbers that are not finite become `None`."""
        return {**asdict(self), "methods": [_finite(asdict(row)) for row in self.methods]}


def method_result(trial: Trial, standing: Standing | None) -> MethodResult:
    """Return what is recorded of a method; `standing` is `None` if it gave no merge."""
    cell, measured = trial.cell, trial.test.measured
    return MethodResult(
        label=cell.candidate.label,
        method=cell.candidate.method,
        options=dict(cell.candidate.options),
        scale=cell.scale,
        weights=cell.weights,
        is_edge=trial.is_edge,
        validation=trial.validation,
        score=standing.score if standing is not None else math.nan,
        error=standing.error if standing is not None else math.nan,
        by_place=standing.by_place if standing is not None else {},
        is_tied=standing is not None and standing.is_tied,
        distance=measured.distance if measured is not None else None,
        effective_rank=measured.effective_rank if measured is not None else None,
        activation_variance=measured.activation_variance if measured is not None else None,
        seconds=trial.seconds,
        memory=trial.test.memory,
        failure=trial.test.failure,
    )


def save_record(folder: Path, record: ComparisonRecord) -> None:
    """Write the record as JSON."""
    write_file(folder / RECORD_FILE, json.dumps(record.to_dict(), indent=1, ensure_ascii=False) + "\n")


def save_table(folder: Path, results: Mapping[tuple[str, Split], CellResult]) -> None:
    """
    Write all results as a tidy table: a row for every cell, split, domain and metric.

    Columns: method, options, scale, weights, split, domain, metric, value. Numbers of a whole merge have no domain.
    """
    import pyarrow
    from pyarrow import parquet

    rows = [row for (key, split), result in results.items() for row in _rows(key, split, result)]
    schema = pyarrow.schema(
        [(name, pyarrow.string()) for name in ("method", "options")]
        + [("scale", pyarrow.float64()), ("weights", pyarrow.list_(pyarrow.float64()))]
        + [(name, pyarrow.string()) for name in ("split", "domain", "metric")]
        + [("value", pyarrow.float64())]
    )
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.Table.from_pylist(rows, schema), sink)
    write_file(folder / TABLE_FILE, sink.getvalue().to_pybytes())


def _rows(key: str, split: Split, result: CellResult) -> list[dict[str, Any]]:
    """Return the rows of one cell on one split."""
    method, options, scale, weights = json.loads(key)
    same = {
        "method": method,
        "options": json.dumps(dict(options)),
        "scale": scale,
        "weights": weights,
        "split": split,
    }
    if result.measured is None:
        return []
    numbers: list[tuple[str | None, str, float | None]] = [
        (domain, name, value) for domain, metrics in result.measured.metrics.items() for name, value in metrics.items()
    ]
    whole = ("distance", "effective_rank", "activation_variance")
    numbers += [(None, name, getattr(result.measured, name)) for name in whole]
    numbers += [(None, "seconds", result.seconds), (None, "memory", float(result.memory))]
    return [{**same, "domain": d, "metric": m, "value": value} for d, m, value in numbers if value is not None]


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    return {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in row.items()}
