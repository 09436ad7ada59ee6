"""HTML page about a comparison of merge methods in a single file: it needs no network, fonts or images."""

from __future__ import annotations

import math
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from hf_frmerge.checkpoints.disk import make_folder, write_file
from hf_frmerge.evaluation.comparison_record import COMPARISON_PAGE, load_comparison
from hf_frmerge.report.comparison_figures import draw_comparison
from hf_frmerge.report.figures import save_pngs
from hf_frmerge.report.html import inline_figures, render
from hf_frmerge.report.tables import Cell, Column, Table
from hf_frmerge.wording.comparison import (
    FIGURES,
    command_heading,
    comparison_verdicts,
    difference,
    figure_part,
    score,
    score_heading,
)
from hf_frmerge.wording.numbers import NONE, decimals, number, percent

if TYPE_CHECKING:
    from hf_frmerge.evaluation.comparison_record import ComparisonRecord, MethodResult


def write_comparison_page(folder: Path | str, output: Path | str | None = None) -> Path:
    """
    Write the HTML page of the comparison in `folder`.

    Args:
        folder (`Path` or `str`):
            Folder of a comparison.
        output (`Path` or `str`, *optional*):
            File to write; `comparison.html` in the folder by default.

    Returns:
        `Path`: Path of the page.

    Raises:
        CheckpointError: If the folder holds no finished comparison.
        MergeError: If matplotlib is not installed.
    """
    page = render_comparison(load_comparison(folder))
    path = Path(folder) / COMPARISON_PAGE if output is None else Path(output)
    make_folder(path.parent)
    write_file(path, page)
    return path


def save_comparison_figures(folder: Path | str, into: Path | str) -> dict[str, Path]:
    """Save the figures of the comparison in `folder` as PNG files; errors are those of `write_comparison_page`."""
    return save_pngs(draw_comparison(load_comparison(folder)), Path(into))


def render_comparison(record: ComparisonRecord) -> str:
    """
    Render the page as HTML. The same record gives the same text, byte for byte.

    Raises:
        MergeError: If matplotlib is not installed.
    """
    table = method_table(record)
    n_experts = len(record.experts)
    return render(
        "comparison.html.jinja",
        title=f"{len(record.methods)} merges compared",
        name=f"Which merge of these {n_experts} experts is best",
        lead=f"{score_heading(record)}. No model was written.",
        verdicts=comparison_verdicts(record),
        record=record,
        figures=inline_figures(lambda width: draw_comparison(record, width)),
        figure_parts={name: figure_part(record, name) for name in FIGURES},
        method_table=table,
        tables=[table],
        command_heading=command_heading(record),
        command=shlex.join(record.command),
    )


def method_table(record: ComparisonRecord) -> Table:
    """Return the table of methods, best first."""
    is_share = record.unit == "share"
    places = list(record.best.by_place)
    has_weights = any(row.weights is not None for row in record.methods)
    columns = (
        Column("Method"),
        Column("Scale", "Factor of the merged delta, chosen on the validation texts"),
        *((Column("Weights", "Of the experts, chosen on the validation texts"),) if has_weights else ()),
        Column("Mean", "Mean share of the experts' gains that is kept" if is_share else "Mean loss in nats"),
        Column("±", "One standard error over texts"),
        Column("Behind", "Behind the best, in points of a hundred" if is_share else "Behind the best, in nats"),
        Column("95%", "Interval of that, over texts drawn again, the same for both"),
        *((Column("Worst", "Of the expert of which least is kept"),) if is_share else ()),
        *(Column(place) for place in places),
        Column("Distance", "Fisher–Rao distance to the experts' predictions, in radians"),
        Column("Effective rank", "Of the layer that lost most, over the mean of the experts"),
        Column("Variance", "Of the activations of the layer that lost most, over the mean of the experts"),
        Column("Seconds", "Of the merge in memory, with the fit if there was one"),
        Column("MB", "Most memory of the merge, beside the model"),
    )
    rows = tuple(_row(record, row, has_weights=has_weights) for row in record.methods)
    note = "✓: tied with the best: the 95% interval of the difference includes 0."
    return Table("methods", "Every method, best first", columns, rows, note, shown=20)


def _row(record: ComparisonRecord, row: MethodResult, *, has_weights: bool) -> tuple[Cell, ...]:
    low, high = (difference(record, end) for end in row.lead_interval)
    is_best = row is record.best
    weights = NONE if row.weights is None else ", ".join(f"{weight:.3g}" for weight in row.weights)
    memory = None if row.memory is None else row.memory / 1e6
    worst = min(row.by_place.values())
    return (
        Cell(row.label + (" ✓" if row.is_tied else "")),
        Cell(NONE, math.nan) if row.scale is None else Cell(f"{row.scale:g}{' !' if row.is_edge else ''}", row.scale),
        *((Cell(weights),) if has_weights else ()),
        Cell(score(record, row.score), row.score, is_best),
        Cell(difference(record, row.error), row.error),
        Cell(NONE if is_best else difference(record, row.lead), row.lead),
        Cell(NONE if is_best else f"{low} to {high}", row.lead_interval[0]),
        *((Cell(score(record, worst), worst),) if record.unit == "share" else ()),
        *(Cell(score(record, value), value) for value in row.by_place.values()),
        _cell(decimals(row.distance, 2), row.distance),
        _cell(percent(row.effective_rank), row.effective_rank),
        _cell(percent(row.activation_variance), row.activation_variance),
        _cell(number(row.seconds, 2), row.seconds),
        _cell(number(memory, 3), memory),
    )


def _cell(text: str, value: float | None) -> Cell:
    return Cell(text, math.nan if value is None else float(value))
