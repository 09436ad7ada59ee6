"""What merges are to be good at: a task for every text that an expert is measured on."""

# Shape suffixes: M = tasks.

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from hf_frmerge.comparison.texts import TextLosses
from hf_frmerge.comparison.yardstick import Losses, Place, share_kept
from hf_frmerge.weighting.pareto.front import Task
from hf_frmerge.weighting.pareto.search import Measurement


class Tasks:
    """
    The tasks of a search.

    Args:
        places: Where merges are scored. Experts with the same own text have one task.
    """

    def __init__(self, places: Sequence[Place]) -> None:
        self._places: dict[str, list[Place]] = {}
        for place in places:
            self._places.setdefault(place.domain, []).append(place)

    @property
    def all(self) -> tuple[Task, ...]:
        """The tasks, by the names of their texts."""
        return tuple(Task(domain, len(places)) for domain, places in self._places.items())

    @property
    def own(self) -> dict[str, int]:
        """Expert, or text where experts are not scored, -> number of its task."""
        return {place.name: number for number, places in enumerate(self._places.values()) for place in places}

    def scores(self, losses: Losses) -> dict[str, float]:
        """Return the score at every task: the share of the experts' gain that is kept, or minus the loss."""
        return {
            domain: math.fsum(share_kept(place, losses[domain].mean) for place in places) / len(places)
            for domain, places in self._places.items()
        }

    def measurement(self, losses: Losses) -> Measurement:
        """Return the scores with their precisions, from the spread of the loss over texts."""
        precisions_M = []
        for domain, places in self._places.items():
            slope = math.fsum(1.0 / (place.gain or 1.0) for place in places) / len(places)
            variance = slope**2 * _variance_of_mean(losses[domain])
            precisions_M.append(1.0 / variance if variance > 0 else 1.0)  # one text has no spread
        return Measurement(np.array(list(self.scores(losses).values())), np.array(precisions_M))


def _variance_of_mean(losses: TextLosses) -> float:
    """Return the variance of the mean loss over texts, to first order in their sums and counts."""
    deviations = losses.sums - losses.mean * losses.counts
    return float(np.square(deviations).sum() / losses.counts.sum() ** 2)
