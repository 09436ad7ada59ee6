"""Scores as a card shows them: one table a metric."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hf_frmerge.evaluation.record import MERGED, Score
from hf_frmerge.hub.card.markdown import MarkdownTable, escape
from hf_frmerge.wording.metrics import Metric
from hf_frmerge.wording.scores import ScoreTable, score_tables


@dataclass(frozen=True)
class MetricTable:
    """One metric: models down, domains across; the best of a column is bold."""

    metric: Metric
    table: MarkdownTable


def metric_tables(scores: Sequence[Score]) -> list[MetricTable]:
    """Write scores as tables in Markdown."""
    return [MetricTable(found.metric, _markdown(found)) for found in score_tables(scores)]


def shown_model(model: str) -> str:
    """Name of a model in a table."""
    return "**this model**" if model == MERGED else escape(model)


def _markdown(found: ScoreTable) -> MarkdownTable:
    def shown(model: str, domain: str) -> str:
        text = found.written(model, domain)
        return f"**{text}**" if found.is_best(model, domain) else text

    rows = tuple((shown_model(model), *(shown(model, domain) for domain in found.domains)) for model in found.models)
    return MarkdownTable(("", *(escape(domain) for domain in found.domains)), rows)
