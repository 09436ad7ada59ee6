"""Surrogates are exact on quadratic functions, weighted as they should be, and validated as by fitting again."""

from __future__ import annotations

import numpy as np
import pytest

from hf_frmerge.errors import ArgumentError
from hf_frmerge.weighting.pareto.region import Region
from hf_frmerge.weighting.pareto.surrogate import fit_quadratic

REGIONS = [Region(2), Region(2, (0.5, 2.0)), Region(3), Region(3, (0.5, 2.0)), Region(5, (0.1, 0.3)), Region(8)]


def quadratic(n_experts: int, seed: int = 0):
    """Return 1/2 c'Ac + b'c + e with random A, b and e, and no bound on its values."""
    draw = np.random.default_rng(seed)
    half, b, e = draw.normal(size=(n_experts, n_experts)), draw.normal(size=n_experts), 100 * draw.normal()
    return lambda points: np.array([0.5 * c @ (half + half.T) @ c + b @ c + e for c in points])


@pytest.mark.parametrize("region", REGIONS, ids=str)
@pytest.mark.parametrize("spare", [0, 1, 10])
def test_a_quadratic_function_is_recovered(region: Region, spare: int) -> None:
    draw, truth = np.random.default_rng(1), quadratic(region.n_experts)
    points = region.sample(region.n_coefficients + spare, draw)
    fitted = fit_quadratic(region, points, truth(points), draw.uniform(0.1, 1, len(points)))
    elsewhere = region.sample(50, np.random.default_rng(2))
    np.testing.assert_allclose(fitted(elsewhere), truth(elsewhere), rtol=0, atol=1e-6 * np.ptp(truth(elsewhere)))
    assert np.isnan(fitted.left_out) if spare == 0 else fitted.left_out == pytest.approx(1, abs=1e-9)


def naive_fit(design: np.ndarray, scores: np.ndarray, precisions: np.ndarray, ridge: float) -> np.ndarray:
    """Solve the normal equations of the penalised sum of weighted squares."""
    left = design.T @ (precisions[:, None] * design)
    penalty = ridge * np.trace(left) / len(left) * np.eye(len(left))
    penalty[0, 0] = 0.0
    return np.linalg.solve(left + penalty, design.T @ (precisions * scores))


def test_noisy_scores_are_fitted_and_validated_as_by_fitting_again() -> None:
    """Each point is left out of a fit of its own, where the ridge is that of the whole; the best ridge is taken."""
    region, draw = Region(3, (0.5, 2.0)), np.random.default_rng(3)
    points = region.sample(16, draw)
    scores = quadratic(3)(points) + 0.5 * draw.normal(size=16)
    precisions = draw.uniform(0.1, 1.0, 16)
    precisions /= precisions.max()
    x = points / 2.0
    design = np.array([[1, *c, *(c[i] * c[j] for i in range(3) for j in range(i, 3))] for c in x])
    missed = {}
    for ridge in (0.0, 1e-4, 1e-3, 1e-2, 1e-1):
        # The penalty is that of all points, so that only the point is left out.
        scale = np.trace(design.T @ (precisions[:, None] * design))
        errors = []
        for out in range(16):
            rest = np.arange(16) != out
            own = np.trace(design[rest].T @ (precisions[rest, None] * design[rest]))
            fit = naive_fit(design[rest], scores[rest], precisions[rest], ridge * scale / own)
            errors.append(precisions[out] * (scores[out] - design[out] @ fit) ** 2)
        missed[ridge] = sum(errors)
    best = min(missed, key=missed.get)
    fitted = fit_quadratic(region, points, scores, precisions)
    np.testing.assert_allclose(fitted(points), design @ naive_fit(design, scores, precisions, best), rtol=1e-8)
    np.testing.assert_allclose(fitted.residuals_P, scores - fitted(points), atol=1e-12)
    means = [np.average(np.delete(scores, out), weights=np.delete(precisions, out)) for out in range(16)]
    spread = sum(precisions * (scores - means) ** 2)
    assert fitted.left_out == pytest.approx(1 - missed[best] / spread, abs=1e-9)
    assert 0.2 < fitted.left_out < 0.999  # noise is seen


def test_a_point_that_is_hardly_known_hardly_counts() -> None:
    region, truth = Region(2, (0.5, 2.0)), quadratic(2)
    points = region.sample(12, np.random.default_rng(0))
    scores, precisions = truth(points), np.ones(12)
    scores[4] += 10.0
    precisions[4] = 1e-12
    np.testing.assert_allclose(
        fit_quadratic(region, points, scores, precisions)(points[:4]), truth(points[:4]), atol=1e-6
    )
    assert np.abs(fit_quadratic(region, points, scores)(points[:4]) - truth(points[:4])).max() > 0.1


def test_chance_is_not_taken_for_a_fit() -> None:
    region, draw = Region(4), np.random.default_rng(0)
    points = region.sample(20, draw)
    assert fit_quadratic(region, points, draw.normal(size=20)).left_out < 0.3


def test_too_few_points_are_refused_and_the_number_named_suffices() -> None:
    region, truth = Region(3, (0.5, 2.0)), quadratic(3)
    points = region.sample(9, np.random.default_rng(0))
    with pytest.raises(ArgumentError, match="3 weights and the scale is described by 10 numbers, which 9 merges"):
        fit_quadratic(region, points, truth(points))
    alike = np.repeat(points[:5], 4, axis=0)
    with pytest.raises(ArgumentError, match=r"10 numbers, which 5 merges do not tell\. Measure 10 or more, best 20"):
        fit_quadratic(region, alike, truth(alike))
    points = region.sample(10, np.random.default_rng(0))
    fit_quadratic(region, points, truth(points))
