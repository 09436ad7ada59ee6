"""The sparse methods in float64, element by element and from a full sort; no code is shared with the package."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest

Array = NDArray[np.float64]
DEFAULTS = {"ties": 0.2, "dare_linear": 0.8, "dare_ties": 0.8, "della": 0.7}
DEFAULTS |= {"breadcrumbs": 0.1, "sce": 0.1, "localize_and_stitch": 0.1, "consensus": 1.0, "ram": 1.0}


def splitmix64(state: int) -> int:
    """The output function of SplitMix64, in Python's integers."""
    mask = (1 << 64) - 1
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & mask
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB & mask
    return state ^ (state >> 31)


def draws(seed: int, expert: int, tensor: str, start: int, count: int) -> Array:
    """Random numbers for elements `start` to `start + count`: 32 bits of the generator's number `position // 2`."""
    key = xxh3_64_intdigest(f"{seed}\0{expert}\0{tensor}".encode())
    numbers = []
    for position in range(start, start + count):
        state = (key + (position // 2 + 1) * 0x9E3779B97F4A7C15) & ((1 << 64) - 1)
        numbers.append((splitmix64(state) >> 32 * (position % 2) & 0xFFFFFFFF) / 2**32)
    return np.array(numbers)


def sizes_of(deltas: Array) -> NDArray[np.float32]:
    """Magnitudes as they are compared."""
    return np.abs(deltas.astype(np.float32))


def vote(kept: Array, weights: Array, votes: Array | None = None) -> Array:
    """Mean of the elements that have the sign of the weighted sum, one element after the other."""
    merged = np.zeros(kept.shape[1])
    for j, column in enumerate(kept.T):
        sign = 1.0 if sum(w * x for w, x in zip(weights if votes is None else votes, column)) >= 0 else -1.0
        same = [(w, x) for w, x in zip(weights, column) if x * sign > 0]
        total = sum(w for w, _ in same)
        merged[j] = sum(w * x for w, x in same) / total if total else 0.0
    return merged


def mean(kept: Array, weights: Array) -> Array:
    """Mean over the elements that are not zero."""
    share = (weights[:, None] * (kept != 0)).sum(axis=0)
    return np.divide((weights[:, None] * kept).sum(axis=0), share, out=np.zeros_like(share), where=share > 0)


def largest(deltas: Array, density: float) -> Array:
    """Keep of each row the share of largest elements, and those equal to the smallest of them."""
    kept = max(1, int(density * deltas.shape[1]))
    sizes = sizes_of(deltas)
    return np.where(sizes >= np.sort(sizes, axis=1)[:, -kept, None], deltas, 0.0)


def middle(deltas: Array, density: float, gamma: float) -> Array:
    """Drop of each row the largest elements, and all that are not among the next largest."""
    n = deltas.shape[1]
    target = max(1, int(density * n))
    smallest = max(0, n - target - int(gamma * n))
    ordered = np.sort(sizes_of(deltas), axis=1)
    low, high = ordered[:, smallest, None], ordered[:, smallest + target - 1, None]
    return np.where((sizes_of(deltas) >= low) & (sizes_of(deltas) <= high), deltas, 0.0)


def chances(delta: Array, row_len: int, density: float, epsilon: float) -> Array:
    """Chance of every element to stay, by its rank in its row."""
    if row_len == 1:
        return np.full(delta.size, density)
    rows = []
    for row in sizes_of(delta).reshape(-1, row_len):
        rank = {k: r for r, k in enumerate(sorted(range(row_len), key=lambda k: (row[k], k)))}
        rows += [density - epsilon + rank[k] / (row_len - 1) * 2 * epsilon for k in range(row_len)]
    return np.array(rows)


def naive(
    method: str,
    deltas: Array,
    weights: Sequence[float],
    places: Sequence[tuple[str, int, int]],
    **options: Any,
) -> Array:
    """
    Merged delta of a group `(N, D)`.

    Args:
        places: Name, size and row length of the tensors of the group, in the order in which `deltas` has them.
    """
    factors = np.array(weights)  # of the methods that add
    share = factors / factors.sum()
    scale, seed = options.get("scale", 1.0), options.get("seed", 42)
    density = options.get("density", DEFAULTS[method])
    drawn = np.stack(
        [np.concatenate([draws(seed, i, name, 0, size) for name, size, _ in places]) for i in range(len(deltas))]
    )
    if method == "ties":
        return scale * vote(largest(deltas, density), share)
    if method == "localize_and_stitch":
        return scale * mean(largest(deltas, density), share)
    if method == "breadcrumbs":
        return scale * (factors @ middle(deltas, density, options.get("gamma", 0.01)))
    if method in ("dare_linear", "dare_ties"):
        kept = np.where(drawn < density, deltas / density, 0.0)
        return scale * (factors @ kept if method == "dare_linear" else vote(kept, share))
    if method == "della":
        epsilon, ends = options.get("epsilon", 0.07), np.cumsum([size for _, size, _ in places])[:-1]
        chance = np.stack(
            [
                np.concatenate(
                    [chances(x, row, density, epsilon) for x, (_, _, row) in zip(np.split(delta, ends), places)]
                )
                for delta in deltas
            ]
        )
        return scale * vote(np.where(drawn < chance, deltas / chance, 0.0), share)
    if method == "sce":
        variance = deltas.var(axis=0).astype(np.float32)
        differing = np.sort(variance[variance > 0])
        kept = deltas
        if differing.size:
            kept = np.where(variance >= differing[-max(1, int(density * differing.size))], deltas, 0.0)
        energy = share * (kept**2).sum(axis=1)
        return scale * vote(kept, energy / energy.sum() if energy.sum() else share, share)
    if method == "consensus":
        parts = factors[:, None] * deltas
        agree = np.abs(parts) > options.get("agreement", 0.2) * np.abs(parts.sum(axis=0) - parts)
        return scale * np.where(agree.sum(axis=0) >= 2, parts.sum(axis=0), 0.0)
    assert method == "ram"
    return scale * mean(np.where(sizes_of(deltas) > np.float32(options.get("min_change", 1e-5)), deltas, 0.0), share)
