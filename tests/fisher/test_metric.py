"""Inner products by Fisher information, against dense algebra in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_frmerge.fisher.average import FLOOR
from hf_frmerge.fisher.metric import diagonal_metric, kronecker_metric, weighted_gram

SHARES = (0.7, 0.3)
ROWS, COLUMNS = 6, 5


def randoms(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def covariance(seed: int, size: int, rank: int) -> np.ndarray:
    rows = randoms(seed, rank, size)
    return rows.T @ rows


def gram_of(points: list[np.ndarray], metric: object, n_blocks: int) -> np.ndarray:
    return weighted_gram([torch.from_numpy(x).reshape(n_blocks, -1) for x in points], metric)  # type: ignore[arg-type]


def dense_gram(points: list[np.ndarray], information: np.ndarray, n_blocks: int) -> np.ndarray:
    """`x . F y` of every block, the other blocks being zero."""
    size = points[0].size // n_blocks
    cuts = [slice(b * size, (b + 1) * size) for b in range(n_blocks)]
    flat = [x.flatten() for x in points]
    return np.array([[[x[c] @ information[c, c] @ y[c] for y in flat] for x in flat] for c in cuts])


@pytest.mark.parametrize("n_blocks", [1, ROWS])
def test_diagonal_products_are_those_of_the_floored_mean(n_blocks: int) -> None:
    information = [randoms(seed, ROWS, COLUMNS) ** 4 for seed in range(2)]
    information[0][0], information[1][0] = 0, 0
    points = [randoms(seed, ROWS, COLUMNS) for seed in range(5, 8)]
    mean = np.sum([w * f for w, f in zip(SHARES, information)], axis=0)
    expected = np.diag(np.maximum(mean, FLOOR * mean.mean()).flatten() / mean.mean())
    metric = diagonal_metric([torch.from_numpy(f) for f in information], SHARES, n_blocks)
    np.testing.assert_allclose(gram_of(points, metric, n_blocks), dense_gram(points, expected, n_blocks), rtol=1e-12)


@pytest.mark.parametrize("is_flipped", [False, True])
@pytest.mark.parametrize("n_blocks", [1, 2, ROWS])
def test_kronecker_products_are_those_of_the_mean_of_the_products(n_blocks: int, is_flipped: bool) -> None:
    sizes = (ROWS, COLUMNS) if is_flipped else (COLUMNS, ROWS)  # in, out: what is stored is ROWS x COLUMNS
    factors = [(covariance(i, sizes[0], 2), covariance(i + 10, sizes[1], 3)) for i in range(2)]
    points = [randoms(seed, ROWS, COLUMNS) for seed in range(5, 8)]

    def damped(factor: np.ndarray) -> np.ndarray:
        return factor + FLOOR * factor.diagonal().mean() * np.eye(len(factor))

    products = [(damped(g), damped(a)) for a, g in factors]
    whole = [w * (np.kron(a, g) if is_flipped else np.kron(g, a)) for w, (g, a) in zip(SHARES, products)]
    dense = np.sum(whole, axis=0)
    expected = dense_gram(points, dense / dense.diagonal().mean(), n_blocks)
    tensors = [(torch.from_numpy(a), torch.from_numpy(g)) for a, g in factors]
    metric = kronecker_metric(tensors, SHARES, n_blocks, is_flipped=is_flipped)
    np.testing.assert_allclose(gram_of(points, metric, n_blocks), expected, rtol=1e-11, atol=1e-11)


def test_lengths_are_those_of_whitened_points() -> None:
    """`tr(G X A Y^T)` is the plain product of `G^1/2 X A^1/2` and `G^1/2 Y A^1/2`."""
    a, g = covariance(0, COLUMNS, 20), covariance(1, ROWS, 20)
    points = [randoms(seed, ROWS, COLUMNS) for seed in range(2, 5)]
    metric = kronecker_metric([(torch.from_numpy(a), torch.from_numpy(g))], (1.0,), 1, is_flipped=False)

    def root(matrix: np.ndarray) -> np.ndarray:
        matrix = (matrix / matrix.diagonal().mean() + FLOOR * np.eye(len(matrix))) / (1 + FLOOR)
        values, vectors = np.linalg.eigh(matrix)
        return np.asarray((vectors * np.sqrt(values)) @ vectors.T)

    white = [root(g) @ x @ root(a) for x in points]
    expected = [[(x * y).sum() for y in white] for x in white]
    np.testing.assert_allclose(gram_of(points, metric, 1)[0], expected, rtol=1e-12)


def test_constant_information_weighs_nothing() -> None:
    points = [randoms(seed, ROWS, COLUMNS) for seed in range(3)]
    plain = dense_gram(points, np.eye(ROWS * COLUMNS), 1)
    same = torch.full((ROWS, COLUMNS), 0.25)
    np.testing.assert_allclose(gram_of(points, diagonal_metric([same, 8 * same], SHARES, 1), 1), plain, rtol=1e-14)
    units = [(k * torch.eye(COLUMNS), k * torch.eye(ROWS)) for k in (1e-9, 2e-9)]
    found = gram_of(points, kronecker_metric(units, SHARES, 1, is_flipped=False), 1)
    np.testing.assert_allclose(found, plain, rtol=1e-14)


def test_without_information_there_is_no_product() -> None:
    nothing = torch.zeros(ROWS, COLUMNS)
    assert diagonal_metric([nothing, nothing], SHARES, 1) is None
    none = (torch.zeros(COLUMNS, COLUMNS), torch.zeros(ROWS, ROWS))
    assert kronecker_metric([none, none], SHARES, 1, is_flipped=False) is None
    some = (torch.eye(COLUMNS), torch.eye(ROWS))  # of one expert alone
    points = [randoms(seed, ROWS, COLUMNS) for seed in range(3)]
    found = gram_of(points, kronecker_metric([none, some], SHARES, 1, is_flipped=False), 1)
    np.testing.assert_allclose(found, dense_gram(points, np.eye(ROWS * COLUMNS), 1), rtol=1e-12)
