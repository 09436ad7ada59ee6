"""TIES against a naive float64 version, and its thresholds against a full sort."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from hf_frmerge.methods.sparse import Search, count_high, count_low, magnitude_keys, n_kept, ties


def naive_ties(deltas: NDArray[np.float64], density: float, weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Trim, elect, merge as section 3 of the paper has it, one element after the other."""
    kept = max(1, int(density * deltas.shape[1]))
    trimmed = deltas.copy()
    for row in trimmed:
        row[np.abs(row) < np.sort(np.abs(row))[-kept]] = 0.0
    merged = np.zeros(deltas.shape[1])
    for j, column in enumerate(trimmed.T):
        sign = 1.0 if sum(w * x for w, x in zip(weights, column)) >= 0 else -1.0
        same = [(w, x) for w, x in zip(weights, column) if x * sign > 0]
        merged[j] = sum(w * x for w, x in same) / sum(w for w, _ in same) if any(w for w, _ in same) else 0.0
    return merged


def threshold(keys: NDArray[np.uint32], rank: int, cuts: int = 3) -> int:
    """The `rank`-th largest key, with the keys in several parts."""
    parts = np.array_split(keys, cuts)
    search = Search.begin(sum(count_high(part) for part in parts), rank)
    return search.end(sum(count_low(part, search) for part in parts))


floats = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(st.lists(floats, min_size=1, max_size=60), st.data())
def test_a_threshold_is_the_one_a_sort_finds(values: list[float], data: st.DataObject) -> None:
    deltas = np.array(values, dtype=np.float32)
    rank = data.draw(st.integers(1, len(values)))
    expected = np.sort(np.abs(deltas))[-rank]
    found = np.array([threshold(magnitude_keys(deltas), rank)], dtype=np.uint32).view(np.float32)[0]
    assert found == expected


def test_a_rank_that_no_key_has_is_an_error() -> None:
    counts = count_high(magnitude_keys(np.ones(3)))
    with pytest.raises(ValueError, match="There are 3 keys, so there is no 4-th largest"):
        Search.begin(counts, 4)


@pytest.mark.parametrize(("n", "density", "kept"), [(10, 0.25, 2), (10, 1.0, 10), (10, 0.01, 1), (3, 0.99, 2)])
def test_how_many_are_kept(n: int, density: float, kept: int) -> None:
    assert n_kept(n, density) == kept


@pytest.mark.parametrize("density", [0.05, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("n_experts", [2, 3, 5])
def test_ties_is_the_naive_version(n_experts: int, density: float) -> None:
    rng = np.random.default_rng(n_experts)
    # float32 values, as differences of stored weights are compared; a tenth of them zero, and some alike.
    deltas = rng.standard_normal((n_experts, 400)).astype(np.float32).astype(np.float64)
    deltas[rng.random(deltas.shape) < 0.1] = 0.0
    deltas[:, :20] = np.round(deltas[:, :20])
    weights = rng.dirichlet(np.ones(n_experts))
    thresholds = np.array([threshold(magnitude_keys(row), n_kept(400, density)) for row in deltas], dtype=np.uint32)
    merged = ties(deltas, thresholds, weights)
    np.testing.assert_allclose(merged, naive_ties(deltas, density, weights), rtol=1e-15, atol=0)
    cut = np.concatenate([ties(deltas[:, a:b], thresholds, weights) for a, b in ((0, 7), (7, 250), (250, 400))])
    assert cut.tobytes() == merged.tobytes()


def test_one_expert_keeps_its_largest_and_no_vote_is_zero() -> None:
    deltas = np.array([[3.0, -1.0, 0.5, 0.0], [-3.0, 0.25, 0.0, 0.0]])
    thresholds = np.array([threshold(magnitude_keys(row), 2) for row in deltas], dtype=np.uint32)
    # 3 and -3 cancel out: the positive one is elected. -1 is alone, as is 0.25, but -1 has the larger vote.
    np.testing.assert_array_equal(ties(deltas, thresholds, np.array([0.5, 0.5])), [3.0, -1.0, 0.0, 0.0])
    np.testing.assert_array_equal(ties(deltas, thresholds, np.array([0.0, 1.0])), [-3.0, 0.25, 0.0, 0.0])
