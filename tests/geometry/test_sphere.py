from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.spatial import geometric_slerp

from hf_frmerge.geometry import sphere


def random_units(seed: int, *shape: int) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal(shape)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def tangent_at(base: np.ndarray, seed: int, length: float) -> np.ndarray:
    direction = np.random.default_rng(seed).standard_normal(base.shape)
    direction -= (direction @ base) * base
    return length * direction / np.linalg.norm(direction)


@pytest.mark.parametrize("angle", [0.0, 1e-150, 1e-12, 1e-8, 1e-4, 0.1, 1.0, np.pi / 2, 3.0])
def test_distance_is_relatively_exact_from_tiny_to_wide(angle):
    a, b = np.array([1.0, 0.0]), np.array([np.cos(angle), np.sin(angle)])
    assert sphere.distance(a, b) == pytest.approx(angle, rel=4e-16, abs=0)


@pytest.mark.parametrize("short_of_pi", [1e-12, 1e-8, 1e-4])
def test_distance_sees_how_far_from_opposite_two_points_are(short_of_pi):
    # asin(chord / 2) alone is off by 1e-8 here, arccos too.
    a, b = np.array([1.0, 0.0]), np.array([-np.cos(short_of_pi), np.sin(short_of_pi)])
    assert sphere.distance(a, b) == pytest.approx(np.pi - short_of_pi, abs=1e-15)


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 2**32 - 1), size=st.integers(2, 9), length=st.floats(0, 3.1))
def test_log_undoes_exp(seed, size, length):
    base = random_units(seed, size)
    tangent = tangent_at(base, seed + 1, length)
    back = sphere.log(base, sphere.exp(base, tangent))
    # log divides by sin(length): near pi it magnifies the rounding of the point.
    np.testing.assert_allclose(back, tangent, rtol=0, atol=1e-13 / max(np.sin(length), 0.04))


@pytest.mark.parametrize("length", [1e-14, 1e-9, 1e-6, 1e-3])
def test_log_of_a_close_point_keeps_relative_accuracy(length):
    # Along the last axis of e_0, the point (cos, sin) is exact to its own last bits, so the tangent must be too.
    base, point = np.array([1.0, 0.0]), np.array([np.cos(length), np.sin(length)])
    assert sphere.log(base, point)[1] == pytest.approx(length, rel=1e-15)


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 2**32 - 1), size=st.integers(2, 9))
def test_log_is_tangent_and_as_long_as_the_arc(seed, size):
    base, point = random_units(seed, 2, size)
    assume(base @ point > -0.99)  # log divides by the sine of the angle: near pi it magnifies rounding
    tangent = sphere.log(base, point)
    assert abs(tangent @ base) < 1e-13
    assert np.linalg.norm(tangent) == pytest.approx(np.arccos(base @ point), rel=1e-7, abs=1e-7)


@pytest.mark.parametrize("t", [0.0, 0.2, 0.5, 1.0])
def test_slerp_agrees_with_scipy(t):
    a, b = random_units(3, 2, 6)
    np.testing.assert_allclose(sphere.slerp(a, b, t), geometric_slerp(a, b, t), rtol=0, atol=1e-15)


def test_slerp_ends_are_exact_also_at_angle_zero():
    a, b = random_units(4, 2, 5)
    assert np.array_equal(sphere.slerp(a, b, 0.0), a)
    assert np.array_equal(sphere.slerp(a, b, 1.0), b)
    np.testing.assert_allclose(sphere.slerp(a, a, 0.3), a, rtol=4e-16, atol=0)


def test_pairwise_angles_against_arccos_and_zero_vectors_have_none():
    points = 3.0 * random_units(5, 2, 4, 6)
    points[1, 2] = 0.0
    angles = sphere.pairwise_angles(points)
    cosines = np.einsum("bik,bjk->bij", points, points) / 9.0
    np.testing.assert_allclose(angles[0], np.arccos(np.clip(cosines[0], -1, 1)), rtol=0, atol=1e-7)
    assert np.array_equal(np.diagonal(angles[0]), np.zeros(4))
    assert np.array_equal(np.isnan(angles[1]), np.isin(np.add.outer([0, 0, 1, 0], [0, 0, 1, 0]), [1, 2]))
