"""
Merges that decide about every element by itself: what is kept of each delta, and how what is kept is joined.

A delta is the difference of an expert to the base. This module has the descriptions, which are what a merge records,
and the arithmetic in numpy; native_elements.h, native_ranks.h and native_counting.h do the same with the same bits.
Every element is computed in float64 from its own deltas, in the order of the experts, so no bit depends on how a
tensor is cut into runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest

# Shape suffixes: N = experts, D = elements, S = streams of keys that are counted, P = bins that are looked into.

Join = Literal["sum", "elect", "mean"]
"""
How the kept elements of all experts become one, with `w` the weights:

    sum    N * sum_i w_i k_i
    mean   sum_i w_i k_i / sum_i w_i over the experts that kept the element, 0 if none did
    elect  the same over those whose sign is that of sum_i w_i k_i (positive if that is 0)
"""

Stream = Literal["magnitudes", "spread"]
"""What is counted: the magnitude of each expert's delta, or the spread of all experts' deltas, which is one stream."""

_LOW_BITS = 16
HIGH_BINS = 1 << 15  # values of the upper half of a float32 without its sign bit
LOW_BINS = 1 << _LOW_BITS
_INFINITE = 0x7F80  # upper half of infinity; NaN comes after it

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
SUM_RUN = 512
"""Elements whose squares are added in a tree before these sums are added up one after the other."""


@dataclass(frozen=True)
class Band:
    """
    Keep elements by their magnitude.

    Attributes:
        lower: smallest magnitude of each expert that is kept; float32 values, compared with `|delta|` in float32.
        upper: largest one, if there is a limit.
    """

    lower: tuple[float, ...]
    upper: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Dropout:
    """Keep each element with probability `density`, and divide it by that; see `uniforms` for the random numbers."""

    seed: int
    density: float


@dataclass(frozen=True)
class RankedDropout:
    """
    Keep each element with a probability that grows with its rank in its row, and divide it by that.

    The probability runs from `density - epsilon` for the smallest magnitude to `density + epsilon` for the largest;
    equal magnitudes rank by position. In a row of one element it is `density`.
    """

    seed: int
    density: float
    epsilon: float


@dataclass(frozen=True)
class Spread:
    """Keep the elements of all experts where the variance over the experts, in float32, is at least `threshold`."""

    threshold: float


@dataclass(frozen=True)
class Agreement:
    """
    Keep the elements of all experts where at least `n_experts` of them agree with the sum of all.

    With `t_i = N w_i delta_i` and `T` their sum, expert i agrees where `|t_i| > ratio * |T - t_i|`.
    """

    ratio: float
    n_experts: int


Keep = Band | Dropout | RankedDropout | Spread | Agreement

KEEPS: dict[str, type[Keep]] = {
    "band": Band,
    "dropout": Dropout,
    "ranked_dropout": RankedDropout,
    "spread": Spread,
    "agreement": Agreement,
}
"""Name in a record -> what is kept."""


@dataclass(frozen=True)
class Elementwise:
    """
    Decision of a sparse method.

    Attributes:
        keep: which elements of each delta are kept.
        join: how they are joined; see `Join`.
        weights: weights of the experts.
        scale: factor of the merged delta.
        votes: weights of the experts when a sign is elected, if these are others than in the mean.
    """

    keep: Keep
    join: Join
    weights: tuple[float, ...]
    scale: float
    votes: tuple[float, ...] | None = None

    @property
    def factor(self) -> float:
        """What the weighted sum or mean of the kept elements is multiplied with."""
        return self.scale * len(self.weights) if self.join == "sum" else self.scale

    def to_journal(self) -> dict[str, Any]:
        """Return JSON values, from which every number can be read back exactly."""
        [kind] = [name for name, keep in KEEPS.items() if isinstance(self.keep, keep)]
        values = {**vars(self), "keep": {"kind": kind, **vars(self.keep)}}
        if self.votes is None:
            del values["votes"]
        return values


class Run(NamedTuple):
    """
    Where elements lie: in which tensor, from which element on, and how many of these make a row.

    For `RankedDropout` a run must be whole rows.
    """

    tensor: str
    start: int
    row_len: int


def merge_deltas(
    base_D: NDArray[np.float64], deltas_ND: NDArray[np.float64], decision: Elementwise, run: Run
) -> NDArray[np.float64]:
    """
    Return the base plus the merged deltas.

    Args:
        base_D: float64.
        deltas_ND: Differences to the base, float64; overwritten.
        decision: What is kept, and how it is joined.
        run: Where the elements lie.
    """
    weights_N = np.array(decision.weights)
    with np.errstate(over="ignore", invalid="ignore"):  # the caller looks at deltas and result
        _select(deltas_ND, decision.keep, weights_N, run)
        votes_N = weights_N if decision.votes is None else np.array(decision.votes)
        return base_D + decision.factor * _join(deltas_ND, decision.join, weights_N, votes_N)


def _select(deltas_ND: NDArray[np.float64], keep: Keep, weights_N: NDArray[np.float64], run: Run) -> None:
    """Set what is not kept to zero, in place; rescale what a random choice kept."""
    if isinstance(keep, Band):
        sizes_ND = np.abs(deltas_ND.astype(np.float32))
        dropped_ND = sizes_ND < np.array(keep.lower, np.float32)[:, None]
        if keep.upper is not None:
            dropped_ND |= sizes_ND > np.array(keep.upper, np.float32)[:, None]
        deltas_ND[dropped_ND] = 0.0
    elif isinstance(keep, Spread):
        deltas_ND[:, spread_of(deltas_ND) < np.float32(keep.threshold)] = 0.0
    elif isinstance(keep, Agreement):
        deltas_ND[:, _agreeing(deltas_ND, keep.ratio, weights_N) < keep.n_experts] = 0.0
    else:
        for expert, delta_D in enumerate(deltas_ND):
            draw_D = uniforms(key_of(keep.seed, expert, run.tensor), run.start, delta_D.size)
            if isinstance(keep, Dropout):
                np.multiply(delta_D, 1.0 / keep.density, out=delta_D)
                delta_D[draw_D >= keep.density] = 0.0
            else:
                share_D = _ranked_shares(delta_D, keep, run.row_len)
                np.divide(delta_D, share_D, out=delta_D)
                delta_D[draw_D >= share_D] = 0.0


def _join(
    kept_ND: NDArray[np.float64], join: Join, weights_N: NDArray[np.float64], votes_N: NDArray[np.float64]
) -> NDArray[np.float64]:
    total_D, term_D = np.zeros(kept_ND.shape[1]), np.empty(kept_ND.shape[1])
    for weight, kept_D in zip(votes_N if join == "elect" else weights_N, kept_ND):
        total_D += np.multiply(kept_D, weight, out=term_D)
    if join == "sum":
        return total_D
    share_D = np.zeros_like(total_D)
    if join == "mean":
        for weight, kept_D in zip(weights_N, kept_ND):
            share_D += np.multiply(kept_D != 0, weight, out=term_D)
    else:
        # Second loop over the experts: only now is the elected sign known.
        elected_D = np.where(total_D >= 0, 1.0, -1.0)
        total_D = np.zeros_like(total_D)
        for weight, kept_D in zip(weights_N, kept_ND):
            agrees_D = np.multiply(kept_D, elected_D, out=term_D) > 0
            total_D += np.multiply(np.multiply(kept_D, agrees_D, out=term_D), weight, out=term_D)
            share_D += np.multiply(agrees_D, weight, out=term_D)
    return np.divide(total_D, share_D, out=np.zeros_like(total_D), where=share_D > 0)


def spread_of(deltas_ND: NDArray[np.float64]) -> NDArray[np.float32]:
    """Return the variance over the experts, divided by N, of every element, in float32."""
    n_experts = len(deltas_ND)
    mean_D = np.zeros(deltas_ND.shape[1])
    for delta_D in deltas_ND:
        mean_D += delta_D
    mean_D /= n_experts
    total_D = np.zeros_like(mean_D)
    for delta_D in deltas_ND:
        away_D = delta_D - mean_D
        total_D += away_D * away_D
    return (total_D / n_experts).astype(np.float32)


def _agreeing(deltas_ND: NDArray[np.float64], ratio: float, weights_N: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return how many experts agree with the sum of all, for every element."""
    parts_ND = (len(deltas_ND) * weights_N)[:, None] * deltas_ND
    total_D = np.zeros(deltas_ND.shape[1])
    for part_D in parts_ND:
        total_D += part_D
    return np.count_nonzero(np.abs(parts_ND) > ratio * np.abs(total_D - parts_ND), axis=0)


