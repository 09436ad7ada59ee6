"""The three ways of MAP: all experts at once, with more points where the surrogates are wrong, and two by two."""

# Shape suffixes: N = experts, M = tasks, P = points, D = draws.

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from hf_frmerge.weighting.pareto.front import Front, Task, candidates, choose, find_front
from hf_frmerge.weighting.pareto.region import Array, Region, bins, draw_in_bins, n_bins
from hf_frmerge.weighting.pareto.surrogate import Quadratic, fit_quadratic, require_evaluations

_DROPS, _DROPPED = 30, 0.2
_TEMPERATURE = 0.07
_ROUNDS = 3
_CHECKS = 2


@dataclass(frozen=True)
class Measurement:
    """
    What a merge was measured to do.

    Attributes:
        scores_M: of every task, higher is better.
        precisions_M: one over the variance of each score, in any unit; 1 if it is not known.
    """

    scores_M: Array
    precisions_M: Array


Measure = Callable[[Array], Measurement]
"""Coefficients of the experts, `(N,)` -> what a merge with them does."""


@dataclass(frozen=True)
class Found:
    """
    A front, and all merges that were measured for it.

    Attributes:
        front: predicted by the surrogates.
        points_PN: coefficients of the merges that were measured.
        scores_PM: measured.
        predicted_PM: what the surrogates, which were fitted to them, say of them.
    """

    front: Front
    points_PN: Array
    scores_PM: Array
    predicted_PM: Array


class Surrogates:
    """
    Measured points, and the surrogates that were fitted to all of them.

    Args:
        tasks: What is measured.
        region: Where points are measured.
        measure: Merges and measures.
        seed: Of NSGA.
    """

    def __init__(self, tasks: Sequence[Task], region: Region, measure: Measure, seed: int) -> None:
        self.tasks, self.region, self._measure, self._seed = tasks, region, measure, seed
        self.points_PN = np.empty((0, region.n_experts))
        self._measurements: list[Measurement] = []

    @property
    def scores_PM(self) -> Array:
        """Scores of all points."""
        return np.stack([one.scores_M for one in self._measurements])

    def add(self, points_PN: Array) -> None:
        """Measure more points."""
        for point_N in points_PN:
            self._measurements.append(self._measure(point_N))
            self.points_PN = np.vstack([self.points_PN, point_N])

    def fit(self) -> list[Quadratic]:
        """
        Fit a quadratic function to every task.

        Raises:
            ArgumentError: If there are too few points.
        """
        precisions_PM = np.stack([one.precisions_M for one in self._measurements])
        return [
            fit_quadratic(self.region, self.points_PN, scores_P, precisions_P)
            for scores_P, precisions_P in zip(self.scores_PM.T, precisions_PM.T)
        ]

    def find(self) -> Found:
        """
        Find the front.

        What would be chosen of it is measured and joins the fit, twice: so a surrogate that promises too much where
        nothing was measured is found out.
        """
        for _ in range(_CHECKS):
            points_PN, scores_PM = candidates(self.fit(), self.region, self._seed)
            self.add(points_PN[sorted(set(choose(self.tasks, scores_PM).values()))])
        surrogates = self.fit()
        predicted_PM = np.stack([surrogate(self.points_PN) for surrogate in surrogates], axis=1)
        front = find_front(self.tasks, surrogates, self.region, self._seed)
        return Found(front, self.points_PN, self.scores_PM, predicted_PM)


def front_of_all(tasks: Sequence[Task], region: Region, measure: Measure, n_evaluations: int, seed: int) -> Found:
    """Find the front of all experts at once, from points drawn evenly."""
    require_evaluations(region, n_evaluations)
    measured = Surrogates(tasks, region, measure, seed)
    measured.add(region.sample(n_evaluations, np.random.default_rng(seed)))
    return measured.find()


