"""
The k-th largest of any number of magnitudes, exactly and in bounded memory.

Two rounds count keys, which are the bits of float32 magnitudes: all of them by their upper half, then those in the bin
that holds the k-th largest by their lower half. Counts are integers and add up the same in any order, so the result
does not depend on chunks, threads or processes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_LOW_BITS = 16

Counts = NDArray[np.int64]


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
            counts: Of all keys by the upper half of their bits.
            rank: From 1 to the number of keys.

        Raises:
            ValueError: If there are fewer keys.
        """
        return cls(*_from_the_top(counts, rank))

    def end(self, counts: Counts) -> int:
        """Return the key, from the counts of all keys in the bin by the lower half of their bits."""
        low, _ = _from_the_top(counts, self.rank)
        return self.bin << _LOW_BITS | low


def _from_the_top(counts: Counts, rank: int) -> tuple[int, int]:
    """Return the bin that holds the `rank`-th largest key, and the rank of that key within the bin."""
    above = np.cumsum(counts[::-1])
    if not 1 <= rank <= above[-1]:
        raise ValueError(f"There are {above[-1]} keys, so there is no {rank}-th largest.")
    place = int(np.searchsorted(above, rank))
    before = int(above[place - 1]) if place else 0
    return len(counts) - 1 - place, rank - before
