"""DC-Merge of deltas of low rank, whose directions are made equally strong, against a version with whole matrices."""

from __future__ import annotations

import numpy as np
import pytest
from spectral_reference import Array, merge, orthogonal_low_rank, polar


def low_rank(seed: int, ranks: tuple[int, ...], rows: int = 40, cols: int = 48) -> Array:
    rng = np.random.default_rng(seed)
    return np.stack([rng.standard_normal((rows, rank)) @ rng.standard_normal((rank, cols)) for rank in ranks])


def voted(deltas: Array, ranks: tuple[int, ...], density: float) -> Array:
    """Singular values replaced by their mean, then trimmed, voted on and cut to blocks, element by element."""
    svds = [np.linalg.svd(delta, full_matrices=False) for delta in deltas]
    left = polar(np.concatenate([u[:, :r] for r, (u, _, _) in zip(ranks, svds)], axis=1))
    right = polar(np.concatenate([v[:r].T for r, (_, _, v) in zip(ranks, svds)], axis=1))
    even = [s[:r].mean() * u[:, :r] @ v[:r] for r, (u, s, v) in zip(ranks, svds)]
    aligned = [left.T @ delta @ right for delta in even]
    counts = [max(rank, int(density * sum(ranks) ** 2)) for rank in ranks]
    kept = np.stack([np.where(abs(m) >= np.sort(abs(m), axis=None)[-k], m, 0.0) for m, k in zip(aligned, counts)])
    owner = np.repeat(np.arange(len(ranks)), ranks)
    merged = np.zeros(kept.shape[1:])
    for row, col in np.ndindex(merged.shape):
        column = kept[:, row, col]
        same = column[column * (1.0 if column.sum() >= 0 else -1.0) > 0]
        merged[row, col] = same.mean() if len(same) and owner[row] == owner[col] else 0.0
    return left @ merged @ right.T


@pytest.mark.parametrize("ranks", [(5, 5, 5), (2, 7, 4)])
@pytest.mark.parametrize("density", [0.001, 0.2])
def test_directions_of_low_rank_deltas_become_equally_strong(ranks: tuple[int, ...], density: float) -> None:
    deltas = low_rank(1, ranks)
    expected = voted(deltas, ranks, density)
    actual = merge("dc_merge", deltas, density=density)
    assert np.linalg.norm(actual - expected) < 1e-4 * np.linalg.norm(expected)


def test_low_rank_deltas_at_right_angles_are_added_with_even_values() -> None:
    deltas = orthogonal_low_rank()
    even = []
    for delta in deltas:
        u, s, v = np.linalg.svd(delta)
        even.append(s[:4].mean() * u[:, :4] @ v[:4])
    np.testing.assert_allclose(merge("dc_merge", deltas), sum(even), atol=1e-5)


def test_an_expert_without_weight_or_delta_leaves_no_trace() -> None:
    deltas = low_rank(3, (4, 4, 4))
    two = merge("dc_merge", deltas[:2]) / 2
    weightless = merge("dc_merge", deltas, np.array([0.5, 0.5, 0.0])) / 3
    assert np.linalg.norm(weightless - two) < 1e-5 * np.linalg.norm(two)
    unchanged = merge("dc_merge", np.stack([*deltas[:2], 0 * deltas[2]])) / 2
    assert np.linalg.norm(unchanged - two) < 1e-5 * np.linalg.norm(two)
