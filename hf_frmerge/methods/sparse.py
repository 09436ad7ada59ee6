"""
Methods that keep some elements of the experts' deltas and drop others: TIES (arXiv 2306.01708).

A delta is the difference of an expert to the base. The `density` share of its elements with the largest magnitudes is
kept. The threshold between kept and dropped is found exactly and in bounded memory, by two histograms: one of all
magnitudes by the upper half of their bits, then one, by the lower half, of those in the bin that holds the threshold.
Counts are integers and add up the same in any order, so the result does not depend on chunks, threads or processes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Shape suffixes: N = experts, D = elements.

_LOW_BITS = 16
HIGH_BINS = 1 << 15  # values of the upper half of a float32 without its sign bit
LOW_BINS = 1 << _LOW_BITS

Counts = NDArray[np.int64]


def magnitude_keys(deltas: NDArray[np.floating]) -> NDArray[np.uint32]:
    """
    Return integers that sort like the magnitudes of deltas: the bits of `|delta|` as float32.

    The bits of non-negative floats, read as integers, are in the order of the floats.

    Args:
        deltas: Any shape, finite. Magnitudes are rounded to float32 for the comparison only.

    Returns:
        Of the same shape, uint32, below 2^31. Zero has the key 0.
    """
    return np.abs(deltas.astype(np.float32, copy=False)).view(np.uint32)


def n_kept(n_elements: int, density: float) -> int:
    """Return how many of `n_elements` are kept: `density` of them rounded down, but at least one."""
    return min(n_elements, max(1, int(density * n_elements)))


@dataclass(frozen=True)
class Search:
    """
    Search for the `rank`-th largest key, once the upper half of its bits is known.

    Attributes:
        bin: the upper half of the key's bits.
        rank: its rank among the keys of that bin; the largest has rank 1.
    """

    bin: int
    rank: int

    @classmethod
    def begin(cls, counts: Counts, rank: int) -> Search:
        """
        Find the bin of the `rank`-th largest key.

        Args:
            counts: `count_high` of all keys, `(HIGH_BINS,)`.
            rank: From 1 to the number of keys.

        Raises:
            ValueError: If there are fewer keys.
        """
        return cls(*_from_the_top(counts, rank))

    def end(self, counts: Counts) -> int:
        """Return the key, from `count_low` of all keys in the bin, `(LOW_BINS,)`."""
        low, _ = _from_the_top(counts, self.rank)
        return self.bin << _LOW_BITS | low


def count_high(keys: NDArray[np.uint32]) -> Counts:
    """Count keys by the upper half of their bits, `(HIGH_BINS,)`; the counts of parts may be added."""
    return np.bincount(keys >> _LOW_BITS, minlength=HIGH_BINS)


def count_low(keys: NDArray[np.uint32], search: Search) -> Counts:
    """Count the keys in the bin of a search by the lower half of their bits, `(LOW_BINS,)`."""
    inside = keys[keys >> _LOW_BITS == search.bin]
    return np.bincount(inside & (LOW_BINS - 1), minlength=LOW_BINS)


def ties(
    deltas_ND: NDArray[np.float64], thresholds_N: NDArray[np.uint32], weights_N: NDArray[np.float64]
) -> NDArray[np.float64]:
    r"""
    Merge deltas element by element: trim, elect a sign, average the deltas that have it.

    With \(m_i = [\,|\delta_i| \ge t_i]\), the elected sign is that of \(\sum_i w_i m_i \delta_i\) (positive where the
    sum is 0). The result is \(\sum_i w_i \delta_i / \sum_i w_i\) over the kept deltas of that sign, or 0 if there is
    none. Elements equal to the threshold are kept, as in the paper's code; with a base in bf16 there are many.

    Args:
        deltas_ND: Differences to the base, float64.
        thresholds_N: Keys of the smallest magnitudes that stay, as `magnitude_keys` gives them.
        weights_N: Non-negative.

    Returns:
        `(D,)`, float64. Every element is summed over the experts in order, so no bit depends on how `D` is cut.
    """
    # In place where it can be: what takes the time is memory, not arithmetic.
    kept_ND = deltas_ND * (magnitude_keys(deltas_ND) >= thresholds_N[:, None])
    vote_D, term_D = np.zeros(kept_ND.shape[1]), np.empty(kept_ND.shape[1])
    for weight, kept_D in zip(weights_N, kept_ND):
        vote_D += np.multiply(kept_D, weight, out=term_D)
    elected_D = np.where(vote_D >= 0, 1.0, -1.0)
    # Second loop over the experts: only now is the elected sign known, and only deltas that have it are averaged.
    total_D, share_D = np.zeros_like(vote_D), np.zeros_like(vote_D)
    for weight, kept_D in zip(weights_N, kept_ND):
        agrees_D = np.multiply(kept_D, elected_D, out=term_D) > 0
        total_D += np.multiply(np.multiply(kept_D, agrees_D, out=term_D), weight, out=term_D)
        share_D += np.multiply(agrees_D, weight, out=term_D)
    return np.divide(total_D, share_D, out=np.zeros_like(total_D), where=share_D > 0)


def _from_the_top(counts: Counts, rank: int) -> tuple[int, int]:
    """Return the bin that holds the `rank`-th largest key, and the rank of that key within the bin."""
    above = np.cumsum(counts[::-1])
    if not 1 <= rank <= above[-1]:
        raise ValueError(f"There are {above[-1]} keys, so there is no {rank}-th largest.")
    place = int(np.searchsorted(above, rank))
    before = int(above[place - 1]) if place else 0
    return len(counts) - 1 - place, rank - before
