"""Sums and functions of an angle: right, and the same bits whatever stands beside them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_frmerge.geometry.portable import angle_over_sine, arctan2, cosine_and_sinc, fold, power, sinc

seeds = st.integers(0, 2**32 - 1)


def fold_by_hand(terms: list[float]) -> float:
    while len(terms) > 1:
        half = (len(terms) + 1) // 2
        terms = [a + b for a, b in zip(terms, terms[half:])] + terms[len(terms) - half : half]
    return terms[0] if terms else 0.0


@given(seeds, st.integers(0, 70), st.sampled_from([1, 2, 7, 300]))
def test_sums_depend_neither_on_company_nor_on_layout(seed: int, n: int, n_blocks: int) -> None:
    terms = np.random.default_rng(seed).standard_normal((n, n_blocks))
    actual = fold(terms.copy())
    assert actual.tolist() == [fold_by_hand(terms[:, block].tolist()) for block in range(n_blocks)]
    assert actual.tolist() == fold(np.array(terms, order="F")).tolist()
    np.testing.assert_allclose(actual, [math.fsum(column) for column in terms.T], rtol=0, atol=1e-13)


angles = np.concatenate([[0.0], 10.0 ** np.linspace(-12, 0, 61), np.linspace(0.01, np.pi, 997)])


def test_sines_and_cosines_are_those_of_the_c_library() -> None:
    expected = [math.sin(x) / x if x else 1.0 for x in angles]
    np.testing.assert_allclose(sinc(angles), expected, rtol=5e-16)
    np.testing.assert_allclose(sinc(np.pi - 10.0 ** np.linspace(-8, 0, 61)) > 0, True)
    cosines, sincs = cosine_and_sinc(angles)
    np.testing.assert_allclose(cosines, [math.cos(x) for x in angles], rtol=0, atol=1e-15)
    np.testing.assert_allclose(sincs[:-1], expected[:-1], rtol=0, atol=1e-12)


def test_an_angle_over_its_sine_comes_from_the_cosine() -> None:
    cosines = np.concatenate([np.linspace(-0.999, 1.0, 997), 1.0 - 10.0 ** np.linspace(-16, 0, 61)])
    # From half of the angle, which a cosine near 1 gives without cancellation: sin(x/2)**2 = (1 - cos(x)) / 2.
    halves = [math.asin(math.sqrt((1.0 - c) / 2.0)) if c > 0 else math.acos(c) / 2.0 for c in cosines]
    expected = [h / (math.sin(h) * math.cos(h)) if h else 1.0 for h in halves]
    np.testing.assert_allclose(angle_over_sine(cosines), expected, rtol=1e-14)
    assert angle_over_sine(np.array([1.0, 1.0 + 2.0**-52])).tolist() == [1.0, 1.0]
    assert np.isfinite(angle_over_sine(np.array([-1.0, -1.0 - 2.0**-52]))).all()


@given(seeds)
def test_the_angle_of_a_point_is_that_of_the_c_library(seed: int) -> None:
    y, x = 10.0 ** np.random.default_rng(seed).uniform(-12, 1, (2, 100))
    np.testing.assert_allclose(arctan2(y, x), [math.atan2(b, a) for b, a in zip(y, x)], rtol=1e-15)
    on_axes = arctan2(np.array([0.0, 0.0, 1.0]), np.array([0.0, 1.0, 0.0]))
    np.testing.assert_allclose(on_axes, [0.0, 0.0, np.pi / 2], rtol=1e-15)


@pytest.mark.parametrize("exponent", [0.0, 1.0, -1.0, 2.0, 0.5, -0.5, 0.3, -0.7, 2.5, -2.2, 1e-3, 11.0])
def test_powers_are_those_of_the_c_library(exponent: float) -> None:
    bases = np.linspace(1e-3, 1.0, 301)
    np.testing.assert_allclose(power(bases, exponent), [math.pow(b, exponent) for b in bases], rtol=1e-14)


@pytest.mark.parametrize("function", [sinc, angle_over_sine, cosine_and_sinc, lambda x: arctan2(x, 1.5 - x / 3)])
def test_an_element_has_the_same_bits_alone_and_in_company(function) -> None:
    values = np.random.default_rng(0).uniform(0.0, 1.0, 37)
    together = np.stack(np.broadcast_arrays(*np.atleast_2d(function(values))))
    for i, value in enumerate(values):
        assert np.ravel(function(np.array([value]))).tolist() == together[:, i].tolist()
