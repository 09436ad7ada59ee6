from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_frmerge.errors import ArgumentError
from hf_frmerge.geometry.gram import difference_gram, embed, embed_differences
from hf_frmerge.methods.span import SpanOptions, SpanResult
from hf_frmerge.methods.table import METHODS

SPAN_METHODS = {method.name: method.solver() for method in METHODS.values() if method.kind == "span"}

PAIRS = ["slerp", "nuslerp"]  # methods for exactly two experts
MANY = sorted({*SPAN_METHODS} - {*PAIRS})
DIRECTIONAL = ["karcher", "slerp", "nre", "multislerp"]
NORM_KEEPING = ["karcher", "nre", "multislerp"]
AFFINE = ["linear", "geometric_median"]  # coefficients sum to 1
problems = st.tuples(st.integers(0, 2**32 - 1), st.integers(2, 6), st.floats(1e-4, 1.5))


def solve(method: str, vectors: np.ndarray, weights: object, **options: object) -> SpanResult:
    """Merge the rows of `vectors` by the whole path: difference Gram, coordinates, coefficients."""
    points = embed_differences(difference_gram(list(vectors)))
    return SPAN_METHODS[method](points, weights, SpanOptions(**options))


def merge(method: str, vectors: np.ndarray, weights: object, **options: object) -> np.ndarray:
    return solve(method, vectors, weights, **options).coefficients @ vectors


def cone(seed: int, n: int, spread: float, size: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """Vectors of unequal norms, pairwise about `spread` radians apart, and weights between 1 and 10 to one."""
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.standard_normal((size, n + 1)))[0].T
    tilt = np.arccos(np.sqrt(np.cos(spread)))
    around = basis[1:] + 0.2 * rng.standard_normal((n, n)) @ basis[1:]
    around /= np.linalg.norm(around, axis=-1, keepdims=True)
    weights = rng.uniform(1, 10, n)
    norms = rng.uniform(0.5, 3, (n, 1))
    return norms * (np.cos(tilt) * basis[0] + np.sin(tilt) * around), weights / weights.sum()


def naive_karcher(vectors: np.ndarray, weights: np.ndarray, steps: int = 600) -> np.ndarray:
    """
    Coefficients of the mean by the published iteration over full vectors, in float64, with unit steps.

    Log map, exp map and the bookkeeping of coefficients are written out; nothing is shared with the package.
    """
    lengths = np.sqrt(np.sum(vectors**2, axis=1))
    units = vectors / lengths[:, None]
    mean, coeffs = weights @ units, weights.copy()
    coeffs, mean = coeffs / np.linalg.norm(mean), mean / np.linalg.norm(mean)
    for _ in range(steps):
        cosines = units @ mean
        angles = 2 * np.arcsin(np.minimum(np.sqrt(np.sum((units - mean) ** 2, axis=1)) / 2, 1.0))
        factors = np.array([a / np.sin(a) if a > 1e-9 else 1.0 for a in angles])
        pulls = weights * factors
        tangent = np.sum(pulls[:, None] * (units - cosines[:, None] * mean), axis=0)
        length = np.linalg.norm(tangent)
        across = np.sin(length) / length if length > 1e-12 else 1.0
        mean = np.cos(length) * mean + across * tangent
        coeffs = np.cos(length) * coeffs + across * (pulls - (pulls @ cosines) * coeffs)
        coeffs, mean = coeffs / np.linalg.norm(mean), mean / np.linalg.norm(mean)
    return coeffs * (weights @ lengths) / lengths


# --- the Karcher mean against a full-space reference


