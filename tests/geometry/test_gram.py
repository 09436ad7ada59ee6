from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_frmerge.geometry.gram import delta_gram, difference_gram, embed, embed_differences
from hf_frmerge.geometry.sphere import pairwise_angles


def random_points(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def gram_of(points: np.ndarray) -> np.ndarray:
    return np.einsum("...ik,...jk->...ij", points, points)


def differences_of(points: np.ndarray) -> np.ndarray:
    return gram_of(np.concatenate([points[..., :1, :], points[..., 1:, :] - points[..., :1, :]], axis=-2))


# --- difference_gram


@pytest.mark.parametrize("chunk", [1, 7, 64, 1 << 18])
def test_difference_gram_of_mixed_dtypes_against_exact_sums(chunk):
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((5, 13)).astype(dtype) for dtype in (np.float16, np.float32, np.float64)]
    x = [array.astype(np.float64).ravel() for array in arrays]
    rows = [x[0], x[1] - x[0], x[2] - x[0]]
    expected = [[math.fsum(a * b) for b in rows] for a in rows]
    np.testing.assert_allclose(difference_gram(arrays, chunk=chunk), expected, rtol=1e-13, atol=1e-14)


def test_difference_gram_pairs_elements_by_index_whatever_the_layout():
    a, b = random_points(1, 2, 6, 8)
    expected = difference_gram([a, b])
    np.testing.assert_allclose(difference_gram([np.asfortranarray(a), b]), expected, rtol=1e-14)
    np.testing.assert_allclose(difference_gram([a.T, np.ascontiguousarray(b.T)]), expected, rtol=1e-14)
    np.testing.assert_allclose(difference_gram([np.repeat(a, 2, axis=1)[:, ::2], b]), expected, rtol=1e-14)


def test_difference_gram_is_the_same_bits_every_time():
    arrays = list(random_points(2, 3, 10_000).astype(np.float32))
    assert np.array_equal(difference_gram(arrays), difference_gram(arrays))


def test_norm_of_half_a_billion_elements():
    # A single-precision sum is lost here: torch.linalg.vector_norm in float32 on such a tensor is off by 9.5 %.
    # 2000 views of one chunk stand for 2 GB of data.
    chunk = np.random.default_rng(3).standard_normal(250_000).astype(np.float32)
    huge = np.broadcast_to(chunk, (2000, chunk.size))
    assert huge.size == 5 * 10**8
    expected = math.sqrt(2000 * math.fsum(chunk.astype(np.float64) ** 2))
    assert math.sqrt(difference_gram([huge])[0, 0]) == pytest.approx(expected, rel=1e-11)


def test_difference_gram_refuses_nothing_and_unequal_shapes():
    with pytest.raises(ValueError, match="at least one"):
        difference_gram([])
    with pytest.raises(ValueError, match=r"one shape, got \[\(2, 3\), \(3, 2\)\]"):
        difference_gram([np.ones((2, 3)), np.ones((3, 2))])


def test_delta_gram_against_the_vectors():
    points = random_points(4, 5, 4, 30)
    differences = differences_of(points)
    np.testing.assert_allclose(delta_gram(differences), gram_of(points[:, 1:] - points[:, :1]), rtol=0, atol=1e-12)


# --- embed


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(1, 8),
    rank=st.integers(1, 10),
    decades=st.floats(0, 60),
)
def test_embed_keeps_every_inner_product_whatever_the_norms(seed, n, rank, decades):
    rng = np.random.default_rng(seed)
    units = rng.standard_normal((3, n, rank))
    units /= np.linalg.norm(units, axis=-1, keepdims=True)
    scale = 10.0 ** rng.uniform(-decades, decades, (3, n, 1))
    points = embed(gram_of(units * scale))
    assert points.shape == (3, n, n)
    np.testing.assert_allclose(gram_of(points / scale), gram_of(units), rtol=0, atol=1e-13)


def test_equal_vectors_get_bit_equal_points_and_zero_vectors_zero():
    x, y = random_points(5, 2, 1000)
    points = embed(gram_of(np.stack([x, y, x, 0 * x, y, x])))
    assert np.array_equal(points[0], points[2])
    assert np.array_equal(points[0], points[5])
    assert np.array_equal(points[1], points[4])
    assert not points[3].any()
    assert np.linalg.matrix_rank(points, tol=1e-9) == 2


def test_dependent_vectors_use_no_more_axes_than_they_span():
    # What rounding leaves after two pivots must not become a third axis of 1e-8.
    plane = random_points(12, 500, 2, 40)
    vectors = np.einsum("bij,bjk->bik", random_points(13, 500, 5, 2), plane)
    points = embed(gram_of(vectors))
    assert np.array_equal(points[:, :, 2:], np.zeros((500, 5, 3)))
    np.testing.assert_allclose(gram_of(points), gram_of(vectors), rtol=0, atol=1e-11)


