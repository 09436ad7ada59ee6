"""Print perplexities of several models side by side, and how much of each expert's gain they keep."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from hf_frmerge.cli.render.terminal import console
from hf_frmerge.wording.metrics import METRICS
from hf_frmerge.wording.numbers import percent

if TYPE_CHECKING:
    from hf_frmerge.evaluation.record import Recovered, Score

_TIE = math.log(1.01)  # a few thousand tokens cannot resolve perplexities that differ by less than 1%


def print_scores(scores: Sequence[Score], merged: Sequence[str], title: str = METRICS["perplexity"].heading) -> None:
    """
    Print perplexities, a row per model and a column per domain; the last column is the geometric mean.

    Args:
        scores (`Sequence[Score]`): One per model and domain.
        merged (`Sequence[str]`): Names of the merged models; the best in each column are marked.
        title (`str`, *optional*): Title of the table.
    """
    losses = _losses(scores)
    domains = list(dict.fromkeys(score.domain for score in scores))
    has_mean, has_rivals = len(domains) > 1, len(merged) > 1
    rows = {
        name: [*by_domain.values(), *([math.fsum(by_domain.values()) / len(domains)] if has_mean else [])]
        for name, by_domain in losses.items()
    }
    # The experts are left out: each is bound to win on its own text.
    best = [min(column) for column in zip(*(rows[name] for name in merged))]
    table = Table("model")
    for column in [*domains, *(["mean"] if has_mean else [])]:
        table.add_column(column, justify="right")
    for name in sorted(
        rows, key=lambda name: name in merged
    ):  # merges last; the sort is stable, so the rest keep their order
        marks = [has_rivals and name in merged and loss < lowest + _TIE for loss, lowest in zip(rows[name], best)]
        is_last_source = name not in merged and table.row_count + 1 == len(rows) - len(merged)
        cells = [_perplexity(loss, mark) for loss, mark in zip(rows[name], marks)]
        table.add_row(name, *cells, end_section=is_last_source)
    legend = [
        *(["mean: geometric mean"] if has_mean else []),
        *(["* best merge, and those within 1% of it"] if has_rivals else []),
    ]
    n_tokens = sum({score.domain: score.n_tokens for score in scores}.values())
    out = console()
    out.print(f"{title}, {n_tokens:,} tokens", style="bold")
    out.print(table)
    if legend:
        out.print("; ".join(legend), style="dim")


def print_recovery(rows: Iterable[Recovered]) -> None:
    """Print how much of each expert's gain over the base the merged models keep: in nats per token, and as a share."""
    rows = list(rows)
    experts = list(dict.fromkeys((row.expert, row.domain) for row in rows))
    table = Table("model")
    for expert, domain in experts:
        table.add_column(expert if expert == domain else f"{expert} (on {domain})", justify="right")
    gains = {row.expert: row.gain for row in rows}
    table.add_row("the expert itself", *(f"{gains[expert]:+.3f}" for expert, _ in experts), end_section=True)
    for model in dict.fromkeys(row.model for row in rows):
        by_expert = {row.expert: row for row in rows if row.model == model}
        table.add_row(model, *(_kept(by_expert[expert]) for expert, _ in experts))
    out = console()
    out.print("Gain over the base on each expert's text, in nats a token (share of the expert's gain)", style="bold")
    out.print(table)


def _losses(scores: Iterable[Score]) -> dict[str, dict[str, float]]:
    """Arrange losses as model -> domain -> loss, in nats per token."""
    losses: dict[str, dict[str, float]] = {}
    for score in scores:
        losses.setdefault(score.model, {})[score.domain] = score.metrics["loss"]
    return losses


def _perplexity(loss: float, is_best: bool) -> Text:
    text = METRICS["perplexity"].written(math.exp(min(loss, 700)))  # math.exp raises OverflowError above 709
    return Text(f"{text} *" if is_best else f"{text}  ", style="bold green" if is_best else "")


def _kept(row: Recovered) -> str:
    share = "" if row.share is None else f" ({percent(row.share)})"
    return f"{row.kept:+.3f}{share}"
