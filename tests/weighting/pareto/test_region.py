"""Points lie where they should, and directions and bins are those of the textbook."""

from __future__ import annotations

import math

import numpy as np
import pytest
from regions import inside

from hf_frmerge.weighting.pareto.region import Region, angles, bins, directions, draw_in_bins, n_bins

REGIONS = [Region(2), Region(2, (0.5, 2.0)), Region(3, (0.5, 2.0)), Region(6, (1.0, 3.0)), Region(9)]


@pytest.mark.parametrize(("n_experts", "n_evaluations"), [(2, 12), (3, 20), (4, 30), (8, 90)])
def test_the_number_of_evaluations_of_the_paper(n_experts: int, n_evaluations: int) -> None:
    assert Region(n_experts, (0.5, 2.0)).n_evaluations == n_evaluations
    assert Region(n_experts + 1).n_evaluations == n_evaluations  # one coordinate less without a scale


@pytest.mark.parametrize("region", REGIONS, ids=str)
def test_samples_are_in_the_region_with_every_expert_alone_and_all_alike(region: Region) -> None:
    points = region.sample(40, np.random.default_rng(0))
    assert points.shape == (40, region.n_experts) and (points >= 0).all()
    scales = points.sum(1)
    assert (scales >= region.scales[0] - 1e-12).all() and (scales <= region.scales[1] + 1e-12).all()
    weights = points / scales[:, None]
    np.testing.assert_allclose(weights[: region.n_experts], np.eye(region.n_experts), atol=1e-15)
    np.testing.assert_allclose(weights[region.n_experts], 1 / region.n_experts)
    if region.scales[0] < region.scales[1]:  # one scale in each fortieth of the range
        low, high = region.scales
        assert sorted(((scales - low) / (high - low) * 40).astype(int)) == list(range(40))
    np.testing.assert_array_equal(points, region.sample(40, np.random.default_rng(0)))
    assert (points != region.sample(40, np.random.default_rng(1)))[region.n_experts + 1 :].any()


def test_weights_are_uniform_on_the_simplex() -> None:
    weights = Region(4).sample(20000, np.random.default_rng(0))[5:]
    np.testing.assert_allclose(weights.mean(0), 0.25, atol=0.005)
    # Var of one of N shares: (N - 1) / (N^2 (N + 1)).
    np.testing.assert_allclose(weights.var(0), 3 / 80, rtol=0.03)


@pytest.mark.parametrize("region", REGIONS[:3], ids=str)
def test_a_grid_covers_the_region(region: Region) -> None:
    grid = region.grid()
    assert inside(region, grid).all() and len(np.unique(grid.round(9), axis=0)) == len(grid) < 16_000
    for point in region.sample(20, np.random.default_rng(5)):
        assert np.linalg.norm(grid - point, axis=1).min() < 0.1
    assert not inside(region, grid * 1.01 * region.scales[1] / region.scales[0]).any()
    assert not inside(region, np.array([[-0.2, *[1.2 / (region.n_experts - 1)] * (region.n_experts - 1)]])).any()


def test_directions_have_their_angles() -> None:
    a, b = 0.3, 1.1
    expected = [math.cos(a), math.sin(a) * math.cos(b), math.sin(a) * math.sin(b)]
    np.testing.assert_allclose(directions(np.array([[a, b]])), [expected])
    given = np.random.default_rng(0).uniform(0, math.pi / 2, size=(50, 4))
    unit = directions(given)
    np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1)
    np.testing.assert_allclose(angles(3.7 * unit), given)


@pytest.mark.parametrize("region", [Region(2), Region(3, (0.5, 2.0)), Region(5, (0.5, 2.0))], ids=str)
def test_what_is_drawn_in_a_bin_is_in_it(region: Region) -> None:
    numbers = np.arange(n_bins(region.n_experts) ** (region.n_experts - 1)).repeat(20)
    points = draw_in_bins(numbers, region, np.random.default_rng(0))
    assert inside(region, points).all()
    np.testing.assert_array_equal(bins(points), numbers)
