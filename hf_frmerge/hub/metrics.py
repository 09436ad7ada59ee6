"""Scores as a card shows them: one table a metric."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hf_frmerge.evaluation.record import MERGED, Score
from hf_frmerge.hub.markdown import MarkdownTable, escape, number


@dataclass(frozen=True)
class Metric:
    """How to show one metric."""

    title: str
    better: str | None  # "lower" or "higher"; None if neither
    digits: int
    hub_type: str  # metric id on the Hub
    meaning: str = ""  # a sentence for who does not know it


_METRICS = {
    "perplexity": Metric(
        "Perplexity",
        "lower",
        2,
        "perplexity",
        "How many continuations a model wavers between, on average, at each next piece of text.",
    ),
    "token_accuracy": Metric(
        "Token accuracy", "higher", 3, "accuracy", "How often its first guess at the next piece of text is right."
    ),
    "loss": Metric("Loss (nats per token)", "lower", 3, "loss"),
    "accuracy": Metric("Accuracy", "higher", 3, "accuracy"),
    "acc": Metric("Accuracy", "higher", 3, "accuracy"),  # as the harness calls it
    "acc_norm": Metric("Accuracy, long answers weighed alike", "higher", 3, "acc_norm"),
    "exact_match": Metric("Exact match", "higher", 3, "exact_match"),
    "f1": Metric("F1", "higher", 3, "f1"),
}


_ERROR = "_stderr"


@dataclass(frozen=True)
class MetricTable:
    """One metric: models down, domains across; the best of a column is bold."""

    title: str
    better: str | None
    meaning: str
    table: MarkdownTable


def metric_of(name: str) -> Metric:
    """How to show the metric `name`; one nobody knows is called by its name."""
    return _METRICS.get(name, Metric(name.replace("_", " ").capitalize(), None, 3, name))


def metric_tables(scores: Sequence[Score]) -> list[MetricTable]:
    """
    Arrange scores into one table a metric.

    Loss is left out where perplexity, its exponential, is there; a standard error goes beside what it is of.
    """
    names = list(dict.fromkeys(name for score in scores for name in score.metrics if not is_error(name)))
    if "perplexity" in names and "loss" in names:
        names.remove("loss")
    return [_metric_table(name, [score for score in scores if name in score.metrics]) for name in names]


def is_error(name: str) -> bool:
    """Whether a metric is the standard error of another."""
    return name.endswith(_ERROR)


def shown_model(model: str) -> str:
    """Name of a model in a table."""
    return "**this model**" if model == MERGED else escape(model)


def _metric_table(name: str, scores: Sequence[Score]) -> MetricTable:
    metric = metric_of(name)
    values = {(score.model, score.domain): score.metrics[name] for score in scores}
    errors = {(score.model, score.domain): score.metrics.get(name + _ERROR, math.nan) for score in scores}
    models = sorted(dict.fromkeys(model for model, _ in values), key=lambda model: model == MERGED)
    domains = list(dict.fromkeys(domain for _, domain in values))
    best = {domain: _best(metric, [v for (_, d), v in values.items() if d == domain]) for domain in domains}

    def shown(model: str, domain: str) -> str:
        value = values.get((model, domain), math.nan)
        text = number(value, metric.digits)
        error = errors.get((model, domain), math.nan)
        text += f" ± {number(error, metric.digits)}" if math.isfinite(error) else ""
        return f"**{text}**" if value == best[domain] and len(models) > 1 else text

    rows = tuple((shown_model(model), *(shown(model, domain) for domain in domains)) for model in models)
    table = MarkdownTable(("", *(escape(domain) for domain in domains)), rows)
    return MetricTable(metric.title, metric.better, metric.meaning, table)


def _best(metric: Metric, values: Iterable[float]) -> float | None:
    finite = [value for value in values if math.isfinite(value)]
    if metric.better is None or not finite:
        return None
    return min(finite) if metric.better == "lower" else max(finite)
