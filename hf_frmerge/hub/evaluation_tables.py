"""Measured numbers as a card shows them: tables for people, `model-index` entries for the Hub."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_frmerge.evaluation.record import MERGED, EvaluationRecord
from hf_frmerge.hub.card_data import EvaluationRow

if TYPE_CHECKING:
    from huggingface_hub import EvalResult


@dataclass(frozen=True)
class Metric:
    """How to show one metric."""

    title: str
    better: str | None  # "lower" or "higher"; None if neither
    digits: int
    hub_type: str  # metric id on the Hub


_METRICS = {
    "perplexity": Metric("Perplexity", "lower", 2, "perplexity"),
    "token_accuracy": Metric("Token accuracy", "higher", 3, "accuracy"),
    "loss": Metric("Loss (nats per token)", "lower", 3, "loss"),
    "accuracy": Metric("Accuracy", "higher", 3, "accuracy"),
    "f1": Metric("F1", "higher", 3, "f1"),
}
_NOT_METRICS = {"model", "domain", "n_tokens", "n_samples"}  # what a row is about, not how well it went


@dataclass(frozen=True)
class MetricTable:
    """One metric: models down, domains across."""

    title: str
    better: str | None
    domains: tuple[str, ...]
    rows: tuple[tuple[str, tuple[str, ...]], ...]  # (model, cells); best cell of a column in bold
    weakest: str | None  # sentence on the domain where the merge falls furthest behind the best other model


def rows_of_record(record: EvaluationRecord) -> list[EvaluationRow]:
    """Return the scores of an evaluation as rows; what JSON could not hold is not a number again."""
    return [
        {
            "model": score.model,
            "domain": score.domain,
            **{name: math.nan if value is None else value for name, value in score.metrics.items()},
            **({"n_tokens": score.n_tokens} if score.n_tokens else {}),
        }
        for score in record.scores
    ]


def metric_tables(rows: Sequence[EvaluationRow]) -> list[MetricTable]:
    """
    Arrange evaluation rows into one table a metric.

    Args:
        rows (`Sequence[EvaluationRow]`):
            Rows with `model`, `domain` and numbers. Loss is left out where perplexity, its exponential, is there.

    Returns:
        `list[MetricTable]`: In the order the metrics first appear.
    """
    names = list(dict.fromkeys(key for row in rows for key in row if key not in _NOT_METRICS))
    if "perplexity" in names and "loss" in names:
        names.remove("loss")
    return [_metric_table(name, [row for row in rows if name in row]) for name in names]


def eval_results(rows: Sequence[EvaluationRow], pipeline_tag: str | None) -> list[EvalResult]:
    """The merged model's own rows as `model-index` entries; numbers that are not finite are left out."""
    from huggingface_hub import EvalResult

    results = []
    for row in rows:
        if row["model"] != MERGED:
            continue
        domain = str(row["domain"])
        for name, value in row.items():
            if name in _NOT_METRICS or isinstance(value, str) or not math.isfinite(value):
                continue
            metric = _metric(name)
            results.append(
                EvalResult(
                    task_type=pipeline_tag or "other",
                    dataset_type=re.sub(r"[^a-z0-9]+", "-", domain.lower()).strip("-") or "unnamed",
                    dataset_name=domain,
                    metric_type=metric.hub_type,
                    metric_name=metric.title,
                    metric_value=float(value),
                )
            )
    return results


def _metric(name: str) -> Metric:
    return _METRICS.get(name, Metric(name.replace("_", " ").capitalize(), None, 3, name))


def _metric_table(name: str, rows: Sequence[EvaluationRow]) -> MetricTable:
    metric = _metric(name)
    values = {(str(row["model"]), str(row["domain"])): float(row[name]) for row in rows}
    models = list(dict.fromkeys(model for model, _ in values))
    domains = list(dict.fromkeys(domain for _, domain in values))
    best = {domain: _best(metric, [v for (_, d), v in values.items() if d == domain]) for domain in domains}

    def cell(model: str, domain: str) -> str:
        value = values.get((model, domain))
        if value is None:
            return "–"
        text = f"{value:,.{metric.digits}f}"
        return f"**{text}**" if value == best[domain] and len(models) > 1 else text

    return MetricTable(
        title=metric.title,
        better=metric.better,
        domains=tuple(domains),
        rows=tuple(
            ("this model" if model == MERGED else model, tuple(cell(model, domain) for domain in domains))
            for model in models
        ),
        weakest=_weakest(metric, values, models, domains),
    )


def _best(metric: Metric, values: Sequence[float]) -> float | None:
    finite = [value for value in values if math.isfinite(value)]
    if metric.better is None or not finite:
        return None
    return min(finite) if metric.better == "lower" else max(finite)


def _weakest(
    metric: Metric, values: dict[tuple[str, str], float], models: Sequence[str], domains: Sequence[str]
) -> str | None:
    """Where the merged model is worst off against the best other model of the table, by ratio."""
    gaps = []
    for domain in domains:
        merged = values.get((MERGED, domain))
        others = {m: values[m, domain] for m in models if m != MERGED and (m, domain) in values}
        best = _best(metric, list(others.values()))
        if merged is None or best is None or not math.isfinite(merged) or min(merged, best) <= 0:
            continue
        loss = merged / best if metric.better == "lower" else best / merged
        name = next(model for model, value in others.items() if value == best)
        gaps.append((loss, domain, merged, best, name))
    if not gaps:
        return None
    loss, domain, merged, best, name = max(gaps)
    numbers = f"{merged:,.{metric.digits}f} against {best:,.{metric.digits}f} for {name}"
    if loss <= 1:
        return f"It is at least level with every other model in every domain; the closest is {domain}: {numbers}."
    return f"It falls furthest behind the best other model in **{domain}**: {numbers}."
