"""How merges are ranked: by the share of the experts' gains that they keep, with the spread over texts."""

# Shape suffixes: T = texts, R = resamples, E = places (experts, or domains).

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hf_frmerge.comparison.texts import TextLosses
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
        score: mean over the places.
        error: standard error of it over texts.
        by_place: score at every place.
        is_tied: whether it cannot be told from the best: the difference over resampled texts includes 0.
    """

    score: float
    error: float
    by_place: dict[str, float]
    is_tied: bool = False


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
    merges: Mapping[str, Losses], base: Losses | None, places: Sequence[Place], seed: int
) -> dict[str, Standing]:
    """
    Score merges, and tell which of them are as good as the best, by a paired bootstrap over texts.

    The same texts are drawn for all merges and for the base, with replacement, domain by domain. The experts' gains
    are held as they were measured: they are the same for all merges.

    Args:
        merges: Merge -> its losses.
        base: Losses of the base.
        places: Where they are scored.
        seed: Of the draws.
    """
    generator = np.random.default_rng(seed)
    draws = {domain: _draws(len(losses.sums), generator) for domain, losses in next(iter(merges.values())).items()}
    resampled = {name: _resampled(losses, base, places, draws) for name, losses in merges.items()}
    scores = {name: score_of(losses, places) for name, losses in merges.items()}
    best = max(scores, key=lambda name: scores[name])
    result = {}
    for name, losses in merges.items():
        lead_R = resampled[best] - resampled[name]
        result[name] = Standing(
            scores[name],
            float(resampled[name].std()),
            {place.name: share_kept(place, losses[place.domain].mean) for place in places},
            is_tied=name == best or float(np.quantile(lead_R, (1.0 - CONFIDENCE) / 2.0)) <= 0.0,
        )
    return result


def _draws(n_texts: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """Return how often every text is drawn in every resample, `(R, T)`."""
    return generator.multinomial(n_texts, np.full(n_texts, 1.0 / n_texts), size=N_RESAMPLES)


def _resampled(
    losses: Losses, base: Losses | None, places: Sequence[Place], draws: Mapping[str, NDArray[np.int64]]
) -> NDArray[np.float64]:
    """Return the mean score in every resample, `(R,)`."""
    scores_ER = []
    for place in places:
        drawn_RT = draws[place.domain]
        of_base = _mean_loss(base[place.domain], drawn_RT) if base is not None else None
        scores_ER.append(place.score(_mean_loss(losses[place.domain], drawn_RT), of_base))
    mean: NDArray[np.float64] = np.mean(scores_ER, axis=0)
    return mean


def _mean_loss(losses: TextLosses, drawn_RT: NDArray[np.int64]) -> NDArray[np.float64]:
    mean: NDArray[np.float64] = (drawn_RT @ losses.sums) / np.maximum(drawn_RT @ losses.counts, 1)
    return mean
