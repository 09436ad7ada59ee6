"""LAPACK in float32, against NumPy's in float64; and its BLAS has one thread under those of a merge."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import save_llama_family

from hf_frmerge.methods.spectral import lapack

shapes = st.tuples(st.integers(1, 40), st.integers(1, 40))


@given(shapes, st.integers(0, 2**32 - 1), st.integers(-8, 8))
def test_singular_vectors(shape: tuple[int, int], seed: int, exponent: int) -> None:
    matrix = np.random.default_rng(seed).standard_normal(shape).astype(np.float32) * np.float32(10.0**exponent)
    before = matrix.copy()
    left, values, right = lapack.svd(matrix)
    assert left.dtype == values.dtype == right.dtype == np.float32
    expected = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
    tolerance = 5e-6 * expected[0]
    np.testing.assert_allclose(values, expected, rtol=0, atol=tolerance)
    np.testing.assert_allclose((left.astype(np.float64) * values) @ right, matrix, rtol=0, atol=tolerance)
    identity = np.eye(min(shape))
    np.testing.assert_allclose(left.T.astype(np.float64) @ left, identity, rtol=0, atol=1e-5)
    np.testing.assert_allclose(right.astype(np.float64) @ right.T, identity, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(matrix, before)


@given(st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_eigenvectors(n: int, seed: int) -> None:
    square = np.random.default_rng(seed).standard_normal((n, n)).astype(np.float32)
    matrix = square + square.T
    before = matrix.copy()
    values, vectors = lapack.eigh(matrix)
    expected = np.linalg.eigvalsh(matrix.astype(np.float64))
    tolerance = 5e-6 * np.abs(expected).max()
    np.testing.assert_allclose(values, expected, rtol=0, atol=tolerance)
    np.testing.assert_allclose((vectors.astype(np.float64) * values) @ vectors.T, matrix, rtol=0, atol=tolerance)
    np.testing.assert_array_equal(matrix, before)


def test_other_orders_of_elements() -> None:
    matrix = np.random.default_rng(0).standard_normal((12, 30)).astype(np.float32)
    for view in (matrix.T, matrix[::2, ::3], matrix[:, ::-1]):
        for found, expected in zip(lapack.svd(view), lapack.svd(np.ascontiguousarray(view))):
            np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
def test_matrices_without_elements(shape: tuple[int, int]) -> None:
    left, values, right = lapack.svd(np.zeros(shape, np.float32))
    assert (left.shape, values.shape, right.shape) == ((shape[0], 0), (0,), (0, shape[1]))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_not_finite(value: float) -> None:
    matrix = np.eye(4, dtype=np.float32)
    matrix[1, 2] = value
    for function in (lapack.svd, lapack.eigh):
        with pytest.raises(np.linalg.LinAlgError, match="not finite"):
            function(matrix)


def test_what_lapack_refuses_is_an_error() -> None:
    matrix, work, integers = np.eye(2, dtype=np.float32), np.empty(64, np.float32), np.empty(64, np.intc)
    with pytest.raises(np.linalg.LinAlgError, match="sgesdd ended with -2"):  # the second argument is wrong
        lapack._call("sgesdd", b"S", -1, 2, matrix, 2, work, matrix, 2, matrix, 2, work, 64, integers)


THREADS = """
import sys
from threadpoolctl import threadpool_info
from hf_frmerge import FisherRaoMerger, MergingArguments
from hf_frmerge.methods.spectral import lapack
from hf_frmerge.provenance.verify import verify

plain, seen = lapack.svd, set()
def svd(matrix):
    found = plain(matrix)
    seen.update(each["num_threads"] for each in threadpool_info() if each["user_api"] == "blas")
    return found
lapack.svd = svd
base, *experts, output = sys.argv[1:]
assert "scipy" not in sys.modules  # or it would be under the limit anyway
if not any(each["num_threads"] > 1 for each in threadpool_info() if each["user_api"] == "blas"):
    raise SystemExit(print("one thread anyway"))
if experts:
    FisherRaoMerger(experts, MergingArguments(output, method="tsv_m", space="deltas"), base_model=base).merge()
else:
    assert verify(output).ok
print(sorted(seen))
"""


def test_its_blas_has_one_thread_under_those_of_a_merge_and_of_verify(tmp_path: Path) -> None:
    save_llama_family(tmp_path, ["a", "b"], 0.1)
    folders = [str(tmp_path / name) for name in ("base", "math", "code", "merged")]
    for models in (folders, [folders[0], folders[-1]]):
        done = subprocess.run(
            [sys.executable, "-c", THREADS, *models],
            capture_output=True,
            text=True,
            check=False,
            env={k: v for k, v in os.environ.items() if not k.endswith("_NUM_THREADS")},
        )
        if done.stdout.strip() == "one thread anyway":
            pytest.skip("the BLAS of numpy has one thread anyway, or is not known to threadpoolctl")
        assert done.stdout.strip().endswith("[1]"), done.stdout + done.stderr
