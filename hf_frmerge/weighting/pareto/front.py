"""The Pareto front of surrogates within the region that was measured, and points chosen from it."""

# Shape suffixes: N = experts, M = tasks, P = points, F = points of the front.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hf_frmerge.weighting.pareto.nsga import find_by_nsga
from hf_frmerge.weighting.pareto.region import GRIDS, Array, Region
from hf_frmerge.weighting.pareto.surrogate import Quadratic


@dataclass(frozen=True)
class Task:
    """
    Something that merges are to be good at.

    Attributes:
        name: for people.
        n_experts: how many experts it is for: so often it counts in a mean over the experts.
    """

    name: str
    n_experts: int = 1


@dataclass(frozen=True)
class Front:
    """
    Points of which none is better than another at every task.

    Attributes:
        tasks: what is to be maximised.
        points_FN: coefficients of the experts.
        scores_FM: predicted by the surrogates, not measured.
        surrogates: one for every task.
    """

    tasks: tuple[Task, ...]
    points_FN: Array
    scores_FM: Array
    surrogates: tuple[Quadratic, ...]

    def thinned(self, n_points: int) -> Front:
        """Return at most so many of its points, spread evenly over the scores; the best of each task are kept."""
        if len(self.points_FN) <= n_points:
            return self
        low_M, high_M = self.scores_FM.min(0), self.scores_FM.max(0)
        unit_FM = (self.scores_FM - low_M) / np.where(high_M > low_M, high_M - low_M, 1.0)
        kept = list(dict.fromkeys(self.scores_FM.argmax(0).tolist()))[:n_points]
        distance_F = np.min([np.linalg.norm(unit_FM - unit_FM[one], axis=1) for one in kept], axis=0)
        while len(kept) < n_points:
            kept.append(int(distance_F.argmax()))
            distance_F = np.minimum(distance_F, np.linalg.norm(unit_FM - unit_FM[kept[-1]], axis=1))
        chosen = np.sort(kept)
        return Front(self.tasks, self.points_FN[chosen], self.scores_FM[chosen], self.surrogates)


def choose(tasks: Sequence[Task], scores_PM: Array) -> dict[str, int]:
    """
    Return which points are chosen, by what they are chosen as; of equal ones the first.

    `balanced` has the highest mean score of the experts, `best worst case` the highest lowest score, and `best for` a
    task the highest score there.
    """
    counts_M = np.array([task.n_experts for task in tasks], dtype=np.float64)
    chosen = {"balanced": int((scores_PM @ counts_M).argmax()), "best worst case": int(scores_PM.min(1).argmax())}
    return chosen | {f"best for {task.name}": int(scores_P.argmax()) for task, scores_P in zip(tasks, scores_PM.T)}


def candidates(surrogates: Sequence[Quadratic], region: Region, seed: int) -> tuple[Array, Array]:
    """
    Return points among which the best by all surrogates are, and their scores, `(P, N)` and `(P, M)`.

    With up to three coordinates on a grid, exactly within its steps; with more by NSGA.

    Args:
        surrogates: Of the scores of every task, higher is better.
        region: The region where they were fitted: outside they say nothing.
        seed: Of NSGA; a grid has no chance in it.

    Raises:
        MergeError: If pymoo is needed and not installed.
    """

    def scores_of(points_PN: Array) -> Array:
        return np.stack([surrogate(points_PN) for surrogate in surrogates], axis=1)

    if region.dimension in GRIDS:
        points_PN = region.grid()
    else:
        points_PN = find_by_nsga(scores_of, len(surrogates), region, seed)
    return points_PN, scores_of(points_PN)


def find_front(tasks: Sequence[Task], surrogates: Sequence[Quadratic], region: Region, seed: int) -> Front:
    """Find the points of a region that are best by the surrogates of all tasks; arguments as of `candidates`."""
    points_PN, scores_PM = candidates(surrogates, region, seed)
    kept_F = non_dominated(scores_PM)
    return Front(tuple(tasks), points_PN[kept_F], scores_PM[kept_F], tuple(surrogates))


def non_dominated(scores_PM: Array) -> NDArray[np.int64]:
    """Return which points are not dominated, in ascending order: of equal ones the first, of none a better one."""
    kept: list[int] = []
    front_FM = np.empty((0, scores_PM.shape[1]))
    # A point that dominates another has the larger sum, or is equal to it; so none is dominated by a later one.
    for point in np.argsort(-scores_PM.sum(1), kind="stable").tolist():
        if not (front_FM >= scores_PM[point]).all(1).any():
            kept.append(point)
            front_FM = scores_PM[kept]
    return np.sort(np.array(kept, dtype=np.int64))