def front_by_acquisition(
    tasks: Sequence[Task], region: Region, measure: Measure, n_evaluations: int, seed: int
) -> Found:
    """
    Find the front of all experts at once; half of the points are drawn where the surrogates are least sure.

    Bayesian MAP: after an even draw, in each of three rounds bins of directions are drawn by how badly the surrogates
    do in them.
    """
    require_evaluations(region, n_evaluations)
    generator = np.random.default_rng(seed)
    measured = Surrogates(tasks, region, measure, seed)
    first = max((n_evaluations + 1) // 2, region.n_coefficients)
    measured.add(region.sample(first, generator))
    left = n_evaluations - len(measured.points_PN)
    for round_ in range(_ROUNDS):
        more = left // (_ROUNDS - round_)
        left -= more
        if more:
            doubts = bin_doubts(measured, measured.fit(), generator)
            odds = np.exp((doubts - doubts.max()) / _TEMPERATURE)
            numbers = generator.choice(len(doubts), size=more, p=odds / odds.sum())
            measured.add(draw_in_bins(numbers, region, generator))
    return measured.find()


def bin_doubts(measured: Surrogates, surrogates: Sequence[Quadratic], generator: np.random.Generator) -> Array:
    """
    Return how little is known in every bin of directions, from 0 to 1; a bin without a point has the largest doubt.

    Residuals are in units of the spread of their task's scores, and squares are the mean over the tasks.
    """
    n_experts = measured.region.n_experts
    spread_M = measured.scores_PM.std(0)
    squares_P = np.mean(
        [np.square(one.residuals_P / (spread or 1.0)) for one, spread in zip(surrogates, spread_M)], axis=0
    )
    number_P = bins(measured.points_PN)
    doubts = np.full(n_bins(n_experts) ** (n_experts - 1), np.nan)
    for number in np.unique(number_P):
        doubts[number] = doubt_of(squares_P[number_P == number], generator)
    largest = float(np.nanmax(doubts))
    doubts = np.where(np.isnan(doubts), largest, doubts)
    return doubts / largest if largest else np.ones_like(doubts)


def doubt_of(squares_P: Array, generator: np.random.Generator) -> float:
    """Return the mean of squared residuals plus half its standard deviation over draws that leave out a fifth."""
    # Each draw is from all points: what one leaves out is in the next.
    kept_DP = generator.random((_DROPS, len(squares_P))) >= _DROPPED
    kept_DP = kept_DP[kept_DP.any(1)]
    means_D = kept_DP @ squares_P / kept_DP.sum(1)
    return float(squares_P.mean() + 0.5 * (means_D.std() if len(means_D) else 0.0))


@dataclass(frozen=True)
class _Node:
    """Experts that were joined: their weights, the own task of each, and the mean score of all tasks."""

    weights_N: Array
    tasks: tuple[int, ...]
    score: float


def front_of_pairs(
    tasks: Sequence[Task],
    region: Region,
    measure: Measure,
    own_tasks: Sequence[int],
    n_evaluations: int,
    seed: int,
) -> Found:
    """
    Join two by two, each time the two whose mean scores over all tasks are closest; return the front of the last two.

    Nested MAP. A pair has two objectives, the mean scores of the tasks of either; the point with the highest sum over
    all of these tasks is kept. So a pair takes evaluations for two coordinates, however many experts.

    Args:
        tasks: All tasks.
        region: Of all experts.
        measure: Merges and measures all tasks.
        own_tasks: Number of each expert's own task.
        n_evaluations: Of every pair.
        seed: Of all that is drawn.
    """
    pair = Region(2, region.scales)
    nodes = []
    for weights_N, task in zip(np.eye(region.n_experts), own_tasks):
        alone = measure(weights_N * min(max(1.0, region.scales[0]), region.scales[1]))
        nodes.append(_Node(weights_N, (task,), float(alone.scores_M.mean())))
    while True:
        first, second = _closest(nodes)
        joined = np.stack([first.weights_N, second.weights_N])
        groups = [
            Task(" + ".join(tasks[task].name for task in dict.fromkeys(node.tasks)), len(node.tasks))
            for node in (first, second)
        ]
        found = front_of_all(groups, pair, _of_pair(measure, joined, first, second), n_evaluations, seed)
        if len(nodes) == 2:
            front = replace(found.front, points_FN=found.front.points_FN @ joined)
            return replace(found, front=front, points_PN=found.points_PN @ joined)
        chosen_N = found.points_PN[choose(groups, found.scores_PM)["balanced"]] @ joined
        nodes = [node for node in nodes if node is not first and node is not second]
        score = float(measure(chosen_N).scores_M.mean())
        nodes.append(_Node(chosen_N / chosen_N.sum(), first.tasks + second.tasks, score))


def _closest(nodes: Sequence[_Node]) -> tuple[_Node, _Node]:
    """Return the two nodes of closest score, the first of those that are equally close."""
    pairs = [(one, other) for number, one in enumerate(nodes) for other in nodes[number + 1 :]]
    return min(pairs, key=lambda pair: abs(pair[0].score - pair[1].score))


def _of_pair(measure: Measure, joined: NDArray[np.float64], first: _Node, second: _Node) -> Measure:
    """Measure what two nodes are for: the mean score of the tasks of each."""

    def measure_pair(point_2: Array) -> Measurement:
        whole = measure(point_2 @ joined)
        groups = [list(node.tasks) for node in (first, second)]
        # The variance of a mean of independent scores is the mean of their variances over their number.
        variances = [np.mean(1.0 / whole.precisions_M[group]) / len(group) for group in groups]
        return Measurement(np.array([whole.scores_M[group].mean() for group in groups]), 1.0 / np.array(variances))

    return measure_pair
