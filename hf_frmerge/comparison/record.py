"""Put what was measured into the record of a comparison, and into a table with one row a number."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_frmerge.checkpoints.disk import write_file
from hf_frmerge.comparison.bench import Trial
from hf_frmerge.comparison.cell_file import CellResult
from hf_frmerge.comparison.texts import Split
from hf_frmerge.comparison.yardstick import Standing
from hf_frmerge.evaluation.comparison_record import MethodResult

TABLE_FILE = "comparison.parquet"


def method_result(trial: Trial, standing: Standing) -> MethodResult:
    """Return what is recorded of a method that gave a merge."""
    cell, first = trial.cell, trial.tests[0]
    assert first.measured is not None
    return MethodResult(
        label=trial.label,
        method=cell.candidate.method,
        options=dict(cell.candidate.options),
        model=cell.model,
        scale=cell.scale,
        weights=cell.weights,
        is_edge=trial.is_edge,
        tried=trial.tried,
        validation=trial.validation,
        score=standing.score,
        error=standing.error,
        interval=standing.interval,
        by_place=standing.by_place,
        place_intervals=standing.place_intervals,
        lead=standing.lead,
        lead_interval=standing.lead_interval,
        is_tied=standing.is_tied,
        distance=first.measured.distance,
        effective_rank=first.measured.effective_rank,
        activation_variance=first.measured.activation_variance,
        seconds=trial.seconds if cell.model is None else None,
        memory=first.memory if first.n_prompts == 0 and cell.model is None else None,
        seed_scores=standing.repeats if len(standing.repeats) > 1 else (),
        n_prompts=first.n_prompts,
    )


def save_table(folder: Path, results: Mapping[tuple[str, Split], CellResult]) -> None:
    """
    Write all results as a tidy table: a row for every cell, split, domain and metric.

    Columns: method, options, scale, weights, fitted, split, domain, metric, value. Numbers of a whole merge have no
    domain.
    """
    import pyarrow
    from pyarrow import parquet

    rows = [row for (key, split), result in results.items() for row in _rows(key, split, result)]
    schema = pyarrow.schema(
        [(name, pyarrow.string()) for name in ("method", "options")]
        + [("scale", pyarrow.float64()), ("weights", pyarrow.list_(pyarrow.float64())), ("fitted", pyarrow.bool_())]
        + [(name, pyarrow.string()) for name in ("split", "domain", "metric")]
        + [("value", pyarrow.float64())]
    )
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.Table.from_pylist(rows, schema), sink)
    write_file(folder / TABLE_FILE, sink.getvalue().to_pybytes())


def _rows(key: str, split: Split, result: CellResult) -> list[dict[str, Any]]:
    """Return the rows of one cell on one split."""
    method, options, scale, weights, *fit = json.loads(key)
    same = {
        "method": method,
        "options": json.dumps(dict(options)),
        "scale": scale,
        "weights": weights,
        "fitted": bool(fit),
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
