"""Post-steps against a naive float64 version and closed forms."""

from __future__ import annotations

import numpy as np
import pytest

from hf_frmerge.methods.post_steps import SingularValueCalibration


def naive_svc(merged: np.ndarray, deltas: np.ndarray, weights: list[float], floor: float) -> np.ndarray:
    """Direction by direction, expert by expert."""
    left, values, right = np.linalg.svd(merged.astype(np.float64), full_matrices=False)
    total = np.zeros(merged.shape)
    for r, value in enumerate(values):
        response = left[:, r] @ merged
        share = 0.0
        for weight, delta in zip(weights, deltas):
            own = left[:, r] @ delta.astype(np.float64)
            share += weight * max(response @ own / (own @ own), floor)
        total += value / share * np.outer(left[:, r], right[r])
    return total


@pytest.mark.parametrize("shape", [(7, 5), (5, 7)])
@pytest.mark.parametrize("weights", [[1 / 3] * 3, [0.5, 0.3, 0.2]])
@pytest.mark.parametrize("floor", [0.1, 0.7])
def test_svc_is_the_naive_version(shape: tuple[int, int], weights: list[float], floor: float) -> None:
    deltas = np.random.default_rng(0).normal(size=(3, *shape)).astype(np.float32)
    merged = 0.8 * deltas.sum(axis=0)
    actual = SingularValueCalibration(tuple(weights), floor).apply(merged, deltas)
    np.testing.assert_allclose(actual, naive_svc(merged, deltas, weights, floor), rtol=0, atol=2e-5)


@pytest.mark.parametrize("count", [1.0, 0.5, 3.0])
def test_what_all_experts_share_comes_back_once(count: float) -> None:
    """Whatever a merge multiplies a common delta with, it is what one expert has of it."""
    delta = np.random.default_rng(1).normal(size=(6, 4)).astype(np.float32)
    actual = SingularValueCalibration((0.5, 0.5)).apply(count * delta, np.stack([delta, delta]))
    np.testing.assert_allclose(actual, delta, rtol=0, atol=1e-5)


def test_directions_of_one_expert_count_the_others_as_the_floor() -> None:
    first, second = np.zeros((2, 4, 4), np.float32)
    first[0, 0], second[1, 1] = 3.0, 5.0
    actual = SingularValueCalibration((0.5, 0.5), 0.1).apply(first + second, np.stack([first, second]))
    np.testing.assert_allclose(actual, (first + second) / (0.5 + 0.5 * 0.1), rtol=1e-6)


def test_nothing_stays_nothing() -> None:
    zeros = np.zeros((2, 3, 4), np.float32)
    np.testing.assert_array_equal(SingularValueCalibration((0.5, 0.5)).apply(zeros[0], zeros), zeros[0])
