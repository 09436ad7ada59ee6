"""Score tables of a model card, one per metric."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hf_frmerge.evaluation.record import MERGED, Score
from hf_frmerge.hub.card.markdown import MarkdownTable, escape
from hf_frmerge.wording.metrics import Metric
from hf_frmerge.wording.scores import ScoreTable, score_tables


@dataclass(frozen=True)
class MetricTable:
    """Table of one metric: a row per model, a column per domain, the best of each column bold."""

    metric: Metric
    table: MarkdownTable


def metric_tables(scores: Sequence[Score]) -> list[MetricTable]:
    """Build a Markdown table for every metric in `scores`."""
    return [MetricTable(table.metric, _markdown(table)) for table in score_tables(scores)]


def shown_model(model: str) -> str:
    """Format the name of a model for a table; the merged model is "this model"."""
    return "**this model**" if model == MERGED else escape(model)


def _markdown(scores: ScoreTable) -> MarkdownTable:
    """Convert a score table to Markdown."""

    def score_text(model: str, domain: str) -> str:
        text = scores.written(model, domain)
        return f"**{text}**" if scores.is_best(model, domain) else text

    rows = tuple(
        (shown_model(model), *(score_text(model, domain) for domain in scores.domains)) for model in scores.models
    )
    return MarkdownTable(("", *(escape(domain) for domain in scores.domains)), rows)
