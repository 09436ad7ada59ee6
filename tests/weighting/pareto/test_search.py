"""All three ways find the maxima of known functions, measure as often as they say, and use all they measured."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from regions import inside

from hf_frmerge.errors import ArgumentError
from hf_frmerge.weighting.pareto.front import Task, choose
from hf_frmerge.weighting.pareto.region import Region, bins
from hf_frmerge.weighting.pareto.search import (
    Measurement,
    Surrogates,
    bin_doubts,
    doubt_of,
    front_by_acquisition,
    front_of_all,
    front_of_pairs,
)

Peaks = np.ndarray


class Landscape:
    """Scores of tasks that have their peaks at given coefficients; remembers where it was measured."""

    def __init__(self, peaks: Peaks, shape: Callable[[np.ndarray], np.ndarray] = lambda squares: -squares) -> None:
        self.peaks, self.shape, self.points = peaks, shape, []
        self.tasks = [Task(f"t{number}") for number in range(len(peaks))]

    def __call__(self, point: np.ndarray) -> Measurement:
        self.points.append(point)
        return Measurement(self.shape(np.square(point - self.peaks).sum(1)), np.ones(len(self.peaks)))


PEAKS = np.array([[1.1, 0.1, 0.2], [0.1, 0.8, 0.1], [0.2, 0.3, 0.9]])
WIDE = (0.5, 2.0)


@pytest.mark.parametrize("find", [front_of_all, front_by_acquisition])
def test_all_at_once(find: Callable) -> None:
    land, region = Landscape(PEAKS), Region(3, WIDE)
    found = find(land.tasks, region, land, 20, 0)
    assert len(land.points) == len(found.points_PN) >= 20
    assert len(land.points) <= 20 + 2 * 5  # twice what was chosen: one for each of three tasks, and two
    np.testing.assert_array_equal(found.points_PN, land.points)
    np.testing.assert_allclose(found.predicted_PM, found.scores_PM, atol=1e-9)  # they are quadratic functions
    assert all(one.left_out > 0.999 for one in found.front.surrogates)
    for number, peak in enumerate(PEAKS):
        best = choose(land.tasks, found.scores_PM)[f"best for t{number}"]
        assert np.linalg.norm(found.points_PN[best] - peak) < 0.08
    balanced = found.points_PN[choose(land.tasks, found.scores_PM)["balanced"]]
    np.testing.assert_allclose(balanced, PEAKS.mean(0), atol=0.08)  # the maximum of the sum
    assert inside(region, found.points_PN).all() and inside(region, found.front.points_FN).all()
    again = find(land.tasks, region, Landscape(PEAKS), 20, 0)
    np.testing.assert_array_equal(again.points_PN, found.points_PN)
    other = find(land.tasks, region, Landscape(PEAKS), 20, 1)
    assert not np.array_equal(other.points_PN[: len(found.points_PN)], found.points_PN[: len(other.points_PN)])


def test_a_surrogate_that_promises_too_much_is_found_out() -> None:
    """Scores that fall off a cliff at large scales, where few points were measured."""

    def cliff(point: np.ndarray) -> Measurement:
        return Measurement(np.array([point.sum() if point.sum() < 1.8 else -1.0]), np.ones(1))

    found = front_of_all([Task("t")], Region(2, WIDE), cliff, 12, 0)
    best = found.points_PN[choose([Task("t")], found.scores_PM)["balanced"]]
    assert 1.2 < best.sum() < 1.8
    promised = found.front.points_FN[found.front.scores_FM[:, 0].argmax()]
    assert cliff(promised).scores_M[0] <= found.scores_PM.max()  # so what is chosen is chosen of what was measured


@pytest.mark.parametrize("find", [front_of_all, front_by_acquisition])
def test_too_few_evaluations_are_refused_before_any_is_made(find: Callable) -> None:
    land = Landscape(PEAKS)
    with pytest.raises(ArgumentError, match="Measure 10 or more, best 20"):
        find(land.tasks, Region(3, WIDE), land, 9, 0)
    assert land.points == []
    find(land.tasks, Region(3, WIDE), land, 10, 0)


def test_acquisition_draws_where_the_surrogates_are_wrong() -> None:
    """Scores that are flat but for a kink between the first and the second expert."""

    def kinked(point: np.ndarray) -> Measurement:
        weights = point / point.sum()
        return Measurement(np.array([50.0 * max(0.0, weights[0] - 0.6)]), np.ones(1))

    points: list[np.ndarray] = []
    front_by_acquisition([Task("t")], Region(3), lambda point: points.append(point) or kinked(point), 60, 0)
    known = Surrogates([Task("t")], Region(3), kinked, 0)
    for start, stop in ((0, 30), (30, 40), (40, 50)):  # half of them evenly, the others in three rounds
        known.add(np.array(points[start:stop]))
        doubts = bin_doubts(known, known.fit(), np.random.default_rng(1))
        drawn = doubts[bins(np.array(points[stop : stop + 10]))]
        assert drawn.mean() > 0.8 and drawn.mean() > doubts.mean() + 0.1


def test_what_is_left_out_is_drawn_anew_each_time() -> None:
    """So the mean varies as by leaving out a fifth once: by the variance over n, times 0.2 / 0.8."""
    squares = np.square(np.random.default_rng(0).normal(size=2000))
    doubts = [doubt_of(squares, np.random.default_rng(seed)) - squares.mean() for seed in range(20)]
    assert np.mean(doubts) == pytest.approx(0.5 * np.sqrt(squares.var() / 2000 * 0.2 / 0.8), rel=0.1)
    assert doubt_of(np.array([3.0]), np.random.default_rng(0)) == 3.0


def test_doubts_are_of_all_points_so_far() -> None:
    """A point that was added and fits worst makes its bin the one of most doubt."""
    region = Region(2)
    values = {0.0: 0.0, 1.0: 1.0}
    measured = Surrogates(
        [Task("t")],
        region,
        lambda point: Measurement(np.array([values.get(float(point[0]), float(point[0]))]), np.ones(1)),
        0,
    )
    measured.add(np.array([[share, 1 - share] for share in np.linspace(0, 1, 9)]))
    before = bin_doubts(measured, measured.fit(), np.random.default_rng(0))
    values[0.93] = 5.0
    measured.add(np.array([[0.93, 0.07]]))
    [number] = bins(np.array([[0.93, 0.07]]))
    after = bin_doubts(measured, measured.fit(), np.random.default_rng(0))
    assert after.argmax() == number and not np.array_equal(before, after)


def test_two_by_two_of_two_is_all_at_once() -> None:
    lands = [Landscape(PEAKS[:2, :2]) for _ in range(2)]
    plain = front_of_all(lands[0].tasks, Region(2, WIDE), lands[0], 12, 3)
    nested = front_of_pairs(lands[1].tasks, Region(2, WIDE), lands[1], [0, 1], 12, 3)
    np.testing.assert_array_equal(nested.points_PN, plain.points_PN)
    np.testing.assert_array_equal(nested.front.points_FN, plain.front.points_FN)
    assert len(lands[1].points) == len(lands[0].points) + 2  # every expert alone


def test_two_by_two_joins_every_expert_once() -> None:
    n = 5
    land, region = Landscape(0.4 * np.eye(n) + 0.1), Region(n, WIDE)
    found = front_of_pairs(land.tasks, region, land, range(n), 12, 0)
    assert inside(region, np.array(land.points)).all()
    ends = found.points_PN[:2] / found.points_PN[:2].sum(1, keepdims=True)  # the last two, each alone
    assert (ends[0] * ends[1] == 0).all() and (ends.sum(0) > 0).all()
    least = n + (n - 1) * 12 + (n - 2)  # alone, every pair, and every pair but the last as it was joined
    assert least < len(land.points) <= least + (n - 1) * 2 * 4
    names = {name for task in found.front.tasks for name in task.name.split(" + ")}
    assert names == {task.name for task in land.tasks} and sum(task.n_experts for task in found.front.tasks) == n
    best = found.points_PN[choose(found.front.tasks, found.scores_PM)["balanced"]]
    np.testing.assert_allclose(best, land.peaks.mean(0), atol=0.12)  # near the maximum of the sum of all


def test_a_pair_is_measured_at_its_own_tasks_and_no_others() -> None:
    """What the third task says is nothing to the pair of the first two, which is joined first."""
    land = Landscape(PEAKS)
    scores = [np.array([1.0, 1.0, 0.0]), np.array([1.0, 0.9, 0.0]), np.array([-5.0, -5.0, 0.0])]

    def alone_first(point: np.ndarray) -> Measurement:
        for number, score in enumerate(scores):
            if np.array_equal(point, np.eye(3)[number]):
                land.points.append(point)
                return Measurement(score, np.ones(3))
        return land(point)

    front_of_pairs(land.tasks, Region(3, WIDE), alone_first, [0, 1, 2], 12, 0)
    first_pair = np.array(land.points[3:15])
    assert (first_pair[:, 2] == 0).all() and (first_pair[:, :2].sum(0) > 0).all()
