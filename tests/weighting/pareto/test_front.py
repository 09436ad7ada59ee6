"""Fronts of known quadratic functions: the points between their maxima."""

from __future__ import annotations

import numpy as np
import pytest
from regions import inside

from hf_frmerge.errors import MergeError
from hf_frmerge.weighting.pareto import nsga
from hf_frmerge.weighting.pareto.front import Front, Task, choose, find_front, non_dominated
from hf_frmerge.weighting.pareto.region import Region
from hf_frmerge.weighting.pareto.surrogate import Quadratic, fit_quadratic


def cone(region: Region, peak: np.ndarray) -> Quadratic:
    """Return a surrogate that is minus the squared distance from a peak."""
    points = region.sample(region.n_evaluations, np.random.default_rng(0))
    return fit_quadratic(region, points, -np.square(points - peak).sum(1))


def front_of(region: Region, peaks: np.ndarray, seed: int = 0) -> Front:
    tasks = [Task(f"t{number}") for number in range(len(peaks))]
    return find_front(tasks, [cone(region, peak) for peak in peaks], region, seed)


@pytest.mark.parametrize(
    ("region", "peaks", "tolerance"),
    [
        (Region(2), [[0.9, 0.1], [0.3, 0.7]], 2e-3),
        (Region(2, (0.5, 2.0)), [[0.9, 0.3], [0.2, 1.5]], 2e-2),
        (Region(3, (0.5, 2.0)), [[0.9, 0.3, 0.1], [0.2, 0.4, 1.0]], 8e-2),
        (Region(5, (0.5, 2.0)), [[0.5, 0.3, 0.1, 0.2, 0.1], [0.1, 0.2, 0.6, 0.3, 0.4]], 3e-2),
        (Region(6), [[0.5, 0.1, 0.1, 0.1, 0.1, 0.1], [0.1, 0.1, 0.1, 0.1, 0.1, 0.5]], 3e-2),
    ],
    ids=["line", "grid of 2", "grid of 3", "NSGA with a scale", "NSGA"],
)
def test_the_front_of_two_is_the_line_between_their_peaks(region: Region, peaks: list, tolerance: float) -> None:
    """There the square roots of both losses add up to the distance of the peaks; elsewhere to more."""
    one, other = np.array(peaks)
    front, length = front_of(region, np.array(peaks)), np.linalg.norm(one - other)
    roots = np.sqrt(np.maximum(-front.scores_FM, 0))
    np.testing.assert_allclose(roots.sum(1), length, atol=tolerance * length)
    assert (roots.sum(1) >= length - 1e-6).all()
    places = np.sort(roots[:, 0] / length)  # of the whole line
    assert places[0] < 0.1 and places[-1] > 0.9 and np.diff(places).max() < 0.15
    assert inside(region, front.points_FN).all()


def test_the_front_of_three_by_nsga_is_the_triangle_of_their_peaks() -> None:
    region = Region(4, (0.5, 2.0))
    peaks = np.array([[0.8, 0.2, 0.1, 0.1], [0.1, 0.9, 0.2, 0.1], [0.1, 0.1, 0.3, 1.0]])
    front = front_of(region, peaks)
    sides = (peaks[1:] - peaks[0]).T
    within = np.linalg.lstsq(sides, (front.points_FN - peaks[0]).T, rcond=None)[0]
    apart = np.linalg.norm(front.points_FN.T - peaks[0][:, None] - sides @ within, axis=0)
    # So much lower is every score than at the nearest point of the triangle.
    assert np.quantile(np.square(apart), 0.9) < 0.03
    assert np.quantile(np.minimum(within.min(0), 1 - within.sum(0)), 0.1) > -0.1
    for peak in peaks:
        assert np.square(front.points_FN - peak).sum(1).min() < 0.03


def test_a_rising_function_is_not_followed_out_of_the_region() -> None:
    for region in (Region(2, (0.5, 2.0)), Region(5, (0.5, 2.0))):
        front = front_of(region, np.eye(region.n_experts)[:2] * 100)
        assert inside(region, front.points_FN).all()
        best = choose(front.tasks, front.scores_FM)["best for t0"]
        np.testing.assert_allclose(front.points_FN[best], 2.0 * np.eye(region.n_experts)[0], atol=0.05)


def test_seeds_are_kept_and_order_and_units_of_tasks_are_nothing() -> None:
    region, peaks = Region(5), np.array([[0.6, 0.1, 0.1, 0.1, 0.1], [0.1, 0.1, 0.6, 0.1, 0.1]])
    front = front_of(region, peaks)
    np.testing.assert_array_equal(front_of(region, peaks).points_FN, front.points_FN)
    assert not np.array_equal(front_of(region, peaks, seed=1).points_FN, front.points_FN)
    region, peaks = Region(3), np.array([[0.6, 0.3, 0.1], [0.1, 0.3, 0.6]])
    front = front_of(region, peaks)  # on a grid, where there is no chance in it
    np.testing.assert_array_equal(front_of(region, peaks[::-1]).points_FN, front.points_FN)
    # In nats or shares, of many tokens or of few: a front does not care.
    scores = front.scores_FM * [64.0, 2.0**-10]
    assert len(non_dominated(scores)) == len(scores)


def test_non_dominated_is_what_comparing_all_pairs_says() -> None:
    draw = np.random.default_rng(0)
    for n_tasks in (1, 2, 3, 5):
        scores = draw.integers(0, 6, size=(200, n_tasks)).astype(float)
        expected = [
            i
            for i, mine in enumerate(scores)
            if not any(
                (other >= mine).all() and ((other > mine).any() or j < i) for j, other in enumerate(scores) if j != i
            )
        ]
        kept = non_dominated(scores)
        assert kept.tolist() == expected
        worse = np.vstack([scores, scores[kept[0]] - 1])  # one that is dominated changes nothing
        assert non_dominated(worse).tolist() == expected


def test_what_is_chosen() -> None:
    scores = np.array([[1.0, 0.0], [0.55, 0.6], [0.2, 0.8], [0.7, 0.5]])
    assert choose([Task("a"), Task("b")], scores) == {
        "balanced": 3, "best worst case": 1, "best for a": 0, "best for b": 2
    }  # fmt: skip
    # Three experts for whom a text counts count three times.
    assert choose([Task("a", 3), Task("b")], scores)["balanced"] == 0


def test_a_thinned_front_keeps_its_ends_and_spread() -> None:
    front = front_of(Region(2, (0.5, 2.0)), np.array([[0.9, 0.3], [0.2, 1.5]]))
    thin = front.thinned(9)
    assert len(front.points_FN) > 40 and len(thin.points_FN) == 9 and front.thinned(10**6) is front
    np.testing.assert_array_equal(thin.scores_FM.max(0), front.scores_FM.max(0))
    gaps = np.linalg.norm(np.diff(thin.scores_FM[np.argsort(thin.scores_FM[:, 0])], axis=0), axis=1)
    assert gaps.max() < 3 * gaps.min()


def test_without_pymoo_a_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nsga, "find_spec", lambda name: None)
    with pytest.raises(MergeError, match=r"of 5 experts .* pip install 'hf_frmerge\[pareto\]'"):
        front_of(Region(5), np.eye(5)[:2])
    front_of(Region(3, (0.5, 2.0)), np.eye(3)[:2])  # on a grid
