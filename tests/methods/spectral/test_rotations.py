"""OrthoMerge in closed form: rotations of one plane, experts that are alike, reflections, and what cannot be seen."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.linalg import expm
from spectral_reference import Array, base_of, experts, merge

from hf_frmerge.methods.spectral.rotations import cayley, nearest_rotation


def turn(size: int, plane: tuple[int, int], angle: float) -> Array:
    generator = np.zeros((size, size))
    generator[plane], generator[plane[::-1]] = angle, -angle
    turned: Array = expm(generator)
    return turned


def test_rotations_of_one_plane_are_averaged_by_the_tangent_of_half_the_angle() -> None:
    base, angles, weights = base_of((12, 8)), np.array([0.1, 0.7, 0.4]), np.array([0.5, 0.2, 0.3])
    deltas = np.stack([base @ turn(8, (1, 4), angle) - base for angle in angles])
    mean = 2 * np.arctan(weights @ np.tan(angles / 2))
    actual = base + merge("ortho_merge", deltas, weights, base)
    np.testing.assert_allclose(actual, base @ turn(8, (1, 4), mean), atol=1e-5)


def test_rotations_at_right_angles_keep_their_mean_size() -> None:
    base, half = base_of((12, 8)), np.tan(0.2)
    deltas = np.stack([base @ turn(8, plane, 0.4) - base for plane in ((0, 1), (4, 6))])
    # Each counts for 1/2, and by 1/sqrt(2) instead once their sum has the mean norm.
    angle = 2 * np.arctan(half / np.sqrt(2))
    expected = base @ turn(8, (0, 1), angle) @ turn(8, (4, 6), angle)
    np.testing.assert_allclose(base + merge("ortho_merge", deltas, base=base), expected, atol=1e-5)


@pytest.mark.parametrize("shape", [(12, 8), (6, 10), (4, 10)])
def test_equal_experts_come_back_but_for_the_sum_of_their_rests(shape: tuple[int, int]) -> None:
    base, delta = base_of(shape), experts(1, 1, *shape)[0]
    left, _, right = np.linalg.svd(base.T @ (base + delta) + 1e-9 * np.eye(shape[1]))
    rest = base + delta - base @ left @ right
    expected = base @ left @ right + 3 * 0.2 * rest
    np.testing.assert_allclose(base + merge("ortho_merge", np.stack([delta] * 3), base=base), expected, atol=1e-6)


def test_directions_that_the_base_maps_to_zero_are_not_turned() -> None:
    base = np.zeros((4, 9))
    base[:, :4] = np.diag([4.0, 3.0, 2.0, 1.0])
    moved = base @ turn(9, (0, 7), 0.3)
    rotation = nearest_rotation(base.T @ moved)
    np.testing.assert_allclose(rotation, turn(9, (0, 7), 0.3), atol=1e-12)
    assert np.linalg.norm(nearest_rotation(np.zeros((5, 5))) - np.eye(5)) < 1e-12


def test_a_reflection_becomes_the_rotation_that_fits_best() -> None:
    rng = np.random.default_rng(3)
    matrix = np.diag([5.0, 4.0, 3.0, -0.01]) @ turn(4, (0, 2), 0.2)
    actual = nearest_rotation(matrix)
    assert np.linalg.det(actual) > 0.999
    others = [np.linalg.qr(rng.standard_normal((4, 4)))[0] for _ in range(300)]
    others = [actual @ expm(0.1 * (one - one.T)) for one in others]
    assert all(np.sum(matrix * other) <= np.sum(matrix * actual) + 1e-12 for other in others)
    assert np.isfinite(cayley(actual)).all()


def test_the_skew_matrix_of_a_rotation_leads_back_to_it() -> None:
    rotation = turn(6, (0, 3), 0.5) @ turn(6, (2, 3), -0.2)
    skew, identity = cayley(rotation), np.eye(6)
    assert np.array_equal(skew, -skew.T)
    np.testing.assert_allclose(np.linalg.inv(identity - skew) @ (identity + skew), rotation, atol=1e-14)