def _ranked_shares(delta_D: NDArray[np.float64], keep: RankedDropout, row_len: int) -> NDArray[np.float64]:
    """Return the probability of every element of whole rows."""
    if row_len == 1:
        return np.full(delta_D.size, keep.density)
    sizes_RC = np.abs(delta_D.astype(np.float32)).reshape(-1, row_len)
    order_RC = np.argsort(sizes_RC, axis=1, kind="stable")
    rank_RC = np.empty(order_RC.shape)
    np.put_along_axis(rank_RC, order_RC, np.arange(row_len, dtype=np.float64), axis=1)
    return ((keep.density - keep.epsilon) + rank_RC / (row_len - 1) * (2.0 * keep.epsilon)).ravel()


# --- random numbers


def key_of(seed: int, expert: int, tensor: str) -> int:
    """Return the key of the random numbers for one expert's tensor, 64 bits."""
    return xxh3_64_intdigest(f"{seed}\0{expert}\0{tensor}".encode())


def uniforms(key: int, start: int, count: int) -> NDArray[np.float64]:
    """
    Return `count` uniform random numbers in [0, 1), multiples of 2^-32, for the elements of a tensor from `start` on.

    They follow from key and position alone: SplitMix64 (Steele, Lea and Flood 2014) is a counter that is mixed, here
    with the key added to it; a number of 64 bits serves two elements, the lower half first.
    """
    first = start // 2
    counter = np.arange(first + 1, (start + count + 1) // 2 + 1, dtype=np.uint64)
    mixed = np.uint64(key) + counter * _GOLDEN
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    halves = mixed.astype("<u8", copy=False).view("<u4")[start - 2 * first :][:count]
    return halves * 2.0**-32


# --- measurements


def magnitude_keys(values: NDArray[np.floating]) -> NDArray[np.uint32]:
    """
    Return integers that sort like magnitudes: the bits of `|value|` as float32.

    The bits of non-negative floats, read as integers, are in the order of the floats. Zero has the key 0.
    """
    return np.abs(values.astype(np.float32, copy=False)).view(np.uint32)


def value_of(key: int) -> float:
    """Return the magnitude that has a key."""
    return float(np.array([key], np.uint32).view(np.float32)[0])


def count_keys(deltas_ND: NDArray[np.float64], stream: Stream, bins_SP: NDArray[np.int64] | None) -> NDArray[np.int64]:
    """
    Count keys: of all elements by the upper half of their bits, or of those in some bins by the lower half.

    Args:
        deltas_ND: Differences to the base, float64.
        stream: What the keys are of.
        bins_SP: Upper halves to look into, P for each stream; by default the upper halves themselves are counted.

    Returns:
        `(S, HIGH_BINS)`, or `(S, P, LOW_BINS)` with `bins_SP`. Counts of parts add up to those of the whole.
    """
    keys_SD = magnitude_keys(deltas_ND if stream == "magnitudes" else spread_of(deltas_ND)[None])
    if bins_SP is None:
        return np.stack([np.bincount(keys_D >> _LOW_BITS, minlength=HIGH_BINS) for keys_D in keys_SD])
    return np.stack(
        [
            np.stack(
                [np.bincount(keys_D[keys_D >> _LOW_BITS == b] & (LOW_BINS - 1), minlength=LOW_BINS) for b in bins_P]
            )
            for keys_D, bins_P in zip(keys_SD, bins_SP)
        ]
    )


def has_nonfinite(counts_SB: NDArray[np.int64]) -> bool:
    """Whether any key that `count_keys` counted by its upper half is that of infinity or NaN."""
    return bool(counts_SB[:, _INFINITE:].any())


def add_energies(total_N: NDArray[np.float64], deltas_ND: NDArray[np.float64], threshold: float) -> None:
    """
    Add the squares of the elements whose spread is at least `threshold`, in place.

    Squares of `SUM_RUN` elements are added in a tree, and the sums one after the other: parts of a multiple of that
    size, in order, give the same bits as the whole.
    """
    kept_ND = np.where(spread_of(deltas_ND) >= np.float32(threshold), deltas_ND, 0.0)
    n_experts, size = kept_ND.shape
    squares = np.zeros((n_experts, -(-size // SUM_RUN) * SUM_RUN))
    squares[:, :size] = kept_ND * kept_ND
    tree = squares.reshape(n_experts, -1, SUM_RUN)
    width = SUM_RUN
    while width > 1:
        width //= 2
        tree = tree[..., :width] + tree[..., width:]
    for run_N in tree[..., 0].T:
        total_N += run_N
