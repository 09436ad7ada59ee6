"""The k-th largest key from counts, against a full sort."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from hf_frmerge.kernels.elementwise import count_keys, magnitude_keys, value_of
from hf_frmerge.methods.sparse.search import Search, n_kept

floats = st.floats(width=32, allow_nan=False, allow_infinity=False)


def threshold(deltas: NDArray[np.float64], rank: int, cuts: int = 3) -> float:
    """The `rank`-th largest magnitude, counted in several parts."""
    parts = np.array_split(deltas, cuts)
    [counts] = sum(count_keys(part[None], "magnitudes", None) for part in parts)
    search = Search.begin(counts, rank)
    [[low]] = sum(count_keys(part[None], "magnitudes", np.array([[search.bin]])) for part in parts)
    return value_of(search.end(low))


@given(st.lists(floats, min_size=1, max_size=60), st.data())
def test_a_threshold_is_the_one_a_sort_finds(values: list[float], data: st.DataObject) -> None:
    deltas = np.array(values)
    rank = data.draw(st.integers(1, len(values)))
    assert threshold(deltas, rank) == np.sort(np.abs(deltas))[-rank]


@given(st.lists(floats, min_size=2, max_size=60))
def test_keys_sort_like_magnitudes(values: list[float]) -> None:
    keys, sizes = magnitude_keys(np.array(values, np.float32)), np.abs(np.array(values, np.float32))
    np.testing.assert_array_equal(sizes[np.argsort(keys, kind="stable")], np.sort(sizes))
    assert [value_of(int(key)) for key in keys] == sizes.tolist()


def test_a_rank_that_no_key_has_is_an_error() -> None:
    [counts] = count_keys(np.ones((1, 3)), "magnitudes", None)
    with pytest.raises(ValueError, match="There are 3 keys, so there is no 4-th largest"):
        Search.begin(counts, 4)


@pytest.mark.parametrize(("n", "density", "kept"), [(10, 0.25, 2), (10, 1.0, 10), (10, 0.01, 1), (3, 0.99, 2)])
def test_how_many_are_kept(n: int, density: float, kept: int) -> None:
    assert n_kept(n, density) == kept
