"""What all spectral methods have in common, and closed forms of those that choose among directions."""

from __future__ import annotations

import numpy as np
import pytest
from spectral_reference import NAIVE, base_of, experts, merge, orthogonal_low_rank

from hf_frmerge.methods.spectral.decision import memory_bytes
from hf_frmerge.methods.table import METHODS

SPECTRAL = [m.name for m in METHODS.values() if m.kind == "spectral" and m.n_experts is None and not m.needs_factors]


@pytest.mark.parametrize("shape", [(24, 16), (16, 24), (20, 20), (6, 20)])
@pytest.mark.parametrize("name", SPECTRAL)
def test_a_spectral_method_is_its_float64_version(name: str, shape: tuple[int, int]) -> None:
    deltas = experts(1, 3, *shape)
    for weights in (np.full(3, 1 / 3), np.array([0.5, 0.3, 0.2])):
        expected = NAIVE[name](deltas, weights)
        options = {"density": 1.0} if name == "swudi" else {}
        actual = merge(name, deltas, weights, **options)
        assert np.linalg.norm(actual - expected) < 2e-4 * np.linalg.norm(expected)


@pytest.mark.parametrize("name", SPECTRAL)
def test_deltas_turned_are_merged_deltas_turned(name: str) -> None:
    deltas = experts(2, 3, 18, 14)
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.standard_normal((size, size)))[0] for size in (18, 14))
    if name == "knots":  # takes single inputs apart
        right = np.eye(14)
    if name == "ace":  # takes rows and single inputs apart
        left, right = np.eye(18)[rng.permutation(18)], np.eye(14)[rng.permutation(14)]
    times = 1.0 if name in ("swudi", "ace", "ortho_merge") else 5.0  # these know how large a delta is
    base = base_of(deltas.shape[1:])
    expected = times * left @ merge(name, deltas, base=base) @ right
    actual = merge(name, times * left @ deltas @ right, base=left @ base @ right)
    assert np.linalg.norm(actual - expected) < 1e-3 * np.linalg.norm(expected)


@pytest.mark.parametrize("name", SPECTRAL)
def test_the_order_of_experts_does_not_matter(name: str) -> None:
    deltas, weights = experts(3, 3, 12, 16), np.array([0.2, 0.5, 0.3])
    order = [2, 0, 1]
    actual, turned = merge(name, deltas, weights), merge(name, deltas[order], weights[order])
    assert np.linalg.norm(actual - turned) < 1e-4 * np.linalg.norm(actual)


def test_low_rank_deltas_at_right_angles_are_added_by_tsv() -> None:
    deltas = orthogonal_low_rank()
    np.testing.assert_allclose(merge("tsv_m", deltas), deltas.sum(axis=0), atol=1e-5)


def test_isotropic_merges_have_one_singular_value_also_of_low_rank_deltas() -> None:
    deltas = orthogonal_low_rank()
    values = np.linalg.svd(merge("iso_c", deltas), compute_uv=False)
    each = np.linalg.svd(deltas, compute_uv=False)[:, :4]
    np.testing.assert_allclose(values[:12], each.mean(), rtol=1e-4)
    assert values[12:].max() < 1e-4
    # Of the 12 directions that there are, 0.8 are common, the nine strongest, and one is each expert's own: its
    # strongest of those that are left, if any is.
    values = np.linalg.svd(merge("iso_cts", deltas), compute_uv=False)
    common = np.sort(each, axis=None)[-9:]
    own = [left.max() for one in each if (left := one[one < common.min()]).size]
    np.testing.assert_allclose(values[: 9 + len(own)], np.mean([*common, *own]), rtol=1e-4)
    assert 0 < len(own) < 3 and values[9 + len(own) :].max() < 1e-4


def test_equal_low_rank_experts_come_back_from_tsv() -> None:
    # Their singular vectors span half of what the nearest orthonormal ones could be of: the rest would be noise.
    same = np.stack([orthogonal_low_rank()[0]] * 2)
    np.testing.assert_allclose(merge("tsv_m", same), same[0], atol=1e-5)


def test_what_is_left_of_a_delta_of_rank_one_is_no_direction() -> None:
    rng = np.random.default_rng(11)
    deltas = experts(11, 3, 12, 10)
    deltas[2] = np.outer(rng.standard_normal(12), rng.standard_normal(10))
    first = merge("res_merge", deltas)
    deltas[2] *= 1 + 1e-7 * rng.standard_normal((12, 10))  # other rounding errors
    assert np.linalg.norm(merge("res_merge", deltas) - first) < 1e-4 * np.linalg.norm(first)


def test_equal_experts_come_back_from_res_merge_but_for_their_first_direction() -> None:
    delta = experts(6, 1, 12, 10)[0]
    u, s, v = np.linalg.svd(delta)
    head = s[0] * np.outer(u[:, 0], v[0])
    rest = delta - head
    expected = rest + 0.2 * np.linalg.norm(rest) * head / np.linalg.norm(head)
    np.testing.assert_allclose(merge("res_merge", np.stack([delta] * 3)), expected, atol=1e-7)


@pytest.mark.parametrize("name", SPECTRAL)
def test_zero_deltas_are_no_noise(name: str) -> None:
    assert not merge(name, np.zeros((3, 8, 6))).any()
    deltas = experts(7, 3, 8, 12)
    deltas[1] = 0.0
    actual = merge(name, deltas)
    assert np.isfinite(actual).all() and actual.any()


@pytest.mark.parametrize("name", SPECTRAL)
def test_the_table_says_on_which_sides_a_method_turns_with_the_deltas(name: str) -> None:
    deltas, rng = experts(8, 3, 16, 12), np.random.default_rng(8)
    left, right = (np.linalg.qr(rng.standard_normal((size, size)))[0] for size in (16, 12))
    merged = merge(name, deltas)
    turned = [(merge(name, left @ deltas), left @ merged), (merge(name, deltas @ right), merged @ right)]
    does_turn = [bool(np.linalg.norm(a - b) < 1e-4 * np.linalg.norm(b)) for a, b in turned]
    expected = {"both": [True, True], "left": [True, False], None: [False, False]}
    assert does_turn == expected[METHODS[name].cores]


@pytest.mark.parametrize("name", SPECTRAL)
def test_more_experts_than_directions(name: str) -> None:
    actual = merge(name, experts(8, 5, 3, 7))
    assert np.isfinite(actual).all() and actual.any()


def test_the_declared_memory_grows_with_experts_and_size() -> None:
    assert memory_bytes("tsv_m", 100, 200, 4) > 4 * (3 * 4) * 100 * 200
    assert memory_bytes("tsv_m", 100, 200, 8) > memory_bytes("tsv_m", 100, 200, 4)
    for rows in (20, 100):  # rotations are of 2 * rows directions, or of all columns
        least = memory_bytes("tsv_m", rows, 200, 4) + 8 * (8 * min(200, 2 * rows) ** 2 + 200**2)
        assert memory_bytes("ortho_merge", rows, 200, 4) > least
