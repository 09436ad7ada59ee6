from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog, minimize

from hf_frmerge.geometry import sphere
from hf_frmerge.geometry.gram import embed
from hf_frmerge.geometry.karcher import is_ambiguous, karcher_mean

problems = st.tuples(st.integers(0, 2**32 - 1), st.integers(2, 7), st.floats(1e-4, 1.5))


def cone(seed: int, n: int, spread: float) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors in R^(n + 3), pairwise about `spread` radians apart, and weights between 1 and 10 to one."""
    rng = np.random.default_rng(seed)
    around = rng.standard_normal((n, n + 2))
    around /= np.linalg.norm(around, axis=-1, keepdims=True)
    tilt = np.arccos(np.sqrt(np.cos(spread)))
    units = np.concatenate([np.full((n, 1), np.cos(tilt)), np.sin(tilt) * around], axis=1)
    weights = rng.uniform(1, 10, n)
    return units, weights / weights.sum()


def equicorrelated(n: int, cosine: float) -> np.ndarray:
    gram = np.full((n, n), cosine)
    np.fill_diagonal(gram, 1.0)
    return embed(gram)


def objective(mean: np.ndarray, units: np.ndarray, weights: np.ndarray) -> float:
    return float(weights @ sphere.distance(mean, units) ** 2)


def gradient_norm(mean: np.ndarray, units: np.ndarray, weights: np.ndarray) -> float:
    return float(np.linalg.norm(weights @ sphere.log(mean, units)))


# --- the mean


@settings(deadline=None, max_examples=80)
@given(problem=problems)
def test_mean_is_a_stationary_unit_vector(problem):
    units, weights = cone(*problem)
    result = karcher_mean(units, weights)
    mean = result.coeffs @ units
    assert result.converged
    assert np.linalg.norm(mean) == pytest.approx(1.0, abs=1e-14)
    assert gradient_norm(mean, units, weights) < 2e-12


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("spread", [0.3, 1.0, 1.5])
def test_mean_minimises_the_objective_found_by_scipy(seed, spread):
    units, weights = cone(seed, 4, spread)
    mean = karcher_mean(units, weights).coeffs @ units

    def of_free_vector(x: np.ndarray) -> float:
        return float(weights @ np.arccos(np.clip(units @ x / np.linalg.norm(x), -1, 1)) ** 2)

    actual = minimize(of_free_vector, units[0] + 0.5 * units[1], method="BFGS", options={"gtol": 1e-9})
    assert sphere.distance(mean, actual.x / np.linalg.norm(actual.x)) < 1e-6
    assert of_free_vector(mean) <= actual.fun + 1e-14


@settings(deadline=None, max_examples=40)
@given(problem=problems, nudge=st.floats(1e-3, 1.0))
def test_objective_is_lowest_at_the_mean(problem, nudge):
    units, weights = cone(*problem)
    mean = karcher_mean(units, weights).coeffs @ units
    lowest = objective(mean, units, weights)
    normalised_mean = sphere.normalise(weights @ units)
    direction = np.random.default_rng(problem[0]).standard_normal(mean.shape)
    nearby = sphere.normalise(mean + nudge * direction)
    for other in (normalised_mean, nearby, *units):
        assert lowest <= objective(other, units, weights) * (1 + 1e-12)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**32 - 1), t=st.floats(0, 1), angle=st.floats(1e-6, 3.1))
def test_mean_of_two_is_slerp(seed, t, angle):
    base = sphere.normalise(np.random.default_rng(seed).standard_normal(5))
    across = sphere.normalise(np.eye(5)[0] - base[0] * base)
    units = np.stack([base, np.cos(angle) * base + np.sin(angle) * across])
    assume(np.hypot(*(np.array([1 - t, t]) @ np.array([[1, 0], [np.cos(angle), np.sin(angle)]]))) > 2e-3)
    result = karcher_mean(units, [1 - t, t])
    # The closed form in the plane of the two, from angles alone.
    expected = np.cos(t * angle) * base + np.sin(t * angle) * across
    np.testing.assert_allclose(result.coeffs @ units, expected, rtol=0, atol=2e-11)
    assert result.converged


@settings(deadline=None, max_examples=40)
@given(problem=problems)
def test_mean_does_not_depend_on_order_and_turns_with_the_points(problem):
    units, weights = cone(*problem)
    coeffs = karcher_mean(units, weights).coeffs
    rng = np.random.default_rng(problem[0])
    order = rng.permutation(len(weights))
    np.testing.assert_allclose(karcher_mean(units[order], weights[order]).coeffs, coeffs[order], rtol=1e-11)
    rotation = np.linalg.qr(rng.standard_normal((units.shape[1],) * 2))[0]
    np.testing.assert_allclose(karcher_mean(units @ rotation, weights).coeffs, coeffs, rtol=1e-11)


@pytest.mark.parametrize("n", [2, 5, 16])
@pytest.mark.parametrize("cosine", [-0.05, 0.0, 0.7, 1 - 1e-9])
def test_equal_weights_and_equal_angles_give_the_normalised_sum(n, cosine):
    result = karcher_mean(equicorrelated(n, cosine), np.full(n, 1 / n))
    expected = 1 / np.sqrt(n * (1 + (n - 1) * cosine))  # |sum of units|^2 = n (1 + (n - 1) cosine)
    np.testing.assert_allclose(result.coeffs, np.full(n, expected), rtol=1e-12)


def test_orthogonal_pair_with_uneven_weights():
    result = karcher_mean(np.eye(2), [0.75, 0.25])  # a quarter of the way: 22.5 degrees, not the sum's 18.4
    np.testing.assert_allclose(result.coeffs, [np.cos(np.pi / 8), np.sin(np.pi / 8)], rtol=1e-14)


def test_copies_share_in_proportion_to_their_weights():
    units, weights = cone(1, 3, 1.2)
    single = karcher_mean(units, weights).coeffs
    shares = np.array([0.25, 0.75, 1.0, 1.0]) * weights[[0, 0, 1, 2]]
    doubled = karcher_mean(units[[0, 0, 1, 2]], shares).coeffs
    np.testing.assert_allclose(doubled, np.array([0.25, 0.75, 1, 1]) * single[[0, 0, 1, 2]], rtol=1e-12)


# --- convergence


@pytest.mark.parametrize("n, cosine", [(8, -0.14), (16, -0.05), (16, -0.066), (32, -0.03), (64, 0.0)])
def test_many_nearly_orthogonal_experts_converge_quickly(n, cosine):
    # The unit step contracts by 0.8 and worse here: more than a hundred steps.
    weights = np.random.default_rng(n).dirichlet(np.ones(n), 50)
    units = np.broadcast_to(equicorrelated(n, cosine), (50, n, n))
    result = karcher_mean(units, weights)
    assert not is_ambiguous(units, weights).any()
    assert result.converged.all()
    assert result.n_iter.max() <= 25
    for coeffs, weight in zip(result.coeffs, weights):
        assert gradient_norm(coeffs @ units[0], units[0], weight) < 1e-10


def test_random_wide_sets_in_few_dimensions_converge_to_the_global_minimum():
    rng = np.random.default_rng(0)
    units = sphere.normalise(rng.standard_normal((400, 4, 3)))
    weights = rng.dirichlet(np.ones(4), 400)
    open_ = ~is_ambiguous(units, weights)
    units, weights = units[open_], weights[open_]
    result = karcher_mean(units, weights)
    assert result.converged.all()
    means = np.einsum("bn,bnk->bk", result.coeffs, units)
    lowest = np.sum(weights * sphere.distance(means[:, None], units) ** 2, axis=-1)
    starts = sphere.normalise(rng.standard_normal((3000, 3)))
    elsewhere = np.arccos(np.clip(np.einsum("bnk,sk->bsn", units, starts), -1, 1)) ** 2
    assert (lowest <= np.min(np.einsum("bsn,bn->bs", elsewhere, weights), axis=1) + 1e-12).all()


def test_giving_up_is_said():
    units, weights = cone(2, 5, 1.4)
    result = karcher_mean(units, weights, max_iter=1)
    assert not result.converged
    assert result.n_iter == 1
    assert result.residual > 1e-8
    start = sphere.normalise(weights @ units)
    none = karcher_mean(units, weights, max_iter=0)
    assert none.n_iter == 0
    assert none.residual == pytest.approx(gradient_norm(start, units, weights), rel=1e-10)
    one_step = sphere.exp(start, weights @ sphere.log(start, units))  # the first step is the unit step
    assert result.residual == pytest.approx(gradient_norm(one_step, units, weights), rel=1e-10)


def test_a_block_has_the_same_mean_alone_and_in_any_batch():
    # Blocks finish at different steps and leave; neither that nor the slabs may touch the others.
    problems = [cone(seed, 9, spread) for seed, spread in enumerate(np.geomspace(1e-4, 1.5, 30))]
    units, weights = np.stack([p[0] for p in problems]), np.stack([p[1] for p in problems])
    many = karcher_mean(np.tile(units, (60, 1, 1)), np.tile(weights, (60, 1)))
    assert len(set(many.n_iter[:30].tolist())) > 3
    for i in range(30):
        alone = karcher_mean(units[i], weights[i])
        np.testing.assert_allclose(alone.coeffs, many.coeffs[-30 + i], rtol=1e-12, atol=1e-13)
        assert many.residual[-30 + i] < 1e-12
        assert abs(alone.n_iter - many.n_iter[-30 + i]) <= 1  # a residual within rounding of the tolerance
    shaped = karcher_mean(units.reshape(5, 6, 9, 12), weights.reshape(5, 6, 9))
    np.testing.assert_allclose(shaped.coeffs.reshape(30, 9), many.coeffs[:30], rtol=1e-12, atol=1e-13)
    assert shaped.converged.shape == (5, 6)


def test_vanishing_sums_are_not_answered():
    units = np.array([[[1.0, 0.0], [-1.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]]])
    result = karcher_mean(units, [0.5, 0.5])
    assert np.isnan(result.coeffs[0]).all()
    assert result.residual[0] == np.inf
    assert result.converged.tolist() == [False, True]


def test_weights_of_the_wrong_number_are_refused():
    with pytest.raises(ValueError, match="broadcast"):
        karcher_mean(np.eye(3), [0.5, 0.5])


# --- ambiguity


def on_circle(*degrees: float) -> np.ndarray:
    return np.stack([np.cos(np.radians(degrees)), np.sin(np.radians(degrees))], axis=-1)


@pytest.mark.parametrize(
    "degrees, weights, expected",
    [
        ((0, 180), (0.5, 0.5), True),
        ((0, 180), (0.9, 0.1), True),  # a shortest arc to the opposite point has no preferred direction
        ((0, 179.95), (0.5, 0.5), True),  # within the noise of a single-precision Gram matrix
        ((0, 179), (0.5, 0.5), False),
        ((0, 170), (0.95, 0.05), False),  # the mean is 161 degrees from the second, and still unique
        ((0, 120, 240), (1 / 3, 1 / 3, 1 / 3), True),
        ((0, 120, 240), (0.8, 0.1, 0.1), True),
        ((0, 120, 240), (0.5, 0.5, 0.0), False),  # an expert of weight 0 is not there
        ((0, 90, 180, 270), (0.25, 0.25, 0.25, 0.25), True),
        ((0, 60, 120), (0.1, 0.1, 0.8), False),
        ((0, 0, 0), (0.2, 0.3, 0.5), False),
    ],
)
def test_balanced_directions_are_flagged(degrees, weights, expected):
    assert is_ambiguous(on_circle(*degrees), weights) == expected


@settings(deadline=None, max_examples=150)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(2, 8), k=st.integers(1, 5))
def test_flags_are_those_of_a_linear_program(seed, n, k):
    # Maximise t with <m, u_i> >= t and |m_k| <= 1: positive exactly when an open hemisphere holds all vectors.
    rng = np.random.default_rng(seed)
    units = sphere.normalise(rng.standard_normal((n, k)))
    actual = linprog(
        np.append(np.zeros(k), -1.0),
        A_ub=np.column_stack([-units, np.ones(n)]),
        b_ub=np.zeros(n),
        bounds=[(-1, 1)] * k + [(0, None)],
    )
    margin = -actual.fun
    assume(margin < 1e-9 or margin > 0.01)
    assert is_ambiguous(units, rng.dirichlet(np.ones(n))) == (margin < 1e-9)


def test_independent_directions_are_never_flagged():
    rng = np.random.default_rng(1)
    units = sphere.normalise(rng.standard_normal((200, 12, 64)))
    assert not is_ambiguous(units, rng.dirichlet(np.full(12, 0.3), 200)).any()


@pytest.mark.parametrize(
    ("heights", "azimuths", "weights"),
    [
        # Steps without the upper end of the clamp stop at another stationary point, or at none.
        ((0.04, 0.01, 0.01), (4.6, 2.0, 0.0), (20, 20, 5)),
        ((0.00, 0.26, 0.05, 0.04, 0.04), (3.9, 3.9, 1.4, 4.7, 6.0), (40, 1, 40, 5, 40)),
        ((0.05, 0.01, 0.03, 0.01, 0.19, 0.07), (0.2, 3.3, 0.8, 3.1, 3.7, 5.7), (1, 20, 40, 90, 5, 40)),
        # The same where a curvature near or below zero allows steps of any length.
        ((0.10, 0.01, 0.04, 0.04), (3.3, 6.0, 0.8, 3.1), (24, 7, 10, 3)),
        ((0.04, 0.10, 0.01, 0.01), (5.5, 2.4, 5.9, 2.7), (18, 31, 20, 29)),
        ((0.04, 0.02, 0.01, 0.07), (0.1, 0.7, 3.0, 4.0), (37, 25, 23, 23)),
    ],
)
def test_steps_are_short_enough_to_stay_with_the_mean(heights, azimuths, weights):
    """Vectors little above an equator in R^3, where the objective has other stationary points close by."""
    h, a, w = np.asarray(heights), np.asarray(azimuths), np.asarray(weights) / np.sum(weights)
    units = np.stack([np.cos(h) * np.cos(a), np.cos(h) * np.sin(a), np.sin(h)], axis=-1)
    expected = sphere.normalise(w @ units)
    for _ in range(5000):  # whole gradient steps, which are short enough anywhere (Buss and Fillmore 2001)
        cosines = np.clip(units @ expected, -1, 1)
        angles = np.arccos(cosines)
        tangent = (w * angles / np.sin(angles)) @ (units - cosines[:, None] * expected)
        expected = sphere.normalise(expected + tangent * np.tan(np.linalg.norm(tangent)) / np.linalg.norm(tangent))
        if np.linalg.norm(tangent) < 1e-12:
            break
    result = karcher_mean(units, w)
    assert result.converged
    np.testing.assert_allclose(result.coeffs @ units, expected, rtol=0, atol=1e-9)
