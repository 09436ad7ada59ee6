"""Where a merged model is farthest behind the models around it: one rule for terminal, card and page."""

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
"""Of which metrics it is known which way is better. Models are compared by the first that the merged one has."""


@dataclass(frozen=True)
class WeakestDomain:
    """
    The domain on which the merged model is farthest behind the best other model, or the least ahead of it.

    Attributes:
        metric: what was compared.
        gap: how far behind: nats a token for perplexity and loss, else the difference of the metric. Not above 0: the
            merged model is behind on no domain. Infinite where its value is not a finite number.
        merged, best: values of the merged model and of the best other one.
        model: name of the latter.
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

    Perplexities are compared by their logarithm, the loss, so that the choice is the same whichever of the two was
    recorded. Experts and base count alike: behind the base is behind what one had.

    Returns:
        `None` if the merged model has no metric with a better and a worse, or stands alone.
    """
    for metric, lower_is_better in LOWER_IS_BETTER.items():
        of_metric = [score for score in scores if metric in score.metrics]
        gaps = _gaps(of_metric, metric, lower_is_better)
        if gaps:
            return max(gaps, key=lambda weak: weak.gap)
    return None


def _gaps(scores: Sequence[Score], metric: str, lower_is_better: bool) -> list[WeakestDomain]:
    found = []
    for domain in dict.fromkeys(score.domain for score in scores):
        values = {score.model: score.metrics[metric] for score in scores if score.domain == domain}
        others = {model: value for model, value in values.items() if model != MERGED and math.isfinite(value)}
        if MERGED not in values or not others:
            continue
        better: Callable[..., str] = min if lower_is_better else max
        best = better(others, key=others.__getitem__)
        gap = _scale(metric, values[MERGED]) - _scale(metric, others[best])
        gap = gap if lower_is_better else -gap
        found.append(
            WeakestDomain(metric, domain, math.inf if math.isnan(gap) else gap, values[MERGED], others[best], best)
        )
    return found


def _scale(metric: str, value: float) -> float:
    if metric != "perplexity":
        return value
    return math.log(value) if value > 0 else math.nan
