"""Find the domain on which a merged model does worst against the others; CLI, model card and report share it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hf_frmerge.evaluation.record import MERGED, Score

LOWER_IS_BETTER = {
    "perplexity": True,
    "loss": True,
    "accuracy": False,
    "acc": False,
    "acc_norm": False,
    "exact_match": False,
    "f1": False,
    "token_accuracy": False,
}
"""Metrics whose better direction is known. Models are compared by the first of them that the merged model has."""


@dataclass(frozen=True)
class WeakestDomain:
    """
    The domain on which the merged model is farthest behind the best other model, or the least ahead of it.

    Attributes:
        metric: name of the metric compared.
        domain: name of the dataset.
        gap: how far the merged model is behind, in nats a token for perplexity and loss, else in units of the metric.
            At or below 0 it is behind on no domain. Infinite if its value is not finite.
        merged: value of the merged model.
        best: best value of the other models.
        model: name of the model with the value `best`.
    """

    metric: str
    domain: str
    gap: float
    merged: float
    best: float
    model: str


def weakest_domain(scores: Sequence[Score]) -> WeakestDomain | None:
    """
    Find the weakest domain of the merged model.

    Perplexities are compared by their logarithm, the loss, so that the domain chosen does not depend on which of the
    two was recorded. The base counts like an expert: a merge that lost to its base made the model worse.

    Args:
        scores (`Sequence[Score]`): Scores of the merged model, the experts and the base.

    Returns:
        `WeakestDomain`, or `None` if the merged model has none of the metrics in `LOWER_IS_BETTER` or nothing was
        measured beside it.
    """
    for metric, lower_is_better in LOWER_IS_BETTER.items():
        candidates = [score for score in scores if metric in score.metrics]
        gaps = _gaps(candidates, metric, lower_is_better)
        if gaps:
            return max(gaps, key=lambda weak: weak.gap)
    return None


def _gaps(scores: Sequence[Score], metric: str, lower_is_better: bool) -> list[WeakestDomain]:
    """Return the gap to the best other model on every domain where both were measured."""
    gaps = []
    for domain in dict.fromkeys(score.domain for score in scores):
        values = {score.model: score.metrics[metric] for score in scores if score.domain == domain}
        others = {model: value for model, value in values.items() if model != MERGED and math.isfinite(value)}
        if MERGED not in values or not others:
            continue
        better: Callable[..., str] = min if lower_is_better else max
        best = better(others, key=others.__getitem__)
        gap = _scale(metric, values[MERGED]) - _scale(metric, others[best])
        # Positive means behind, whichever direction is better.
        gap = gap if lower_is_better else -gap
        # A NaN would make `max` depend on the order of the domains; infinite puts the failed domain first.
        gaps.append(
            WeakestDomain(metric, domain, math.inf if math.isnan(gap) else gap, values[MERGED], others[best], best)
        )
    return gaps


def _scale(metric: str, value: float) -> float:
    """Return the logarithm of a perplexity, in nats a token; other metrics unchanged."""
    if metric != "perplexity":
        return value
    return math.log(value) if value > 0 else math.nan
