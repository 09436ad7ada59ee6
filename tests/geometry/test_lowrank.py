from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_frmerge.geometry.core_space import core_space
from hf_frmerge.geometry.gram import difference_gram, embed, embed_differences
from hf_frmerge.geometry.karcher import karcher_mean
from hf_frmerge.geometry.lowrank import Factors, base_gram, concatenate, factor_gram, kept_rank, recompress
from hf_frmerge.geometry.sphere import normalise


def random_factors(seed: int, m: int = 24, n: int = 17, ranks: tuple[int, ...] = (4, 1, 7)) -> list[Factors]:
    rng = np.random.default_rng(seed)
    return [
        Factors(rng.standard_normal((m, r)), rng.standard_normal((r, n)), scale=float(rng.uniform(0.1, 3)))
        for r in ranks
    ]


def dense(pair: Factors) -> np.ndarray:
    return pair.scale * (pair.B.astype(np.float64) @ pair.A.astype(np.float64))


def dense_gram(factors: list[Factors]) -> np.ndarray:
    rows = np.stack([dense(pair).ravel() for pair in factors])
    return rows @ rows.T


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1),
    m=st.integers(1, 20),
    n=st.integers(1, 20),
    ranks=st.lists(st.integers(0, 9), min_size=1, max_size=5),
)
def test_gram_from_factors_is_the_dense_one(seed, m, n, ranks):
    factors = random_factors(seed, m, n, tuple(ranks))
    expected = dense_gram(factors)
    # The terms of a product may cancel, so rounding is measured by the factors and not by what is left.
    size = max(pair.scale * np.linalg.norm(pair.B) * np.linalg.norm(pair.A) for pair in factors)
    np.testing.assert_allclose(factor_gram(factors, np.matmul), expected, rtol=0, atol=1e-13 * size**2)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_narrow_factors_are_widened_before_they_are_multiplied(dtype):
    # In float16 these products overflow.
    factors = [Factors((100 * p.B).astype(dtype), (100 * p.A).astype(dtype), 1e4) for p in random_factors(1)]
    np.testing.assert_allclose(factor_gram(factors, np.matmul), dense_gram(factors), rtol=1e-12)


def test_a_different_split_of_the_same_product_changes_nothing():
    # B G and G^-1 A are the same matrix: the gauge of a low-rank factorisation must not be seen.
    factors = random_factors(2)
    gauge = np.random.default_rng(3).standard_normal((4, 4)) + 3 * np.eye(4)
    turned = [Factors(factors[0].B @ gauge, np.linalg.inv(gauge) @ factors[0].A, factors[0].scale), *factors[1:]]
    np.testing.assert_allclose(factor_gram(turned, np.matmul), factor_gram(factors, np.matmul), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("chunk", [1, 5, 24])
def test_base_gram_is_the_dense_difference_gram(chunk):
    factors = random_factors(4)
    base = np.random.default_rng(5).standard_normal((24, 17)).astype(np.float32)
    rows = (base[start : start + chunk] for start in range(0, 24, chunk))
    gram = base_gram(rows, factors, np.matmul)
    wide = base.astype(np.float64)
    expected = difference_gram([wide, *(wide + dense(pair) for pair in factors)])
    np.testing.assert_allclose(gram, expected, rtol=1e-12, atol=1e-11)


def test_base_rows_must_be_all_there_and_no_more():
    factors, base = random_factors(6), np.ones((24, 17))
    with pytest.raises(ValueError, match="must be 24 in all, got 23"):
        base_gram([base[:23]], factors, np.matmul)
    with pytest.raises(ValueError, match="24 x 17 in all"):
        base_gram([base, base[:1]], factors, np.matmul)
    with pytest.raises(ValueError, match="24 x 17 in all"):
        base_gram([base.T], factors, np.matmul)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**32 - 1), ranks=st.lists(st.integers(0, 9), min_size=1, max_size=5))
def test_concatenated_factors_are_the_weighted_sum(seed, ranks):
    factors = random_factors(seed, ranks=tuple(ranks))
    coefficients = np.random.default_rng(seed).standard_normal(len(ranks))
    pair = concatenate(factors, coefficients)
    assert pair.B.shape == (24, sum(ranks))
    expected = sum(c * dense(p) for c, p in zip(coefficients, factors))
    np.testing.assert_allclose(dense(pair), expected, rtol=0, atol=1e-12)


def test_karcher_mean_of_factors_is_that_of_dense_deltas():
    factors = random_factors(7)
    weights = np.array([0.5, 0.2, 0.3])
    coeffs = karcher_mean(normalise(embed(factor_gram(factors, np.matmul))), weights).coeffs
    rows = np.stack([dense(pair).ravel() for pair in factors])
    expected = karcher_mean(normalise(rows), weights).coeffs
    np.testing.assert_allclose(coeffs, expected, rtol=1e-12)


def test_weight_space_mean_from_base_and_factors_is_that_of_dense_weights():
    factors = random_factors(8)
    base = 10 * np.random.default_rng(9).standard_normal((24, 17))
    points = embed_differences(base_gram([base], factors, np.matmul))[1:]
    weights = np.array([0.5, 0.2, 0.3])
    rows = np.stack([(base + dense(pair)).ravel() for pair in factors])
    expected = karcher_mean(normalise(rows), weights).coeffs
    np.testing.assert_allclose(karcher_mean(normalise(points), weights).coeffs, expected, rtol=1e-11)


