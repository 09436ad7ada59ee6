"""The SVD of spectral methods, against NumPy's in float64."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from hf_frmerge.methods.spectral.algebra import RANK_TOLERANCE, WEAK, svd

SPECTRA = {
    "alike": np.linspace(3.0, 1.0, 24),
    "falling": np.geomspace(1.0, 1e-6, 24),
    "of low rank": np.r_[np.linspace(2.0, 1.0, 5), np.zeros(19)],
    "of rank one": np.r_[1e-20, np.zeros(23)],
    "strong and weak": np.r_[np.linspace(2.0, 1.0, 12), np.linspace(2e-4, 1e-4, 12)],
    "where the weak begin": 0.5 * np.r_[1.0, 1.0, WEAK * np.linspace(1.0 + 1e-6, 1.0 - 1e-6, 22)],
    "equal": np.full(24, 1e20),
}


def with_values(values: NDArray[np.float64], shape: tuple[int, int], seed: int = 0) -> NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    left, right = (np.linalg.qr(rng.standard_normal((size, len(values))))[0] for size in shape)
    return (left * values @ right.T).astype(np.float32)


@pytest.mark.parametrize("most", [None, 0, 1, 7, 20, 30])
@pytest.mark.parametrize("shape", [(24, 24), (24, 60), (60, 24)])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_it_takes_a_matrix_apart_as_numpy_does(spectrum: str, shape: tuple[int, int], most: int | None) -> None:
    matrix = with_values(SPECTRA[spectrum], shape)
    left, values, right = (part.astype(np.float64) for part in svd(matrix, most))
    all_left, all_values, all_right = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    kept = np.flatnonzero(all_values > RANK_TOLERANCE * all_values[0])[:most]
    np.testing.assert_allclose(values, all_values[kept], rtol=1e-7)
    assert np.all(np.diff(values) <= 1e-7 * values[:-1])
    for vectors in (left.T, right):
        np.testing.assert_allclose(vectors @ vectors.T, np.eye(len(kept)), rtol=0, atol=3e-7)
    product, expected = left * values @ right, all_left[:, kept] * all_values[kept] @ all_right[kept]
    if len(kept) not in (0, 24) and all_values[len(kept)] > 0.99 * all_values[len(kept) - 1]:
        expected = left @ (left.T @ matrix)  # which of equal ones are kept is arbitrary
    np.testing.assert_allclose(product, expected, rtol=0, atol=1e-6 * all_values[0])


def test_directions_are_as_sure_as_those_of_an_svd_in_float64() -> None:
    """Close values: float32 would mix their vectors, by 1e-4 and more."""
    matrix = with_values(np.r_[2.0, 1.0 + 1e-3, 1.0, np.linspace(0.5, 0.1, 21)], (24, 60))
    expected_left, _, expected_right = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    left, _, right = svd(matrix)
    for number in range(24):
        expected = np.outer(expected_left[:, number], expected_right[number])
        np.testing.assert_allclose(np.outer(left[:, number], right[number]), expected, rtol=0, atol=1e-7)


def test_a_matrix_of_zeros_has_no_directions() -> None:
    left, values, right = svd(np.zeros((3, 5), np.float32))
    assert (left.shape, values.shape, right.shape) == ((3, 0), (0,), (0, 5))


def test_what_has_no_svd_is_an_error_of_lapack() -> None:
    matrix = with_values(SPECTRA["alike"], (24, 60))
    matrix[3, 4] = np.nan
    with pytest.raises(np.linalg.LinAlgError):
        svd(matrix)
