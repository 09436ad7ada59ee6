"""Spectral methods in float64, as their papers write them, and deltas to merge by them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from hf_frmerge.methods.spectral.decision import RULES
from hf_frmerge.methods.spectral.inputs import Experts, SpectralOptions
from hf_frmerge.methods.table import METHODS

Array = NDArray[np.float64]


def base_of(shape: tuple[int, ...]) -> Array:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32).astype(np.float64)


def merge(
    name: str, deltas: Array, weights: Array | None = None, base: Array | None = None, **options: float
) -> Array:
    chosen = {"density": METHODS[name].density or 1.0, **options}
    equal = np.full(len(deltas), 1 / len(deltas))
    origin = base_of(deltas.shape[1:]) if base is None else base
    experts = Experts(deltas.astype(np.float32), origin.astype(np.float32))
    actual = RULES[name](experts, equal if weights is None else weights, SpectralOptions(**chosen))
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


def tied(deltas: Array, weights: Array, density: float = 0.2, rank: int | None = None) -> Array:
    """TIES on the right factors of a joint SVD of that rank, by default in full, element by element."""
    left, values, right = np.linalg.svd(np.concatenate(list(deltas), axis=1), full_matrices=False)
    left, values, right = left[:, :rank], values[:rank], right[:rank]
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


def voted(deltas: Array, weights: Array, density: float = 0.001) -> Array:
    """DC-Merge of deltas of full rank, with whole matrices and element by element."""
    n = len(deltas)
    rank = min(deltas.shape[1:]) // n
    svds = [np.linalg.svd(delta, full_matrices=False) for delta in deltas]
    left = polar(np.concatenate([u[:, :rank] for u, _, _ in svds], axis=1))
    right = polar(np.concatenate([v[:rank].T for _, _, v in svds], axis=1))
    cut = [n * w * u[:, :rank] @ np.diag(s[:rank]) @ v[:rank] for w, (u, s, v) in zip(weights, svds)]
    aligned = np.stack([left.T @ part @ right for part in cut])
    count = max(rank, int(density * aligned[0].size))
    kept = np.stack([np.where(np.abs(m) >= np.sort(np.abs(m), axis=None)[-count], m, 0.0) for m in aligned])
    merged = np.zeros(aligned[0].shape)
    for row, col in np.ndindex(merged.shape):
        same = [x for x in kept[:, row, col] if x * (1.0 if kept[:, row, col].sum() >= 0 else -1.0) > 0]
        merged[row, col] = np.mean(same) if same and row // rank == col // rank else 0.0
    return left @ merged @ right.T


def covariances(deltas: Array, weights: Array, share: float = 0.3, ridge: float = 1e-5) -> Array:
    """Equations 5 to 19 of ACE-Merging."""
    n, rows, cols = deltas.shape
    factors, identity = n * weights, np.eye(cols)
    centred = [delta - np.ones((rows, 1)) @ delta.mean(axis=0, keepdims=True) for delta in deltas]
    moments = [c.T @ c for c in centred]
    energies = np.array([np.linalg.norm(delta) ** 2 for delta in deltas])
    mean_log = np.average(np.log(energies), weights=weights)
    uneven = np.average((np.log(energies) - mean_log) ** 2, weights=weights) / mean_log**2 > 0.3
    divisors = [np.trace(m) if uneven else 1.0 for m in moments]
    scaled = [m / d for m, d in zip(moments, divisors)]
    regular = [m + ridge / d * identity for m, d in zip(scaled, divisors)]
    prior = np.ones((cols, 1)) @ sum(f * m for f, m in zip(factors, scaled)).mean(axis=0, keepdims=True)
    if uneven:
        prior = prior / np.average(energies, weights=weights)
    pull = sum(f * c @ m for f, c, m in zip(factors, centred, regular))
    merged = pull @ np.linalg.inv(sum(f * m for f, m in zip(factors, regular)) + prior)
    if uneven:
        mean = np.average(regular, axis=0, weights=weights)
        fused = merged + sum(f * d @ (m - mean) for f, d, m in zip(factors, deltas, scaled))
        left, values, right = np.linalg.svd(fused, full_matrices=False)
        k = int(share * len(values))
        merged = merged + values[:k].mean() * left[:, :k] @ right[:k]
    return merged


def rotated(deltas: Array, weights: Array) -> Array:
    """OrthoMerge, with the rotations' eigenvalues: the skew matrix of an angle t has those of tan(t / 2)."""
    base = base_of(deltas.shape[1:])
    skews, rests = [], []
    for delta in deltas:
        # What a vanishing multiple of the identity adds decides where the product says nothing.
        left, _, right = np.linalg.svd(base.T @ (base + delta) + 1e-9 * np.eye(base.shape[1]))
        rotation = left @ right
        values, vectors = np.linalg.eig(rotation)
        skews.append((vectors @ np.diag(1j * np.tan(np.angle(values) / 2)) @ np.linalg.inv(vectors)).real)
        rests.append(base + delta - base @ rotation)
    total = np.tensordot(weights, skews, axes=1)
    total *= weights @ [np.linalg.norm(skew) for skew in skews] / np.linalg.norm(total)
    identity = np.eye(len(total))
    rest = len(deltas) * np.tensordot(weights, rests, axes=1)
    return base @ (np.linalg.inv(identity - total) @ (identity + total)) - base + 0.2 * rest


NAIVE: dict[str, Callable[[Array, Array], Array]] = {
    "tsv_m": tsv,
    "iso_c": isotropic,
    "iso_cts": isotropic_with_own,
    "swudi": descended,
    "res_merge": rests_and_heads,
    "knots": tied,
    "dc_merge": voted,
    "ace": covariances,
    "ortho_merge": rotated,
}


def orthogonal_low_rank(n: int = 3) -> Array:
    """Deltas whose singular vectors are all at right angles between experts, each of rank 4."""
    rng = np.random.default_rng(4)
    left, right = (np.linalg.qr(rng.standard_normal((size, 4 * n)))[0] for size in (24, 20))
    values = rng.uniform(1, 2, (n, 4))
    parts = [(left[:, 4 * i : 4 * i + 4] * values[i]) @ right[:, 4 * i : 4 * i + 4].T for i in range(n)]
    return np.stack(parts)
