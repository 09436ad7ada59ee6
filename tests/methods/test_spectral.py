"""Spectral methods against float64 versions with numpy's linear algebra, and against closed forms."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from hf_frmerge.methods.spectral import RULES, SpectralOptions, memory_bytes
from hf_frmerge.methods.table import METHODS

Array = NDArray[np.float64]
SPECTRAL = [method.name for method in METHODS.values() if method.kind == "spectral" and method.n_experts is None]


def merge(name: str, deltas: Array, weights: Array | None = None, **options: float) -> Array:
    chosen = {"density": METHODS[name].density or 1.0, **options}
    equal = np.full(len(deltas), 1 / len(deltas))
    actual = RULES[name](deltas.astype(np.float32), equal if weights is None else weights, SpectralOptions(**chosen))
    assert actual.dtype == np.float32 and actual.shape == deltas.shape[1:]
    return actual.astype(np.float64)


def experts(seed: int, n: int, rows: int, cols: int) -> Array:
    """Deltas with a common part and a decaying spectrum."""
    rng = np.random.default_rng(seed)
    scale = np.exp(-np.arange(min(rows, cols)) / 4)
    common = rng.standard_normal((rows, cols))
    actual = []
    for _ in range(n):
        left, _, right = np.linalg.svd(0.5 * common + rng.standard_normal((rows, cols)), full_matrices=False)
        actual.append((left * scale * rng.uniform(0.5, 2)) @ right * 0.01)
    return np.stack(actual)


def polar(matrix: Array) -> Array:
    """M (M^T M)^(-1/2), by the eigenvalues of M^T M or M M^T."""
    if matrix.shape[0] < matrix.shape[1]:
        return polar(matrix.T).T
    values, vectors = np.linalg.eigh(matrix.T @ matrix)
    return matrix @ (vectors / np.sqrt(values)) @ vectors.T


def tsv(deltas: Array, weights: Array) -> Array:
    n = len(deltas)
    rank = min(deltas.shape[1:]) // n
    svds = [np.linalg.svd(delta, full_matrices=False) for delta in deltas]
    left = polar(np.concatenate([u[:, :rank] for u, _, _ in svds], axis=1))
    right = polar(np.concatenate([v[:rank].T for _, _, v in svds], axis=1))
    values = np.concatenate([n * w * s[:rank] for w, (_, s, _) in zip(weights, svds)])
    return left @ np.diag(values) @ right.T


def isotropic(deltas: Array, weights: Array) -> Array:
    left, values, right = np.linalg.svd(len(deltas) * np.tensordot(weights, deltas, axes=1), full_matrices=False)
    return values.mean() * left @ right


def isotropic_with_own(deltas: Array, weights: Array, share: float = 0.8) -> Array:
    n, rank = len(deltas), min(deltas.shape[1:])
    left, values, right = np.linalg.svd(n * np.tensordot(weights, deltas, axes=1), full_matrices=False)
    each = round((rank - int(share * rank)) / n)
    common = rank - n * each
    lefts, sizes, rights = [left[:, :common]], [values[:common]], [right[:common].T]
    for weight, delta in zip(weights, deltas):
        u, s, v = np.linalg.svd(delta - left[:, :common] @ left[:, :common].T @ delta)
        lefts.append(u[:, :each])
        sizes.append(n * weight * s[:each])
        rights.append(v[:each].T)
    return (
        np.concatenate(sizes).mean() * polar(np.concatenate(lefts, axis=1)) @ polar(np.concatenate(rights, axis=1)).T
    )


def descended(deltas: Array, weights: Array, steps: float = 300.0, cuts: int = 200_000) -> Array:
    """Gradient descent in small steps on half of WUDI's objective, all directions moved."""
    factors = len(deltas) * weights / np.array([np.linalg.norm(delta) ** 2 for delta in deltas])
    grams = [factor * delta.T @ delta for factor, delta in zip(factors, deltas)]
    total, pull = sum(grams), sum(delta @ gram for delta, gram in zip(deltas, grams))
    merged = len(deltas) * np.tensordot(weights, deltas, axes=1)
    for _ in range(cuts):
        merged = merged - steps / cuts * (merged @ total - pull)
    return merged


