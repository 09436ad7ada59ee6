"""How merges are ranked: by the share of the experts' gains that they keep, with the spread over texts."""

# Shape suffixes: T = texts, R = resamples, E = places (experts, or domains), K = repeats.

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hf_frmerge.comparison.texts import TextLosses
from hf_frmerge.evaluation.comparison_record import Interval
from hf_frmerge.evaluation.text.forward import recovery

N_RESAMPLES = 2000
CONFIDENCE = 0.95

Losses = Mapping[str, TextLosses]
"""Domain -> losses of one model."""


@dataclass(frozen=True)
class Place:
    """
    Where merges are scored.

    Attributes:
        name: the expert whose skill it is, or the domain if there is no base to compare with.
        domain: text it is measured on.
        base_loss: loss of the base there; `None` if there is none.
        gain: loss of the base minus that of the expert; `None` without a base.
    """

    name: str
    domain: str
    base_loss: float | None = None
    gain: float | None = None

    def score(self, loss: NDArray[np.float64], base_loss: NDArray[np.float64] | None) -> NDArray[np.float64]:
        """Return the share of the gain that is kept, or without a base the loss with a minus sign."""
        if self.gain is None or base_loss is None:
            return -loss
        return (base_loss - loss) / self.gain


@dataclass(frozen=True)
class Standing:
    """
    How a merge did among others.

    Attributes:
        score: mean over the places, and over its repeats.
        repeats: score of every repeat.
        error: standard error of the score over texts and repeats.
        interval: of the score, 95 %.
        by_place, place_intervals: score at every place, and its interval.
        lead: score of the best minus this one.
        lead_interval: of that.
        is_tied: whether it cannot be told from the best: the interval of the lead begins at 0 or below.
    """

    score: float
    repeats: tuple[float, ...]
    error: float
    interval: Interval
    by_place: dict[str, float]
    place_intervals: dict[str, Interval]
    lead: float
    lead_interval: Interval
    is_tied: bool


def own_texts(base: Losses, experts: Mapping[str, Losses]) -> dict[str, str]:
    """Return the text of every expert: the one with its name, or else the one on which it gains most over the base."""
    own = {}
    for name, losses in experts.items():
        gains = {domain: base[domain].mean - losses[domain].mean for domain in losses}
        own[name] = name if name in gains else max(gains, key=gains.__getitem__)
    return own


def gains_of(base: Losses, experts: Mapping[str, Losses], own: Mapping[str, str]) -> list[Place]:
    """Return a place for every expert that is better than the base on its own text."""
    places = []
    for name, domain in own.items():
        gain = base[domain].mean - experts[name][domain].mean
        if gain > 0:
            places.append(Place(name, domain, base[domain].mean, gain))
    return places


def share_kept(place: Place, loss: float) -> float:
    """Return what `Place.score` does, of one loss; as the evaluation of a merge tells it."""
    if place.gain is None or place.base_loss is None:
        return -loss
    return recovery(place.base_loss, place.base_loss - place.gain, loss)


def score_of(losses: Losses, places: Sequence[Place]) -> float:
    """Return the mean score of a merge."""
    return math.fsum(share_kept(place, losses[place.domain].mean) for place in places) / len(places)


def standings(
    merges: Mapping[str, Sequence[Losses]], base: Losses | None, places: Sequence[Place], seed: int
) -> dict[str, Standing]:
    """
    Score merges, and tell which of them are as good as the best, by a paired bootstrap over texts.

    The same texts are drawn for all merges and for the base, with replacement, domain by domain. The experts' gains
    are held as they were measured: they are the same for all merges. Of a merge that was repeated with other seeds
    the repeats are drawn as well.

    Args:
        merges: Merge -> losses of its repeats.
        base: Losses of the base.
        places: Where they are scored.
        seed: Of the draws.
    """
    generator = np.random.default_rng(seed)
    texts = next(iter(merges.values()))[0]
    draws = {domain: _draws(len(losses.sums), generator) for domain, losses in texts.items()}
    resampled = {name: _resampled(repeats, base, places, draws, generator) for name, repeats in merges.items()}
    scores = {name: [score_of(losses, places) for losses in repeats] for name, repeats in merges.items()}
    means = {name: math.fsum(one) / len(one) for name, one in scores.items()}
    best = max(means, key=lambda name: means[name])
    result = {}
    for name, repeats in merges.items():
        scores_ER = resampled[name]
        mean_R = scores_ER.mean(axis=0)
        lead_interval = _interval(resampled[best].mean(axis=0) - mean_R)
        result[name] = Standing(
            score=means[name],
            repeats=tuple(scores[name]),
            error=float(mean_R.std()),
            interval=_interval(mean_R),
            by_place={
                place.name: math.fsum(share_kept(place, losses[place.domain].mean) for losses in repeats)
                / len(repeats)
                for place in places
            },
            place_intervals={place.name: _interval(score_R) for place, score_R in zip(places, scores_ER)},
            lead=means[best] - means[name],
            lead_interval=lead_interval,
            is_tied=name == best or lead_interval[0] <= 0.0,
        )
    return result


def _draws(number: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """Return how often each of some texts, or repeats, is drawn in every resample, `(R, number)`."""
    return generator.multinomial(number, np.full(number, 1.0 / number), size=N_RESAMPLES)


def _resampled(
    repeats: Sequence[Losses],
    base: Losses | None,
    places: Sequence[Place],
    draws: Mapping[str, NDArray[np.int64]],
    generator: np.random.Generator,
) -> NDArray[np.float64]:
    """Return the score at every place in every resample, `(E, R)`: the mean over the repeats that were drawn."""
    scores_KER = []
    for losses in repeats:
        scores_ER = []
        for place in places:
            drawn_RT = draws[place.domain]
            of_base = _mean_loss(base[place.domain], drawn_RT) if base is not None else None
            scores_ER.append(place.score(_mean_loss(losses[place.domain], drawn_RT), of_base))
        scores_KER.append(scores_ER)
    shares_RK = _draws(len(repeats), generator) / len(repeats)
    mean_ER: NDArray[np.float64] = np.einsum("ker,rk->er", np.array(scores_KER), shares_RK)
    return mean_ER


def _interval(values_R: NDArray[np.float64]) -> Interval:
    """Return the ends of the 95 % interval of resampled values."""
    low, high = np.quantile(values_R, [(1.0 - CONFIDENCE) / 2.0, (1.0 + CONFIDENCE) / 2.0])
    return float(low), float(high)


def _mean_loss(losses: TextLosses, drawn_RT: NDArray[np.int64]) -> NDArray[np.float64]:
    mean: NDArray[np.float64] = (drawn_RT @ losses.sums) / np.maximum(drawn_RT @ losses.counts, 1)
    return mean
