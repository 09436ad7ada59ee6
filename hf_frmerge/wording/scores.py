"""Arrange scores into tables: choice and order of metrics, standard errors, and the best values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hf_frmerge.evaluation.record import MERGED, Score
from hf_frmerge.wording.metrics import ERROR, Metric, is_error, metric_of


@dataclass(frozen=True)
class ScoreTable:
    """
    Scores of one metric, with the merged model last.

    Attributes:
        values: `(model, domain)` -> score.
        errors: `(model, domain)` -> standard error; NaN if unknown.
        best: domain -> best value, if the better direction is known and at least two models have a finite score.
    """

    metric: Metric
    models: tuple[str, ...]
    domains: tuple[str, ...]
    values: dict[tuple[str, str], float]
    errors: dict[tuple[str, str], float]
    best: dict[str, float]

    def written(self, model: str, domain: str) -> str:
        """Format one score with its standard error, such as `0.750 ± 0.022`."""
        text = self.metric.written(self.values.get((model, domain)))
        error = self.errors.get((model, domain), math.nan)
        return f"{text} ± {self.metric.written(error)}" if math.isfinite(error) else text

    def is_best(self, model: str, domain: str) -> bool:
        """Whether a model has the best score on a domain; several can."""
        return domain in self.best and self.values.get((model, domain)) == self.best[domain]


def score_tables(scores: Sequence[Score]) -> list[ScoreTable]:
    """
    Arrange scores into one table per metric.

    Loss is left out if there is perplexity, its exponential. Standard errors go into the table of their metric.
    """
    names = list(dict.fromkeys(name for score in scores for name in score.metrics if not is_error(name)))
    if "perplexity" in names and "loss" in names:
        names.remove("loss")
    return [_score_table(metric_of(name), [score for score in scores if name in score.metrics]) for name in names]


def _score_table(metric: Metric, scores: Sequence[Score]) -> ScoreTable:
    """Build the table of one metric from the scores that have it."""
    values = {(score.model, score.domain): score.metrics[metric.name] for score in scores}
    errors = {(score.model, score.domain): score.metrics.get(metric.name + ERROR, math.nan) for score in scores}
    models = sorted(dict.fromkeys(model for model, _ in values), key=lambda model: model == MERGED)
    domains = tuple(dict.fromkeys(domain for _, domain in values))
    best = {}
    for domain in domains:
        finite = [value for (_, of_domain), value in values.items() if of_domain == domain and math.isfinite(value)]
        # With a single model, a mark for the best would say nothing.
        if metric.better is not None and len(finite) > 1:
            best[domain] = min(finite) if metric.better == "lower" else max(finite)
    return ScoreTable(metric, tuple(models), domains, values, errors, best)
