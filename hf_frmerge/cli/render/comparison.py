"""Human-readable output of `frmerge compare`: one table, what it means, and the command of the best merge."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table
from rich.text import Text

from hf_frmerge.cli.render.terminal import console, human_bytes, human_seconds, print_verdicts
from hf_frmerge.wording.comparison import TIED, command_heading, comparison_verdicts, difference, score, score_heading
from hf_frmerge.wording.numbers import NONE, decimals, percent

if TYPE_CHECKING:
    from pathlib import Path

    from hf_frmerge.evaluation.comparison_record import ComparisonRecord, MethodResult


def print_comparison(record: ComparisonRecord, output_dir: str, page: Path | None) -> None:
    """
    Print the table, the sentences about it, and the command that makes the best merge.

    Args:
        record: The comparison.
        output_dir: Its folder.
        page: Its page; `None` if there is none, as without matplotlib.
    """
    out = console()
    is_share = record.unit == "share"
    places = list(record.best.by_place)
    has_weights = any(row.weights is not None for row in record.methods)
    out.print(score_heading(record), style="bold")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("method", overflow="fold")
    columns = ["scale", *(["weights"] if has_weights else []), "mean", "±", *(["worst"] if is_share else []), *places]
    for heading in [*columns, "rad", "rank", "time", "memory"]:
        table.add_column(heading, justify="right", overflow="fold")
    for row in record.methods:
        table.add_row(*_cells(record, row, has_weights=has_weights))
    out.print(table)
    print_verdicts(out, comparison_verdicts(record))
    out.print(_legend(is_share), style="dim")
    out.print(f"All numbers: {output_dir}", style="dim")
    if page is None:
        out.print("For a page with figures: pip install 'hf_frmerge[report]', then frmerge report", style="dim")
    else:
        out.print(f"All of it on one page, to open in a browser: {page}", style="bold")
    out.print(f"{command_heading(record)}:", style="bold", highlight=False)
    # Not wrapped by rich: it is to be copied.
    out.print(shlex.join(record.command), soft_wrap=True)


def _cells(record: ComparisonRecord, row: MethodResult, *, has_weights: bool) -> list[Text | str]:
    style = "bold green" if row is record.best else "green" if row.is_tied else ""
    name = Text(row.label + (f" {TIED}" if row.is_tied else "  "), style=style)
    scale = NONE if row.scale is None else f"{row.scale:g}{'!' if row.is_edge else ''}"
    weights = [",".join(f"{w:.3g}" for w in row.weights) if row.weights is not None else NONE] if has_weights else []
    scores = [score(record, value) for value in row.by_place.values()]
    worst = [score(record, min(row.by_place.values()))] if record.unit == "share" else []
    seconds = NONE if row.seconds is None else human_seconds(row.seconds)
    memory = NONE if row.memory is None else human_bytes(row.memory)
    return [
        name, scale, *weights, score(record, row.score), difference(record, row.error), *worst, *scores,
        decimals(row.distance, 2), percent(row.effective_rank), seconds, memory,
    ]  # fmt: skip


def _legend(is_share: bool) -> str:
    kept = "worst: the expert of which least is kept; " if is_share else ""
    return (
        f"{TIED} not told from the best, by texts drawn again; ! the end of the scales that were tried; ±: one "
        f"standard error over texts; {kept}rad: Fisher–Rao distance to the experts' predictions; rank: effective rank "
        "of the layer that lost most, over the experts' mean; time, memory: of the merge, in memory"
    )
