"""Human-readable output of `frmerge compare`: one table, what it means, and the command of the best merge."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table
from rich.text import Text

from hf_frmerge.cli.render.terminal import console, human_bytes, human_seconds
from hf_frmerge.comparison.sentences import sentences
from hf_frmerge.wording.numbers import NONE, decimals, percent

if TYPE_CHECKING:
    from hf_frmerge.comparison.record import ComparisonRecord, MethodResult


def print_comparison(record: ComparisonRecord, output_dir: str) -> None:
    """Print the table, the sentences about it, and the command that makes the best merge."""
    out = console()
    is_share = record.unit == "share"
    places = list(record.best.by_place)
    has_weights = any(row.weights is not None for row in record.methods)
    counts = record.texts["test"].values()
    n_predictions, n_texts = (sum(count[what] for count in counts) for what in ("predictions", "texts"))
    title = "Share of each expert's gain that is kept" if is_share else "Loss in nats, lower is better"
    out.print(f"{title}, on {n_predictions:,} predictions in {n_texts:,} texts", style="bold")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("method", overflow="fold")
    columns = ["scale", *(["weights"] if has_weights else []), "mean", "±", *(["worst"] if is_share else []), *places]
    for heading in [*columns, "rad", "rank", "time", "memory"]:
        table.add_column(heading, justify="right", overflow="fold")
    for number, row in enumerate(record.methods):
        table.add_row(*_cells(row, number == 0, places, is_share=is_share, has_weights=has_weights))
    out.print(table)
    for sentence in sentences(record):
        out.print(sentence)
    out.print(_legend(is_share), style="dim")
    out.print(f"All numbers: {output_dir}", style="dim")
    out.print("The command that makes the best merge:", style="bold")
    # Not wrapped by rich: it is to be copied.
    out.print(shlex.join(record.command), soft_wrap=True)


def _cells(
    row: MethodResult, is_best: bool, places: list[str], *, is_share: bool, has_weights: bool
) -> list[Text | str]:
    mark = " *" if row.is_tied else "  "
    name = Text(row.label + mark, style="bold green" if is_best else "green" if row.is_tied else "")
    scale = NONE if row.scale is None else f"{row.scale:g}{'!' if row.is_edge else ''}"
    weights = [",".join(f"{w:g}" for w in row.weights) if row.weights is not None else NONE] if has_weights else []
    scores = [_score(row.by_place.get(place), is_share) for place in places]
    worst = [_score(min(row.by_place.values(), default=None), True)] if is_share else []
    error = decimals(100 * row.error, 1) if is_share else decimals(row.error, 3)
    rank = percent(row.effective_rank)
    return [
        name, scale, *weights, _score(row.score, is_share), error, *worst, *scores,
        decimals(row.distance, 2), rank, human_seconds(row.seconds), human_bytes(row.memory),
    ]  # fmt: skip


def _score(score: float | None, is_share: bool) -> str:
    if is_share or score is None:
        return percent(score, 1)
    return decimals(-score, 3)


def _legend(is_share: bool) -> str:
    kept = "worst: the expert of which least is kept; " if is_share else ""
    return (
        "* not told from the best, by texts drawn again; ! the end of the scales that were tried; ±: one standard "
        f"error over texts; {kept}rad: Fisher–Rao distance to the experts' predictions; rank: effective rank of the "
        "layer that lost most, over the experts' mean; time, memory: of the merge, in memory"
    )