def rests_and_heads(deltas: Array, weights: Array) -> Array:
    """The formulas of ResMerge, pair by pair."""
    n = len(deltas)
    heads, rests = [], []
    for delta in deltas:
        u, s, v = np.linalg.svd(delta, full_matrices=False)
        heads.append(s[0] * np.outer(u[:, 0], v[0]))
        rests.append(delta - heads[-1])

    def cosine(a: Array, b: Array) -> float:
        return float(np.sum(a * b) / np.linalg.norm(a) / np.linalg.norm(b))

    direction = sum(w * r / np.linalg.norm(r) for w, r in zip(weights, rests))
    coherence = sum(w * cosine(r, direction) for w, r in zip(weights, rests))
    pairs = [(i, j) for i in range(n) for j in range(i)]
    agreement = np.mean([cosine(rests[i], rests[j]) for i, j in pairs])
    if coherence <= 1 / np.sqrt(n):
        merged = sum(w * r for w, r in zip(weights, rests))
    else:
        beta = 1 - 0.3 * np.mean([(agreement + 1) / 2, (coherence + 1) / 2])
        size = coherence**beta * sum(w * np.linalg.norm(r) for w, r in zip(weights, rests))
        merged = size * direction / np.linalg.norm(direction)
    head = sum(w * h for w, h in zip(weights, heads))
    shared = np.mean([max(0.0, cosine(heads[i], heads[j])) for i, j in pairs])
    return merged + 0.2 * shared * np.linalg.norm(merged) * head / np.linalg.norm(head)


def tied(deltas: Array, weights: Array, density: float = 0.2) -> Array:
    """TIES on the rights factors of a joint SVD, element by element."""
    left, values, right = np.linalg.svd(np.concatenate(list(deltas), axis=1), full_matrices=False)
    parts = np.split(right, len(deltas), axis=1)
    count = int(density * parts[0].size)
    kept = np.stack([np.where(np.abs(part) >= np.sort(np.abs(part), axis=None)[-count], part, 0.0) for part in parts])
    merged = np.zeros(parts[0].shape)
    for index in np.ndindex(merged.shape):
        column = kept[(slice(None), *index)]
        sign = 1.0 if weights @ column >= 0 else -1.0
        same = column * sign > 0
        merged[index] = (weights[same] @ column[same]) / weights[same].sum() if same.any() else 0.0
    return left @ np.diag(values) @ merged


NAIVE: dict[str, Callable[[Array, Array], Array]] = {
    "tsv_m": tsv,
    "iso_c": isotropic,
    "iso_cts": isotropic_with_own,
    "swudi": descended,
    "res_merge": rests_and_heads,
    "knots": tied,
}


@pytest.mark.parametrize("shape", [(24, 16), (16, 24), (20, 20)])
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
    expected = 5.0 * left @ merge(name, deltas) @ right if name != "swudi" else left @ merge(name, deltas) @ right
    actual = merge(name, (5.0 if name != "swudi" else 1.0) * left @ deltas @ right)
    assert np.linalg.norm(actual - expected) < 1e-3 * np.linalg.norm(expected)


@pytest.mark.parametrize("name", SPECTRAL)
def test_the_order_of_experts_does_not_matter(name: str) -> None:
    deltas, weights = experts(3, 3, 12, 16), np.array([0.2, 0.5, 0.3])
    order = [2, 0, 1]
    actual, turned = merge(name, deltas, weights), merge(name, deltas[order], weights[order])
    assert np.linalg.norm(actual - turned) < 1e-4 * np.linalg.norm(actual)


def orthogonal_low_rank(n: int = 3) -> Array:
    """Deltas whose singular vectors are all at right angles between experts, each of rank 4."""
    rng = np.random.default_rng(4)
    left, right = (np.linalg.qr(rng.standard_normal((size, 4 * n)))[0] for size in (24, 20))
    values = rng.uniform(1, 2, (n, 4))
    parts = [(left[:, 4 * i : 4 * i + 4] * values[i]) @ right[:, 4 * i : 4 * i + 4].T for i in range(n)]
    return np.stack(parts)


def test_low_rank_deltas_at_right_angles_are_added_by_tsv() -> None:
    deltas = orthogonal_low_rank()
    np.testing.assert_allclose(merge("tsv_m", deltas), deltas.sum(axis=0), atol=1e-5)


@pytest.mark.parametrize("name", ["iso_c", "iso_cts"])
def test_isotropic_merges_have_one_singular_value_also_of_low_rank_deltas(name: str) -> None:
    deltas = orthogonal_low_rank()
    values = np.linalg.svd(merge(name, deltas), compute_uv=False)
    np.testing.assert_allclose(values[:12], np.linalg.svd(deltas.sum(axis=0), compute_uv=False)[:12].mean(), rtol=1e-4)
    assert values[12:].max() < 1e-4


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
def test_more_experts_than_directions(name: str) -> None:
    actual = merge(name, experts(8, 5, 3, 7))
    assert np.isfinite(actual).all() and actual.any()


def test_the_declared_memory_grows_with_experts_and_size() -> None:
    assert memory_bytes(100, 200, 4) > 4 * (3 * 4) * 100 * 200
    assert memory_bytes(100, 200, 8) > memory_bytes(100, 200, 4)