@pytest.mark.parametrize("n", [2, 3, 5, 8])
@pytest.mark.parametrize("spread", [1e-4, 1e-3, 1e-2, 0.1, 0.5, 1.0, 1.5])
def test_karcher_is_the_naive_iteration_over_full_vectors(n, spread):
    vectors, weights = cone(n, n, spread)
    result = solve("karcher", vectors, weights)
    assert result.converged
    np.testing.assert_allclose(result.coefficients, naive_karcher(vectors, weights), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("spread", [0.4, 1.2])
def test_narrow_inputs_give_the_float64_result_rounded_once(dtype, spread):
    vectors, weights = cone(11, 4, spread)
    stored = torch.from_numpy(vectors).to(dtype)
    arrays = list((stored.float() if dtype == torch.bfloat16 else stored).numpy())  # numpy has no bfloat16
    points = embed_differences(difference_gram(arrays))
    coefficients = SPAN_METHODS["karcher"](points, weights, SpanOptions()).coefficients
    wide = stored.double().numpy()
    expected = naive_karcher(wide, weights)
    np.testing.assert_allclose(coefficients, expected, rtol=1e-12)
    ours, theirs = (torch.from_numpy(c @ wide).to(dtype) for c in (coefficients, expected))
    assert torch.equal(ours, theirs)


def test_karcher_of_deltas_and_of_weights_are_different_means():
    base = 5 * np.random.default_rng(0).standard_normal(200)
    deltas, weights = cone(12, 3, 1.4)
    in_weights = merge("karcher", base + deltas, weights)
    in_deltas = base + merge("karcher", deltas, weights)
    np.testing.assert_allclose(in_weights, naive_karcher(base + deltas, weights) @ (base + deltas), rtol=1e-11)
    assert np.linalg.norm(in_deltas - in_weights) > 0.1 * np.linalg.norm(deltas)


def test_without_the_angle_factor_the_mean_would_be_elsewhere():
    # Orthonormal, weights .75 and .25: the normalised mean is at 18.4 degrees, the Karcher mean at 22.5.
    karcher, nre = merge("karcher", np.eye(2), [0.75, 0.25]), merge("nre", np.eye(2), [0.75, 0.25])
    assert np.degrees(np.arctan2(*karcher[::-1])) == pytest.approx(22.5, abs=1e-12)
    assert np.degrees(np.arctan2(*nre[::-1])) == pytest.approx(np.degrees(np.arctan2(1, 3)), abs=1e-12)


# --- invariants


@settings(deadline=None, max_examples=40)
@given(problem=problems)
@pytest.mark.parametrize("method", NORM_KEEPING)
def test_norm_is_the_weighted_mean_of_norms(method, problem):
    vectors, weights = cone(*problem)
    norms = np.linalg.norm(vectors, axis=1)
    assert np.linalg.norm(merge(method, vectors, weights)) == pytest.approx(weights @ norms, rel=1e-11)


@settings(deadline=None, max_examples=30)
@given(problem=problems)
@pytest.mark.parametrize("method", MANY)
def test_order_of_experts_does_not_matter(method, problem):
    vectors, weights = cone(*problem)
    order = np.random.default_rng(problem[0]).permutation(len(weights))
    there = solve(method, vectors, weights).coefficients
    back = solve(method, vectors[order], weights[order]).coefficients
    np.testing.assert_allclose(back, there[order], rtol=1e-8, atol=1e-9)


@settings(deadline=None, max_examples=30)
@given(problem=problems)
@pytest.mark.parametrize("method", list(SPAN_METHODS))
def test_merging_turns_and_scales_with_its_inputs(method, problem):
    seed, n, spread = problem
    vectors, weights = cone(seed, 2 if method in PAIRS else n, spread, size=20)
    rotation = np.linalg.qr(np.random.default_rng(seed).standard_normal((20, 20)))[0]
    merged = merge(method, vectors, weights)
    np.testing.assert_allclose(merge(method, 8.0 * vectors @ rotation, weights), 8.0 * merged @ rotation, atol=1e-10)


@settings(deadline=None, max_examples=30)
@given(problem=problems, factor=st.floats(0.1, 10))
def test_scaling_one_expert_moves_only_the_norm_of_the_karcher_mean(problem, factor):
    vectors, weights = cone(*problem)
    scaled = vectors.copy()
    scaled[0] *= factor
    before, after = merge("karcher", vectors, weights), merge("karcher", scaled, weights)
    np.testing.assert_allclose(after / np.linalg.norm(after), before / np.linalg.norm(before), atol=1e-10)
    assert np.linalg.norm(after) == pytest.approx(weights @ np.linalg.norm(scaled, axis=1), rel=1e-10)


@pytest.mark.parametrize("method", list(SPAN_METHODS))
def test_results_are_the_same_bits_every_time_and_the_same_in_any_batch(method):
    n = 2 if method in PAIRS else 9
    vectors = [cone(seed, n, spread)[0] for seed, spread in enumerate([1e-4, 0.1, 1.0, 1.5])]
    weights = cone(0, n, 1.0)[1]
    grams = np.stack([difference_gram(list(v)) for v in vectors])
    together = SPAN_METHODS[method](embed_differences(grams), weights, SpanOptions())
    for i, gram in enumerate(grams):
        alone = SPAN_METHODS[method](embed_differences(gram), weights, SpanOptions())
        assert np.array_equal(alone.coefficients, together.coefficients[i])
        assert np.array_equal(alone.residual, together.residual[i])
    again = SPAN_METHODS[method](embed_differences(grams), weights, SpanOptions())
    assert np.array_equal(again.coefficients, together.coefficients)
    assert np.array_equal(again.residual, together.residual)


@pytest.mark.parametrize("method, n", [*((pair, 2) for pair in PAIRS), *itertools.product(MANY, [2, 3, 8, 17])])
def test_a_block_has_the_same_bits_alone_in_any_batch_and_in_any_order(method, n):
    rng = np.random.default_rng(n)
    # Narrow and wide ones, so that they leave the iteration at different steps; more than one slab of them.
    vectors = rng.standard_normal((700, 1, 24)) + 10.0 ** rng.uniform(-3, 0.3, (700, 1, 1)) * rng.standard_normal(
        (700, n, 24)
    )
    vectors[:, 1:] -= vectors[:, :1]
    grams = vectors @ vectors.swapaxes(-1, -2)
    weights = rng.dirichlet(np.ones(n), 700)
    options = SpanOptions(beta=0.3, on_ambiguous="linear")

    def solve_some(which):
        actual = SPAN_METHODS[method](embed_differences(grams[which]), weights[which], options)
        return np.concatenate([actual.coefficients, actual.residual[:, None], actual.n_iter[:, None]], axis=1)

    together = solve_some(np.arange(700))
    shuffled = rng.permutation(700)
    assert np.array_equal(solve_some(shuffled), together[shuffled])
    for size in (1, 2, 3, 5, 8, 31):
        which = rng.choice(700, size, replace=False)
        assert np.array_equal(solve_some(which), together[which]), size


@pytest.mark.parametrize("method", list(SPAN_METHODS))
def test_weights_may_differ_from_block_to_block(method):
    n = 2 if method in PAIRS else 3
    points = np.stack([embed_differences(difference_gram(list(cone(s, n, 1.0)[0]))) for s in range(6)])
    weights = np.random.default_rng(0).dirichlet(np.ones(n), 6)
    together = SPAN_METHODS[method](points.reshape(2, 3, n, n), weights.reshape(2, 3, n), SpanOptions())
    assert together.coefficients.shape == (2, 3, n)
    assert together.ambiguous.shape == together.converged.shape == together.n_iter.shape == (2, 3)
    for i in range(6):
        alone = SPAN_METHODS[method](points[i], weights[i], SpanOptions())
        assert np.array_equal(together.coefficients.reshape(6, n)[i], alone.coefficients)


@pytest.mark.parametrize("method", ["linear", *NORM_KEEPING])
def test_points_may_have_fewer_or_more_coordinates_than_there_are_experts(method):
    # Rows of `embed_differences` without the base, and raw vectors in the plane.
    base = np.ones(200)
    vectors, weights = cone(3, 4, 1.0)
    with_base = embed_differences(difference_gram([base, *vectors]))[1:]
    actual = SPAN_METHODS[method](with_base, weights, SpanOptions()).coefficients
    np.testing.assert_allclose(actual, solve(method, vectors, weights).coefficients, rtol=1e-10)
    flat = np.array([[1.0, 0.0], [1.0, 1.0], [0.0, 2.0]])
    actual = SPAN_METHODS[method](flat, [0.2, 0.5, 0.3], SpanOptions()).coefficients
    np.testing.assert_allclose(actual, solve(method, flat, [0.2, 0.5, 0.3]).coefficients, rtol=1e-10)


# --- exact answers


@pytest.mark.parametrize("norm", ["mean", "median", "max"])
@pytest.mark.parametrize("beta", [-1.0, 0.0, 0.5])
@pytest.mark.parametrize("method", [*AFFINE, *DIRECTIONAL, "nuslerp", "model_stock"])
def test_one_expert_of_weight_one_is_returned_exactly(method, beta, norm):
    n = 2 if method in PAIRS else 4
    vectors, _ = cone(4, n, 1.2)
    for i in range(n):
        one_hot = np.eye(n)[i]
        result = solve(method, vectors, one_hot, beta=beta, norm=norm)
        assert np.array_equal(result.coefficients, one_hot)
        assert result.converged and not result.ambiguous
        sides = np.where(one_hot == 1.0, 1.0, -1.0)  # all others opposite: no obstacle, they have no weight
        against = solve(method, sides[:, None] * vectors[i], one_hot, beta=beta, norm=norm)
        assert np.array_equal(against.coefficients, one_hot)


@pytest.mark.parametrize("method", [*AFFINE, *DIRECTIONAL, "nuslerp", "model_stock"])
@pytest.mark.parametrize("fill", [0.0, 1.0])
def test_equal_experts_and_zero_blocks_return_the_weights_exactly(method, fill):
    n = 2 if method in PAIRS else 3
    weights = np.array([0.3, 0.7]) if n == 2 else np.array([0.1, 0.2, 0.7])
    block = fill * cone(5, 2, 1.0)[0][0]
    for options in ({}, {"norm": "max", "beta": -1.0}, {"norm": "median"}):
        result = solve(method, np.stack([block] * n), weights, **options)
        assert np.array_equal(result.coefficients, weights)
        assert result.residual == 0 and result.n_iter == 0 and result.converged and not result.ambiguous


@pytest.mark.parametrize("method", DIRECTIONAL)
def test_a_zero_expert_has_no_direction_but_keeps_its_weight_in_the_norm(method):
    vectors, _ = cone(6, 3, 1.0)
    if method == "slerp":
        result = solve(method, np.stack([vectors[0], 0 * vectors[0]]), [0.4, 0.6])
        np.testing.assert_allclose(result.coefficients, [0.4, 0.0], rtol=1e-14)
        return
    weights = np.array([0.3, 0.5, 0.2])
    result = solve(method, vectors * np.array([[1], [0], [1]]), weights)
    alone = solve(method, vectors[[0, 2]], [0.6, 0.4])  # the others, weights made to sum to 1
    assert result.coefficients[1] == 0.0
    np.testing.assert_allclose(result.coefficients[[0, 2]], 0.5 * alone.coefficients, rtol=1e-12)


@pytest.mark.parametrize("method", NORM_KEEPING)
def test_an_expert_of_weight_zero_changes_nothing(method):
    vectors, weights = cone(7, 3, 1.0)
    opposite = np.concatenate([vectors, -100 * vectors[:1]])  # would be ambiguous, and the largest norm by far
    for norm in ("mean", "median", "max"):
        result = solve(method, opposite, np.append(weights, 0.0), norm=norm)
        assert result.coefficients[3] == 0.0
        expected = solve(method, vectors, weights, norm=norm).coefficients
        np.testing.assert_allclose(result.coefficients[:3], expected, rtol=1e-10)


# --- closed forms


@pytest.mark.parametrize("angle", [1e-4, 0.3, 1.0, 2.0, 3.0])
@pytest.mark.parametrize("t", [0.1, 0.5, 0.8])
@pytest.mark.parametrize("method", ["slerp", "karcher"])
def test_two_experts_are_merged_along_the_arc(method, t, angle):
    vectors = np.array([[2.0, 0.0, 0.0], [3 * np.cos(angle), 0.0, 3 * np.sin(angle)]])
    expected = ((1 - t) * 2 + t * 3) * np.array([np.cos(t * angle), 0.0, np.sin(t * angle)])
    np.testing.assert_allclose(merge(method, vectors, [1 - t, t]), expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("method", PAIRS)
def test_slerp_wants_two(method):
    with pytest.raises(ArgumentError, match=r'exactly 2 experts, got 3\. Use "karcher"'):
        solve(method, np.eye(3), [0.2, 0.3, 0.5])


@pytest.mark.parametrize("angle", [0.0, 1e-4, 0.3, 1.0, 2.0, 3.0])
@pytest.mark.parametrize("t", [0.1, 0.5, 0.8])
def test_nuslerp_interpolates_the_vectors_and_not_their_directions(t, angle):
    vectors = np.array([[2.0, 0.0, 0.0], [3 * np.cos(angle), 0.0, 3 * np.sin(angle)]])
    whole = np.sin(angle)
    factors = (np.sin((1 - t) * angle) / whole, np.sin(t * angle) / whole) if angle else (1 - t, t)
    np.testing.assert_allclose(solve("nuslerp", vectors, [1 - t, t]).coefficients, factors, rtol=1e-11)
    same_norm = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    np.testing.assert_allclose(merge("nuslerp", same_norm, [1 - t, t]), merge("slerp", same_norm, [1 - t, t]))


def test_nuslerp_with_a_zero_expert_is_the_plain_mean():
    result = solve("nuslerp", np.array([[1.0, 2.0], [0.0, 0.0]]), [0.3, 0.7])
    np.testing.assert_allclose(result.coefficients, [0.3, 0.7], rtol=1e-14)


@settings(deadline=None, max_examples=30)
@given(problem=problems)
def test_multislerp_is_the_mean_of_directions_and_the_start_of_the_karcher_iteration(problem):
    vectors, weights = cone(*problem)
    norms = np.linalg.norm(vectors, axis=1)
    mean = weights @ (vectors / norms[:, None])
    expected = (weights @ norms) * mean / np.linalg.norm(mean)
    np.testing.assert_allclose(merge("multislerp", vectors, weights), expected, rtol=0, atol=1e-11)


# --- Model Stock and the geometric median


@pytest.mark.parametrize("n", [2, 3, 8])
@pytest.mark.parametrize("cosine", [0.0, 0.1, 0.5, 0.99])
def test_model_stock_is_the_ratio_of_the_paper(n, cosine):
    norms = np.linspace(1, 2, n)
    points = norms[:, None] * embed(np.full((n, n), cosine) + (1 - cosine) * np.eye(n))
    expected = cosine / (1 + (n - 1) * cosine)  # the t of the paper, N cos / (1 + (N - 1) cos), over N
    actual = SPAN_METHODS["model_stock"](points, np.full(n, 1 / n), SpanOptions()).coefficients
    np.testing.assert_allclose(actual, np.full(n, expected), rtol=1e-12, atol=1e-14)


def test_model_stock_returns_the_base_where_the_deltas_oppose_each_other():
    result = solve("model_stock", np.array([[1.0, 0.0], [-0.5, 1.0], [-0.5, -1.0]]), [1 / 3] * 3)
    assert np.array_equal(result.coefficients, [0.0, 0.0, 0.0])
    assert result.converged and not result.ambiguous


def test_model_stock_comes_nearest_to_the_common_part_of_noisy_deltas():
    # The definition behind the ratio: common part plus independent noise of one size, and weights that are not equal.
    rng = np.random.default_rng(0)
    weights, size = np.array([0.5, 0.3, 0.2]), 200_000
    common = rng.standard_normal(size)
    deltas = common + 1.5 * rng.standard_normal((3, size))
    mean = weights @ deltas
    best = (mean @ common) / (mean @ mean)
    np.testing.assert_allclose(solve("model_stock", deltas, weights).coefficients, best * weights, rtol=0.01)


def test_an_expert_of_weight_zero_does_not_enter_the_ratio_of_model_stock():
    vectors, weights = cone(7, 3, 1.0)
    actual = solve("model_stock", np.concatenate([vectors, -100 * vectors[:1]]), np.append(weights, 0.0)).coefficients
    np.testing.assert_allclose(actual, [*solve("model_stock", vectors, weights).coefficients, 0.0], rtol=1e-9)


def weiszfeld(vectors: np.ndarray, weights: np.ndarray, steps: int = 20_000) -> np.ndarray:
    """The geometric median by the plain iteration over full vectors."""
    median = weights @ vectors
    for _ in range(steps):
        pull = weights / np.linalg.norm(vectors - median, axis=1)
        moved = pull @ vectors / pull.sum()
        if np.linalg.norm(moved - median) < 1e-15 * np.linalg.norm(median):
            break
        median = moved
    return median


@pytest.mark.parametrize("n", [3, 4, 8])
@pytest.mark.parametrize("spread", [1e-3, 0.1, 1.0])
def test_the_geometric_median_is_that_of_the_plain_iteration_over_full_vectors(n, spread):
    vectors, _ = cone(n, n, spread)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    weights = np.random.default_rng(n).uniform(1, 1.5, n)
    weights /= weights.sum()
    result = solve("geometric_median", vectors, weights)
    assert result.converged and 0 < result.n_iter < 100
    np.testing.assert_allclose(result.coefficients.sum(), 1.0, rtol=1e-14)
    np.testing.assert_allclose(result.coefficients @ vectors, weiszfeld(vectors, weights), rtol=0, atol=1e-9 * spread)


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(2, 9), size=st.integers(1, 4))
def test_no_point_nearby_is_nearer_to_the_experts_than_the_geometric_median(seed, n, size):
    rng = np.random.default_rng(seed)
    points, weights = rng.standard_normal((n, size)), rng.dirichlet(np.ones(n))
    result = SPAN_METHODS["geometric_median"](points, weights, SpanOptions(max_iter=1000))
    median = result.coefficients @ points

    def distance(place: np.ndarray) -> float:
        return float(weights @ np.linalg.norm(points - place, axis=1))

    others = [*points, *(median + 10.0 ** rng.uniform(-6, 0) * rng.standard_normal(size) for _ in range(20))]
    assert distance(median) <= min(map(distance, others)) * (1 + 1e-12)


def test_an_expert_with_half_of_the_weight_is_the_geometric_median():
    vectors, _ = cone(3, 4, 1.0)
    for weights in ([0.51, 0.2, 0.2, 0.09], [0.6, 0.4, 0.0, 0.0]):
        result = solve("geometric_median", vectors, weights)
        assert np.array_equal(result.coefficients, [1.0, 0.0, 0.0, 0.0])
        assert result.converged and result.n_iter == 0
    copies = solve("geometric_median", vectors[[0, 0, 1, 2]], [0.3, 0.3, 0.2, 0.2])  # two copies of one expert
    np.testing.assert_allclose(copies.coefficients, [0.5, 0.5, 0.0, 0.0], rtol=1e-15)


def test_of_two_experts_the_geometric_median_is_the_heavier_or_the_middle():
    vectors = np.array([[1.0, 0.0], [0.0, 3.0]])
    np.testing.assert_allclose(solve("geometric_median", vectors, [0.5, 0.5]).coefficients, [0.5, 0.5], rtol=1e-15)
    np.testing.assert_allclose(solve("geometric_median", vectors, [0.4, 0.6]).coefficients, [0.0, 1.0], rtol=1e-15)


def test_an_outlier_moves_the_mean_but_hardly_the_geometric_median():
    near = np.random.default_rng(0).standard_normal((4, 30))
    moved = [np.concatenate([near, far * np.ones((1, 30))]) for far in (10.0, 1e6)]
    first, second = (merge("geometric_median", vectors, np.full(5, 0.2)) for vectors in moved)
    assert np.linalg.norm(first - second) < 0.2 * np.linalg.norm(near[0])


def test_a_start_that_meets_an_expert_is_left_again():
    # The weighted mean is the third expert, which pulls with less than the others and is not the median.
    vectors = np.array([[0.0, 0.0], [3.0, 0.0], [1.0, 1.0], [0.0, 3.0]])
    weights = np.array([0.3, 0.3, 0.1, 0.3])
    result = solve("geometric_median", vectors, weights)
    assert result.converged
    median = result.coefficients @ vectors
    away = np.linalg.norm(vectors - median, axis=1)
    assert np.linalg.norm((weights / away) @ (vectors - median)) < 1e-10


@pytest.mark.parametrize("n", [2, 3, 16])
def test_orthogonal_deltas_have_closed_forms(n):
    deltas, weights = 3.0 * np.eye(n), np.full(n, 1 / n)
    points = embed(deltas @ deltas.T)
    coefficients = {
        name: method(points, weights, SpanOptions(scale=0.3 if name == "task_arithmetic" else 1.0)).coefficients
        for name, method in SPAN_METHODS.items()
        if name not in PAIRS
    }
    np.testing.assert_allclose(coefficients["linear"], np.full(n, 1 / n), rtol=1e-15)
    assert np.linalg.norm(coefficients["linear"] @ deltas) == pytest.approx(3.0 / np.sqrt(n), rel=1e-14)
    np.testing.assert_allclose(coefficients["nre"], np.full(n, 1 / np.sqrt(n)), rtol=1e-13)
    np.testing.assert_allclose(coefficients["karcher"], np.full(n, 1 / np.sqrt(n)), rtol=1e-13)
    np.testing.assert_allclose(coefficients["multislerp"], np.full(n, 1 / np.sqrt(n)), rtol=1e-13)
    np.testing.assert_allclose(coefficients["geometric_median"], np.full(n, 1 / n), rtol=1e-13)
    assert np.abs(coefficients["model_stock"]).max() < 1e-15  # nothing in common: the base model
    np.testing.assert_allclose(coefficients["task_arithmetic"], np.full(n, 0.3 / n), rtol=1e-15)


@pytest.mark.parametrize("n", [2, 4, 9])
@pytest.mark.parametrize("cosine", [-0.05, 0.3, 0.99])
def test_nre_is_karcher_when_weights_norms_and_angles_are_equal(n, cosine):
    points = 2.0 * embed(np.full((n, n), cosine) + (1 - cosine) * np.eye(n))
    weights = np.full(n, 1 / n)
    nre, karcher = (SPAN_METHODS[m](points, weights, SpanOptions()).coefficients for m in ("nre", "karcher"))
    np.testing.assert_allclose(nre, karcher, rtol=1e-12)


def test_nre_leans_towards_the_longer_expert_and_karcher_does_not():
    vectors = np.array([[5.0, 0.0], [0.0, 1.0]])
    nre, karcher = merge("nre", vectors, [0.5, 0.5]), merge("karcher", vectors, [0.5, 0.5])
    assert np.degrees(np.arctan2(*nre[::-1])) == pytest.approx(np.degrees(np.arctan(0.2)), abs=1e-12)
    assert np.degrees(np.arctan2(*karcher[::-1])) == pytest.approx(45.0, abs=1e-12)


@pytest.mark.parametrize("beta", [-1.0, -0.5, 0.0, 0.7, 1.0])
@pytest.mark.parametrize("method", NORM_KEEPING)
def test_beta_is_the_power_of_the_coherence(method, beta):
    vectors, weights = cone(8, 4, 1.2)
    norms = np.linalg.norm(vectors, axis=1)
    coherence = np.linalg.norm(weights @ (vectors / norms[:, None]))
    expected = coherence**beta * (weights @ norms)
    assert np.linalg.norm(merge(method, vectors, weights, beta=beta)) == pytest.approx(expected, rel=1e-11)


@settings(deadline=None, max_examples=30)
@given(problem=problems)
def test_beta_family_of_nre_holds_the_plain_mean_and_sum(problem):
    # With equal norms: beta 1 is the plain mean; with orthogonal ones, beta -1 is the plain sum.
    vectors, weights = cone(*problem)
    vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    np.testing.assert_allclose(merge("nre", vectors, weights, beta=1.0), weights @ vectors, rtol=0, atol=1e-11)
    n = len(weights)
    np.testing.assert_allclose(merge("nre", np.eye(n), np.full(n, 1 / n), beta=-1.0), np.ones(n), rtol=1e-12)


def test_beta_one_with_a_zero_expert_is_still_the_plain_mean():
    vectors = np.array([[2.0, 0.0], [0.0, 0.0]])
    np.testing.assert_allclose(merge("nre", vectors, [0.5, 0.5], beta=1.0), [1.0, 0.0], rtol=1e-14)


@pytest.mark.parametrize(
    "norm, weights, expected",
    [
        ("max", [0.2, 0.2, 0.6], 9.0),
        ("max", [0.6, 0.4, 0.0], 4.0),
        ("median", [1 / 3, 1 / 3, 1 / 3], 4.0),
        ("median", [0.6, 0.2, 0.2], 1.0),
        ("median", [0.1, 0.2, 0.7], 9.0),
        ("median", [0.5, 0.1, 0.4], 2.5),  # half the weight lies at 1, half above: midway to 4
        ("median", [0.5, 0.0, 0.5], 5.0),  # weight 0 at 4 is not there
        ("mean", [0.5, 0.25, 0.25], 3.75),
    ],
)
@pytest.mark.parametrize("method", NORM_KEEPING)
def test_norm_policies(method, norm, weights, expected):
    vectors = np.diag([1.0, 4.0, 9.0])
    for order in ([0, 1, 2], [2, 0, 1]):
        merged = merge(method, vectors[order], np.array(weights)[order], norm=norm)
        assert np.linalg.norm(merged) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("n", [2, 5, 8])
def test_median_with_equal_weights_is_the_ordinary_one(n):
    norms = np.random.default_rng(n).uniform(1, 5, n)
    merged = merge("nre", np.diag(norms), np.full(n, 1 / n), norm="median")
    assert np.linalg.norm(merged) == pytest.approx(np.median(norms), rel=1e-13)


def test_task_arithmetic_is_a_scaled_sum():
    vectors, weights = cone(9, 3, 1.0)
    merged = merge("task_arithmetic", vectors, weights, scale=0.4)
    np.testing.assert_allclose(merged, 0.4 * np.sum(weights[:, None] * vectors, axis=0), rtol=1e-13)
    np.testing.assert_allclose(solve("task_arithmetic", vectors, [1, 2, -3], scale=0.4).coefficients, [0.4, 0.8, -1.2])


# --- ambiguity


TRIPLE = np.stack([np.cos([0, 2 * np.pi / 3, 4 * np.pi / 3]), np.sin([0, 2 * np.pi / 3, 4 * np.pi / 3])], axis=1)


@pytest.mark.parametrize(
    "method, vectors, weights",
    [
        ("karcher", np.array([[1.0, 2.0], [-1.0, -2.0]]), [0.5, 0.5]),
        ("karcher", np.array([[1.0, 2.0], [-3.0, -6.0]]), [0.9, 0.1]),
        ("karcher", TRIPLE, [1 / 3, 1 / 3, 1 / 3]),
        ("karcher", TRIPLE, [0.7, 0.2, 0.1]),
        ("slerp", np.array([[1.0, 2.0], [-1.0, -2.0]]), [0.5, 0.5]),
        ("slerp", np.array([[1.0, 2.0], [-3.0, -6.0]]), [0.9, 0.1]),
        ("nre", np.array([[1.0, 2.0], [-1.0, -2.0]]), [0.5, 0.5]),
        ("nre", np.array([[1.0, 2.0], [-3.0, -6.0]]), [0.75, 0.25]),
        ("nre", TRIPLE, [1 / 3, 1 / 3, 1 / 3]),
    ],
)
def test_balanced_experts_are_flagged_and_never_answered_with_noise(method, vectors, weights):
    linear = solve(method, vectors, weights, on_ambiguous="linear")
    assert linear.ambiguous
    assert linear.n_iter == 0
    assert np.array_equal(linear.coefficients, weights)
    refused = solve(method, vectors, weights)
    assert refused.ambiguous
    assert np.isnan(refused.coefficients).all()


def test_an_uneven_mean_of_opposites_has_a_direction():
    result = solve("nre", np.array([[1.0, 2.0], [-3.0, -6.0]]), [0.5, 0.5])
    assert not result.ambiguous
    np.testing.assert_allclose(result.coefficients @ [1.0, -3.0], -2.0, rtol=1e-14)  # along the longer, mean norm 2


def test_flagged_blocks_do_not_touch_their_neighbours():
    fine, weights = cone(10, 3, 1.3)
    blocks = [fine, np.pad(TRIPLE, ((0, 0), (0, 198))), np.zeros((3, 200)), np.stack([fine[0]] * 3), fine]
    grams = np.stack([difference_gram(list(block)) for block in blocks])
    result = SPAN_METHODS["karcher"](embed_differences(grams), weights, SpanOptions())
    assert result.ambiguous.tolist() == [False, True, False, False, False]
    assert result.converged.all()
    alone = solve("karcher", fine, weights).coefficients
    assert np.array_equal(result.coefficients[[0, 4]], [alone, alone])
    assert np.array_equal(result.coefficients[[2, 3]], [weights, weights])
    assert np.isfinite(result.residual).all()


@pytest.mark.parametrize("method", NORM_KEEPING)
def test_mildly_opposed_deltas_of_many_experts_are_answered(method):
    n = 16
    weights = np.random.default_rng(0).dirichlet(np.ones(n), 30)
    points = np.broadcast_to(embed(np.full((n, n), -0.05) + 1.05 * np.eye(n)), (30, n, n))
    result = SPAN_METHODS[method](points, weights, SpanOptions())
    assert not result.ambiguous.any()
    assert result.converged.all()
    merged = np.einsum("bn,bnk->bk", result.coefficients, points)
    np.testing.assert_allclose(np.linalg.norm(merged, axis=1), 1.0, rtol=1e-12)


def test_a_mean_that_did_not_converge_says_so():
    vectors, weights = cone(13, 5, 1.4)
    result = solve("karcher", vectors, weights, max_iter=2)
    assert not result.converged
    assert result.n_iter == 2
    assert result.residual > 1e-12
    assert solve("karcher", vectors, weights, max_iter=2, tol=0.1).converged


@pytest.mark.parametrize("method", sorted(SPAN_METHODS))
def test_scale_is_a_factor_of_the_coefficients_of_every_method(method):
    vectors, weights = cone(5, 2, 0.7)
    plain = solve(method, vectors, weights).coefficients
    np.testing.assert_array_equal(solve(method, vectors, weights, scale=2.0).coefficients, 2.0 * plain)
    same = np.stack([vectors[0], vectors[0]])
    np.testing.assert_array_equal(
        solve(method, same, weights, scale=0.5).coefficients, 0.5 * solve(method, same, weights).coefficients
    )
