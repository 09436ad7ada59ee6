"""Matrix products: exact to the last bit, which a loop over Python floats says, at every level and in numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest

from hf_frmerge.kernels.product import elementwise_product, product

try:
    from hf_frmerge.kernels import _native

    LEVELS = _native.levels()
except ImportError:
    LEVELS = []

SHAPES = [(1, 1, 1), (5, 3, 7), (6, 0, 4), (0, 3, 2), (9, 130, 33), (70, 17, 200), (23, 300, 31)]
BACKENDS = [*LEVELS, "numpy"]


def multiply(backend: str, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    if backend == "numpy":
        return elementwise_product(left, right)
    out = np.full((left.shape[0], right.shape[1]), np.nan, left.dtype)
    _native.matmul(backend, left, right, out)
    return out


def by_hand(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Scalars, one rounding after the other."""
    out = np.zeros((left.shape[0], right.shape[1]), left.dtype)
    for i in range(out.shape[0]):
        for j in range(out.shape[1]):
            for k in range(left.shape[1]):
                out[i, j] = out[i, j] + left[i, k] * right[k, j]
    return out


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", SHAPES[:5])
def test_sums_run_in_the_order_of_the_inner_dimension(backend, dtype, shape):
    rows, depth, columns = shape
    rng = np.random.default_rng(0)
    left, right = rng.standard_normal((rows, depth)).astype(dtype), rng.standard_normal((depth, columns)).astype(dtype)
    assert multiply(backend, left, right).tobytes() == by_hand(left, right).tobytes()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_strides_company_and_symmetry_change_no_bit(backend, dtype, shape):
    rows, depth, columns = shape
    rng = np.random.default_rng(1)
    left, right = rng.standard_normal((rows, depth)).astype(dtype), rng.standard_normal((depth, columns)).astype(dtype)
    expected = elementwise_product(left, right)
    spread = np.repeat(left, 3, axis=1)[:, ::3]
    assert multiply(backend, spread, np.asfortranarray(right)).tobytes() == expected.tobytes()
    assert multiply(backend, left[::-1], right[:, ::-1])[::-1, ::-1].tobytes() == expected.tobytes()
    for i in range(min(rows, 3)):
        assert multiply(backend, left[i : i + 1], right).tobytes() == expected[i].tobytes()
    if columns:
        assert multiply(backend, left, right[:, -1:]).tobytes() == expected[:, -1].tobytes()
    for square in (left, left.T):
        expected = elementwise_product(square, np.array(square.T))
        assert multiply(backend, square, square.T).tobytes() == expected.tobytes()


def test_the_product_is_the_mathematical_one():
    rng = np.random.default_rng(2)
    left, right = rng.standard_normal((40, 500)), rng.standard_normal((500, 30))
    exact = [[math.fsum(row * column) for column in right.T] for row in left]
    np.testing.assert_allclose(product(left, right), exact, rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "left, right",
    [
        (np.zeros((2, 3)), np.zeros((2, 3))),
        (np.zeros((2, 3)), np.zeros((3, 2), np.float32)),
        (np.zeros((2, 3)), np.zeros(3)),
    ],
    ids=["shapes", "types", "a vector"],
)
def test_what_does_not_fit_is_refused(backend, left, right):
    with pytest.raises(ValueError, match="must be"):
        elementwise_product(left, right) if backend == "numpy" else _native.matmul(
            backend, left, right, np.zeros((2, 2))
        )


@pytest.mark.parametrize("level", LEVELS)
def test_the_extension_checks_what_it_is_given(level):
    for wrong in (np.zeros((3, 3)), np.zeros((2, 2))[:, ::2], np.zeros((2, 2), np.float32)):
        with pytest.raises(ValueError, match="out must"):
            _native.matmul(level, np.zeros((2, 3)), np.zeros((3, 2)), wrong)
    with pytest.raises(ValueError, match="float32 or float64"):
        _native.matmul(level, np.zeros((2, 3), np.int64), np.zeros((3, 2)), np.zeros((2, 2)))