@pytest.mark.parametrize("rank", [1, 3, 8, 11, 12, 40])
def test_recompression_is_the_truncated_svd_of_the_dense_matrix(rank):
    pair = concatenate(random_factors(10), np.array([0.4, -1.0, 2.0]))
    pair = pair._replace(scale=0.7)
    smaller, error = recompress(pair, rank=rank)
    u, s, vt = np.linalg.svd(dense(pair), full_matrices=False)
    keep = min(rank, 12)
    assert smaller.B.shape == (24, keep)
    assert smaller.A.shape == (keep, 17)
    np.testing.assert_allclose(dense(smaller), (u[:, :keep] * s[:keep]) @ vt[:keep], rtol=0, atol=1e-12)
    assert error == pytest.approx(np.sqrt(np.sum(s[keep:] ** 2) / np.sum(s**2)), abs=1e-13)
    lost = np.linalg.norm(dense(pair) - dense(smaller)) / np.linalg.norm(dense(pair))
    assert error == pytest.approx(lost, abs=1e-13)


def test_recompressed_factors_share_the_singular_values_evenly():
    smaller, _ = recompress(concatenate(random_factors(11), np.ones(3)))
    s = np.linalg.svd(dense(smaller), compute_uv=False)[:12]
    np.testing.assert_allclose(smaller.B.T @ smaller.B, np.diag(s), rtol=0, atol=1e-11)
    np.testing.assert_allclose(smaller.A @ smaller.A.T, np.diag(s), rtol=0, atol=1e-11)


def test_energy_keeps_just_enough():
    pair = Factors(np.diag([4.0, 2.0, 1.0, 0.5]), np.eye(4))  # squares 16, 4, 1, 0.25 of 21.25
    for energy, rank in [(0.5, 1), (0.76, 2), (0.95, 3), (0.99, 4), (1.0, 4)]:
        smaller, error = recompress(pair, energy=energy)
        assert smaller.B.shape[1] == kept_rank(pair, energy=energy) == rank, energy
        assert 1 - error**2 >= energy - 1e-15
    for rank, energy, kept in [(2, 0.99, 2), (3, 0.5, 1), (9, None, 4)]:
        assert recompress(pair, rank, energy)[0].B.shape[1] == kept_rank(pair, rank, energy) == kept


@pytest.mark.parametrize("energy", [0.1, 0.5, 0.9, 0.999, 1.0])
def test_the_rank_of_an_energy_is_counted_on_the_dense_matrix(energy):
    pair = concatenate(random_factors(14), np.array([0.4, -1.0, 2.0]))._replace(scale=0.7)
    squares = np.linalg.svd(dense(pair), compute_uv=False)[:12] ** 2
    expected = 1 + int(np.sum(np.cumsum(squares) < energy * squares.sum())) if energy < 1 else 12
    assert kept_rank(pair, energy=energy) == expected


def test_a_zero_delta_recompresses_to_zero():
    pair = Factors(np.zeros((5, 3)), np.ones((3, 4)))
    smaller, error = recompress(pair, energy=0.9)
    assert smaller.B.shape == (5, kept_rank(pair, energy=0.9)) == (5, 1)
    assert not dense(smaller).any()
    assert error == 0.0


@pytest.mark.parametrize("arguments", [{"rank": 0}, {"energy": 0.0}, {"energy": 1.1}])
def test_senseless_ranks_and_energies_are_refused(arguments):
    for function in (recompress, kept_rank):
        with pytest.raises(ValueError, match="must be"):
            function(random_factors(12)[0], **arguments)


def test_factors_that_do_not_fit_are_refused():
    good = random_factors(13)
    with pytest.raises(ValueError, match="at least one"):
        factor_gram([], np.matmul)
    with pytest.raises(ValueError, match=r"\(24, r\) and \(r, 17\)"):
        factor_gram([*good, Factors(np.ones((24, 2)), np.ones((2, 18)))], np.matmul)
    with pytest.raises(ValueError, match=r"\(24, r\) and \(r, 17\)"):
        factor_gram([*good, Factors(np.ones((24, 2)), np.ones((3, 17)))], np.matmul)


@pytest.mark.parametrize("ranks", [(4, 1, 7), (3, 0, 2), (12, 12, 12)])
def test_core_space_loses_nothing(ranks):
    factors = random_factors(14, ranks=ranks)
    space = core_space(factors)
    np.testing.assert_allclose(space.U_B.T @ space.U_B, np.eye(space.U_B.shape[1]), rtol=0, atol=1e-13)
    np.testing.assert_allclose(space.V_A.T @ space.V_A, np.eye(space.V_A.shape[1]), rtol=0, atol=1e-13)
    for core, pair in zip(space.cores, factors):
        np.testing.assert_allclose(dense(space.factors(core)), dense(pair), rtol=0, atol=1e-12)
    flat = space.cores.reshape(len(factors), -1)
    np.testing.assert_allclose(flat @ flat.T, dense_gram(factors), rtol=1e-12, atol=1e-11)
