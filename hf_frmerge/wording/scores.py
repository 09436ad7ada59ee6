"""Scores arranged for a reader: which metrics are shown, in which order, with what beside them, and which is best."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hf_frmerge.evaluation.record import MERGED, Score
from hf_frmerge.wording.metrics import ERROR, Metric, is_error, metric_of


@dataclass(frozen=True)
class ScoreTable:
    """
    One metric: models down, the merged one last, domains across.

    Attributes:
        values: by model and domain.
        errors: standard errors, by model and domain, where they are known.
        best: the best value of every domain, if one is better than another.
    """

    metric: Metric
    models: tuple[str, ...]
    domains: tuple[str, ...]
    values: dict[tuple[str, str], float]
    errors: dict[tuple[str, str], float]
    best: dict[str, float]

    def written(self, model: str, domain: str) -> str:
        """Write one value, its standard error beside it: `0.750 ± 0.022`."""
        text = self.metric.written(self.values.get((model, domain)))
        error = self.errors.get((model, domain), math.nan)
        return f"{text} ± {self.metric.written(error)}" if math.isfinite(error) else text

    def is_best(self, model: str, domain: str) -> bool:
        """Whether a model has the best value of a domain."""
        return domain in self.best and self.values.get((model, domain)) == self.best[domain]


def score_tables(scores: Sequence[Score]) -> list[ScoreTable]:
    """
    Arrange scores into one table a metric.

    Loss is left out where perplexity, its exponential, is there; a standard error goes beside what it is of.
    """
    names = list(dict.fromkeys(name for score in scores for name in score.metrics if not is_error(name)))
    if "perplexity" in names and "loss" in names:
        names.remove("loss")
    return [_score_table(metric_of(name), [score for score in scores if name in score.metrics]) for name in names]


def _score_table(metric: Metric, scores: Sequence[Score]) -> ScoreTable:
    values = {(score.model, score.domain): score.metrics[metric.name] for score in scores}
    errors = {(score.model, score.domain): score.metrics.get(metric.name + ERROR, math.nan) for score in scores}
    models = sorted(dict.fromkeys(model for model, _ in values), key=lambda model: model == MERGED)
    domains = tuple(dict.fromkeys(domain for _, domain in values))
    best = {}
    for domain in domains:
        finite = [value for (_, of), value in values.items() if of == domain and math.isfinite(value)]
        if metric.better is not None and len(finite) > 1:
            best[domain] = min(finite) if metric.better == "lower" else max(finite)
    return ScoreTable(metric, tuple(models), domains, values, errors, best)
