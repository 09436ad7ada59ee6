from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.stats import entropy

from hf_frmerge.geometry.simplex import (
    barycentre,
    barycentre_from_chords,
    chord_to_distance,
    divergence_terms,
    fisher_rao_distance,
    lumped_divergences,
)

# Concentrations from nearly one-hot (1e-2) to nearly uniform.
draws = st.tuples(st.integers(0, 2**32 - 1), st.integers(2, 12), st.floats(1e-2, 100.0))


def categoricals(seed: int, n_outcomes: int, concentration: float, n: int = 2) -> np.ndarray:
    p = np.random.default_rng(seed).dirichlet(np.full(n_outcomes, concentration), n) + 1e-12
    return p / p.sum(axis=-1, keepdims=True)


def sums(p: np.ndarray, q: np.ndarray) -> list[float]:
    with np.errstate(divide="ignore"):
        return [float(term.sum()) for term in divergence_terms(np.log(p), np.log(q))]


def squared_chords(points: np.ndarray) -> np.ndarray:
    return ((np.sqrt(points)[:, None] - np.sqrt(points)[None]) ** 2).sum(-1)


@settings(deadline=None)
@given(draw=draws)
def test_divergences_are_scipys(draw):
    p, q = categoricals(*draw)
    chord, kl_pq, kl_qp, js = sums(p, q)
    assert chord == pytest.approx(2 - 2 * np.sqrt(p * q).sum(), abs=1e-14)
    assert kl_pq == pytest.approx(entropy(p, q), rel=1e-9, abs=1e-14)
    assert kl_qp == pytest.approx(entropy(q, p), rel=1e-9, abs=1e-14)
    mean = (p + q) / 2
    assert js == pytest.approx((entropy(p, mean) + entropy(q, mean)) / 2, rel=1e-6, abs=1e-13)
    assert fisher_rao_distance(p, q) == pytest.approx(2 * math.acos(min(np.sqrt(p * q).sum(), 1.0)), abs=1e-7)


def test_outcomes_that_cannot_happen():
    p, q = np.array([0.5, 0.5, 0.0, 0.0]), np.array([0.5, 0.0, 0.5, 0.0])
    chord, kl_pq, kl_qp, js = sums(p, q)
    assert chord == pytest.approx(1.0) and kl_pq == kl_qp == math.inf
    assert js == pytest.approx(0.5 * math.log(2))
    assert sums(p, p) == [0.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("step", [1e-3, 1e-6, 1e-9])
def test_small_distances_keep_their_digits(step):
    """Locally d^2 = sum dp^2 / p; arccos of the sum of products would see nothing below 1e-8."""
    p = np.array([0.2, 0.3, 0.5])
    direction = step * np.array([1.0, -2.0, 1.0])
    expected = math.sqrt((direction**2 / p).sum())
    assert fisher_rao_distance(p, p + direction) == pytest.approx(expected, rel=10 * step + 1e-7)
    assert sums(p, p + direction)[1] == pytest.approx(0.5 * expected**2, rel=10 * step, abs=1e-16)


def test_distance_is_the_length_of_the_shortest_path():
    """Bernoulli(sin^2 t) moves at Fisher-Rao speed 2: its length over [a, b] is 2 (b - a)."""
    a, b = 0.1, 1.2
    ends = [np.array([math.sin(t) ** 2, math.cos(t) ** 2]) for t in (a, b)]
    assert fisher_rao_distance(*ends) == pytest.approx(2 * (b - a), rel=1e-14)
    assert chord_to_distance(2.0) == pytest.approx(math.pi, rel=1e-15)


@settings(deadline=None)
@given(draw=draws, split=st.integers(1, 11))
def test_lumping_contracts_and_bounds_what_it_hides(draw, split):
    p, q = categoricals(*draw)
    split = min(split, len(p) - 1)
    whole = sums(p, q)
    with np.errstate(divide="ignore"):
        seen = divergence_terms(np.log(p[:split]), np.log(q[:split]))
    hidden = lumped_divergences(p[split:].sum(), q[split:].sum())
    for exact, part, lump in zip(whole, seen, hidden):
        assert part.sum() + lump <= exact + 1e-12
    assert whole[0] <= seen.chord.sum() + p[split:].sum() + q[split:].sum() + 1e-12


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("concentration", [0.1, 1.0, 10.0])
def test_barycentre_minimises_the_objective(seed, concentration):
    p = categoricals(seed, 5, concentration, n=3)
    weights = np.array([0.5, 0.3, 0.2])

    def objective(logits: np.ndarray) -> float:
        q = np.exp(logits - logits.max())
        return float(weights @ fisher_rao_distance(q / q.sum(), p) ** 2)

    q = barycentre(p, weights)
    assert q.sum() == pytest.approx(1.0, abs=1e-12) and (q >= 0).all()
    actual = minimize(objective, np.log(weights @ p), method="BFGS", options={"gtol": 1e-9})
    exponentials = np.exp(actual.x - actual.x.max())
    assert float(weights @ fisher_rao_distance(q, p) ** 2) <= actual.fun + 1e-12
    np.testing.assert_allclose(q, exponentials / exponentials.sum(), atol=2e-5)


def test_barycentre_of_two_is_the_point_between():
    p = categoricals(3, 6, 0.5)
    q = barycentre(p, [0.75, 0.25])
    whole = fisher_rao_distance(*p)
    np.testing.assert_allclose(fisher_rao_distance(q, p), [0.25 * whole, 0.75 * whole], rtol=1e-10)


@settings(deadline=None)
@given(draw=draws)
@example(draw=(14299, 2, 0.01))  # two of the points are 1e-18 apart
def test_chords_alone_give_the_distances_to_the_barycentre(draw):
    points = categoricals(*draw, n=4)
    weights = np.array([0.2, 0.3, 0.5])
    q = barycentre(points[1:], weights)
    to_barycentre, spread = barycentre_from_chords(squared_chords(points), weights)
    assert to_barycentre == pytest.approx(fisher_rao_distance(points[0], q), rel=1e-6, abs=1e-7)
    np.testing.assert_allclose(spread, fisher_rao_distance(q, points[1:]), rtol=1e-6, atol=1e-7)


def test_chords_of_many_tokens_at_once_and_of_equal_models():
    stack = np.stack([squared_chords(categoricals(seed, 7, 0.3, n=3)) for seed in range(5)])
    together = barycentre_from_chords(stack, [0.5, 0.5])
    for index, chords in enumerate(stack):
        alone = barycentre_from_chords(chords, [0.5, 0.5])
        assert together[0][index] == pytest.approx(alone[0], abs=1e-14)
        np.testing.assert_allclose(together[1][index], alone[1], atol=1e-14)
    equal, spread = barycentre_from_chords(np.zeros((3, 3)), [0.5, 0.5])
    assert equal == 0 and (spread == 0).all()
