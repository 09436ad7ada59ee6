"""Human-readable output of `frmerge search`: one table, what it means, and the commands of the chosen merges."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table
from rich.text import Text

from hf_frmerge.cli.render.terminal import console
from hf_frmerge.search.sentences import sentences
from hf_frmerge.wording.numbers import NONE, decimals, percent

if TYPE_CHECKING:
    from hf_frmerge.search.record import Chosen, SearchRecord


def print_search(record: SearchRecord, output_dir: str) -> None:
    """Print the table, the sentences about it, and the commands that make the chosen merges."""
    out = console()
    is_share = record.unit == "share"
    places = list(record.chosen[0].by_place)
    title = "Share of each expert's gain that is kept" if is_share else "Loss in nats, lower is better"
    n_predictions = sum(count["predictions"] for count in record.texts["test"].values())
    out.print(
        f"{title}, on {n_predictions:,} predictions that nothing was chosen on; {len(record.tried)} merges by "
        f"{record.method} were measured on others",
        style="bold",
    )
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("chosen as", overflow="fold")
    for heading in ["weights", "scale", "mean", "±", *places]:
        table.add_column(heading, justify="right", overflow="fold")
    for number, row in enumerate(record.chosen):
        table.add_row(*_cells(row, number == 0, places, is_share=is_share))
    out.print(table)
    for sentence in sentences(record):
        out.print(sentence)
    out.print(
        "* not told from the best, by texts drawn again; weights: in the order of the experts; ±: one standard error "
        "over texts",
        style="dim",
    )
    out.print(
        f"All numbers, and the front: {output_dir}" if record.front else f"All numbers: {output_dir}", style="dim"
    )
    out.print("The commands that make them:", style="bold")
    for row in record.chosen:
        # Not wrapped by rich: they are to be copied.
        out.print(shlex.join(row.command), soft_wrap=True)


def _cells(row: Chosen, is_best: bool, places: list[str], *, is_share: bool) -> list[Text | str]:
    name = Text(row.label + (" *" if row.is_tied else ""), style="bold green" if is_best else "")
    weights = ", ".join(f"{weight:.2f}" for weight in row.weights)
    scores = [_score(row.by_place[place], is_share=is_share) for place in places]
    error = decimals(100 * row.error, 1) if is_share else decimals(row.error, 3)
    scale = NONE if row.scale is None else f"{row.scale:g}"
    return [name, weights, scale, _score(row.score, is_share=is_share), error, *scores]


def _score(score: float, *, is_share: bool) -> str:
    return percent(score, 1) if is_share else decimals(-score, 3)