@pytest.mark.parametrize("noise, allowed", [(1e-6, 5e-5), (1e-9, 1e-5), (0.0, 1e-13)])
def test_embed_keeps_noise_at_its_own_size(noise, allowed):
    # Single-precision kernels give Gram matrices that are indefinite by 1e-6: nothing may blow up. Without the bound
    # on inner products the worst of these is off by 3e-2.
    rng = np.random.default_rng(6)
    points = rng.standard_normal((2000, 6, 3))
    gram = gram_of(points / np.linalg.norm(points, axis=-1, keepdims=True))
    error = noise * rng.uniform(-1, 1, gram.shape)
    noisy = gram + 0.5 * (error + error.swapaxes(-1, -2))
    assert (np.linalg.eigvalsh(noisy)[:, 0] < -0.3 * noise).any()
    difference = np.abs(gram_of(embed(noisy)) - gram).max(axis=(-1, -2))
    assert difference.max() < allowed
    assert np.median(difference) < 3 * noise + 1e-15


@pytest.mark.parametrize("angle", [1e-7, 1e-6, 1e-5, 1e-4, 1e-2])
def test_angles_between_siblings_survive(angle):
    # Three vectors in general position around x_0, all pairs as far apart as constructed; arccos of float64 cosines
    # is wrong by 1 % at 1e-7.
    basis = np.linalg.qr(random_points(7, 400, 3))[0].T
    x = [basis[0], np.cos(angle) * basis[0] + np.sin(angle) * basis[1]]
    x.append(np.cos(2 * angle) * basis[0] + np.sin(2 * angle) * basis[2])
    angles = pairwise_angles(embed_differences(difference_gram([7.0 * v for v in x])))
    assert angles[0, 1] == pytest.approx(angle, rel=1e-8)
    assert angles[0, 2] == pytest.approx(2 * angle, rel=1e-8)
    chord = np.sqrt(np.sum((x[1] - x[2]) ** 2))
    assert angles[1, 2] == pytest.approx(2 * np.arcsin(chord / 2), rel=1e-8)


def test_angles_survive_a_change_of_norm_as_far_as_the_gram_matrix_holds_them():
    # The difference is then nearly parallel to x_0 and the angle is in the small remainder: 1e-16 * (0.3 / 1e-4)^2.
    basis = np.linalg.qr(random_points(8, 400, 2))[0].T
    x = [basis[0], 1.3 * (np.cos(1e-4) * basis[0] + np.sin(1e-4) * basis[1])]
    assert pairwise_angles(embed_differences(difference_gram(x)))[0, 1] == pytest.approx(1e-4, rel=1e-7)


def test_embed_differences_has_its_first_axis_along_the_first_point():
    points = random_points(9, 4, 3, 50)
    placed = embed_differences(differences_of(points))
    np.testing.assert_allclose(placed[:, 0, 0], np.linalg.norm(points[:, 0], axis=-1), rtol=1e-14)
    assert not placed[:, 0, 1:].any()
    np.testing.assert_allclose(gram_of(placed), gram_of(points), rtol=0, atol=1e-11)


def test_embed_differences_with_a_zero_first_point_and_copies():
    x = random_points(10, 300)
    placed = embed_differences(difference_gram([0 * x, x, x, 0 * x, 2 * x]))
    assert not placed[0].any()
    assert not placed[3].any()
    assert np.array_equal(placed[1], placed[2])
    np.testing.assert_allclose(gram_of(placed), np.outer([0, 1, 1, 0, 2], [0, 1, 1, 0, 2]) * (x @ x), rtol=1e-14)
    zeros = embed_differences(difference_gram([x, 0 * x, x, 0 * x]))
    assert not zeros[[1, 3]].any()
    assert np.array_equal(zeros[0], zeros[2])
    copies = embed_differences(difference_gram([x, x, x]))
    assert np.array_equal(copies[0], copies[1])
    assert np.array_equal(copies[0], copies[2])


@pytest.mark.parametrize("place", [embed, embed_differences])
def test_a_block_has_the_same_bits_alone_and_in_any_batch(place):
    gram = differences_of(random_points(11, 40, 9, 20))
    together = place(gram)
    assert np.array_equal(together, np.stack([place(one) for one in gram]))
    assert np.array_equal(together.reshape(5, 8, 9, 9), place(gram.reshape(5, 8, 9, 9)))
    many = np.tile(gram, (60, 1, 1))  # more than one slab
    assert np.array_equal(place(many)[-40:], together)
