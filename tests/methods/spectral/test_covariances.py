"""ACE-Merging of experts that changed by very different amounts, and in closed form; SWUDI in closed form."""

from __future__ import annotations

import numpy as np
from spectral_reference import covariances, experts, merge, orthogonal_low_rank


def test_experts_of_different_size_are_evened_out_by_ace() -> None:
    deltas = experts(9, 3, 24, 16)
    deltas /= np.linalg.norm(deltas, axis=(1, 2), keepdims=True)
    deltas *= np.array([0.02, 0.4, 20.0])[:, None, None]
    logs = 2 * np.log([0.02, 0.4, 20.0])
    assert logs.var() > 0.3 * logs.mean() ** 2  # what the paper asks for
    for weights in (np.full(3, 1 / 3), np.array([0.5, 0.3, 0.2])):
        expected = covariances(deltas, weights)
        actual = merge("ace", deltas, weights)
        assert np.linalg.norm(actual - expected) < 2e-4 * np.linalg.norm(expected)
        plain = merge("ace", deltas * 1e-3, weights)  # all of them small: the logarithms vary less than their mean
        assert np.linalg.norm(plain - covariances(deltas * 1e-3, weights)) < 2e-4 * np.linalg.norm(plain)


def test_experts_on_different_inputs_are_added_by_ace() -> None:
    # Rows that add up to zero have no mean and leave no prior; what a ridge of 1e-5 takes away is as small.
    rng = np.random.default_rng(0)
    deltas = np.zeros((3, 20, 12))
    for index, columns in enumerate(np.split(rng.permutation(12), 3)):
        left = np.linalg.qr(rng.standard_normal((20, 20)))[0]
        signs = np.linalg.qr(np.concatenate([np.ones((20, 1)), left[:, :4]], axis=1))[0][:, 1:]  # orthogonal to 1
        right = np.linalg.qr(rng.standard_normal((4, 4)))[0]
        right -= right.mean(axis=1, keepdims=True)  # the columns of the covariance add up to zero
        deltas[index][:, columns] = signs @ right
    expected = deltas.sum(axis=0)
    assert np.linalg.norm(merge("ace", deltas) - expected) < 1e-3 * np.linalg.norm(expected)


def test_ace_leaves_out_experts_whose_rows_are_alike() -> None:
    deltas = experts(10, 3, 14, 10)
    sizes = np.array([0.05, 10.0, 1.0]) / np.linalg.norm(deltas, axis=(1, 2))
    for likes in (deltas, deltas * sizes[:, None, None]):  # of like size, and evened out
        expected = covariances(likes[:2], np.full(2, 0.5))
        for third in (np.zeros((14, 10)), np.tile(likes[2, 0], (14, 1))):
            actual = merge("ace", np.stack([*likes[:2], third]))
            assert np.linalg.norm(actual - expected) < 2e-4 * np.linalg.norm(expected)


def test_experts_that_see_different_inputs_are_all_kept_by_swudi() -> None:
    # At right angles the sum has zero loss already: nothing moves.
    deltas = orthogonal_low_rank()
    np.testing.assert_allclose(merge("swudi", deltas, density=1.0), deltas.sum(axis=0), atol=1e-4)
    # Equal experts: the minimum is that expert, at which long descent arrives, and zero steps stay at the sum.
    same = np.stack([experts(5, 1, 12, 10)[0]] * 3)
    assert np.linalg.norm(merge("swudi", same, density=1.0, descent_steps=1e9) - same[0]) < 1e-3 * np.linalg.norm(
        same[0]
    )
    np.testing.assert_allclose(merge("swudi", same, descent_steps=0.0), 3 * same[0], rtol=1e-4, atol=1e-7)
