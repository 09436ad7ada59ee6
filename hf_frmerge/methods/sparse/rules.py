"""
The sparse methods: what each measures of a group of tensors, and what it decides.

A method that measures is a generator. It yields what it wants to know, is sent the answer for the whole group, and
returns its decision; a method that measures nothing is a function. `methods.table` lists them under their names.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hf_frmerge.kernels.elementwise import (
    Agreement,
    Band,
    Dropout,
    Elementwise,
    RankedDropout,
    Spread,
    Stream,
    magnitude_keys,
    value_of,
)
from hf_frmerge.methods.sparse.search import Search, n_kept

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hf_frmerge.kernels.interface import Kernels, Operand


@dataclass(frozen=True)
class SparseOptions:
    """
    Options of the sparse methods; every method says which it uses.

    Args:
        weights: Of the experts, summing to 1; of methods that add, factors of their deltas.
        scale: Factor of the merged delta.
        density: Share of the elements that is kept.
        gamma: Share of the largest elements that `breadcrumbs` drops.
        epsilon: How far `della` goes from `density` for the smallest and the largest elements of a row.
        agreement: Share of the others' sum that an expert's element must exceed in `consensus`.
        min_change: Magnitude above which `ram` takes an element for changed.
        seed: Of the random choices.
    """

    weights: tuple[float, ...]
    scale: float = 1.0
    density: float = 1.0
    gamma: float = 0.01
    epsilon: float = 0.07
    agreement: float = 0.2
    min_change: float = 1e-5
    seed: int = 42

    @property
    def shares(self) -> tuple[float, ...]:
        """Factors of deltas as an `Elementwise` sum has them, which multiplies by the number of experts."""
        return tuple(weight / len(self.weights) for weight in self.weights)


@dataclass(frozen=True)
class CountKeys:
    """Wish for counts of keys, which add up over the pieces of a group; see `Kernels.count_keys`."""

    stream: Stream
    bins: NDArray[np.int64] | None = None

    def measure(self, kernels: Kernels, operands: Sequence[Operand]) -> NDArray[np.int64]:
        """Count the keys of one piece."""
        return kernels.count_keys(operands, self.stream, self.bins)


@dataclass(frozen=True)
class Energies:
    """Wish for the sums of squares of every expert's elements whose spread is at least `threshold`."""

    threshold: float

    def measure(self, kernels: Kernels, operands: Sequence[Operand]) -> NDArray[np.float64]:
        """Add up the squares of one piece."""
        return kernels.energies(operands, self.threshold)


Wish = CountKeys | Energies
Measuring = Generator[Wish, NDArray[Any], Elementwise]


def ties(options: SparseOptions) -> Measuring:
    r"""
    Trim, elect, merge (arXiv 2306.01708): the `density` share of largest elements of each delta, a vote on the sign,
    and the mean of those that have it.

    The elected sign is that of \(\sum_i w_i k_i\), positive where that is 0. Elements equal to the threshold are kept,
    as in the paper's code; with a base in bfloat16 there are many.
    """
    lower = yield from _largest(options)
    return Elementwise(Band(lower), "elect", options.weights, options.scale)


def localize_and_stitch(options: SparseOptions) -> Measuring:
    """
    Localize-and-Stitch without data (arXiv 2408.13656): the `density` share of largest elements of each delta,
    averaged where those of several experts overlap. It is TIES without the vote.
    """
    lower = yield from _largest(options)
    return Elementwise(Band(lower), "mean", options.weights, options.scale)


def breadcrumbs(options: SparseOptions) -> Measuring:
    """
    Model Breadcrumbs (arXiv 2312.06795): of each delta drop the `gamma` share of largest elements, keep the `density`
    share that follows, and add up.

    If fewer than these remain, fewer large ones are dropped, so that `density` holds, as in mergekit.
    """
    counts = yield CountKeys("magnitudes")
    searches = []
    for counts_B in counts:
        total = int(counts_B.sum())
        kept = n_kept(total, options.density)
        first = min(int(options.gamma * total), total - kept)  # that many are larger than all that is kept
        searches.append([Search.begin(counts_B, rank) for rank in (first + kept, first + 1)])
    low = yield CountKeys("magnitudes", np.array([[search.bin for search in pair] for pair in searches]))
    ends = [
        [value_of(search.end(found)) for search, found in zip(pair, low_PB)] for pair, low_PB in zip(searches, low)
    ]
    band = Band(tuple(lower for lower, _ in ends), tuple(upper for _, upper in ends))
    return Elementwise(band, "sum", options.shares, options.scale)


def sce(options: SparseOptions) -> Measuring:
    r"""
    Select, calculate, erase (arXiv 2408.07990): where the experts differ most, average those on the winning side.

    Selected is the `density` share of the elements with the largest variance over the experts, among those where they
    differ at all; if they differ nowhere, everything. Signs are elected as in TIES; in the mean, the weight of an
    expert is its share of \(\sum_j w_j |k_j|^2\) over the selected elements.
    """
    [counts_B] = yield CountKeys("spread")
    differing = counts_B.copy()
    differing[0] = 0  # below 2^-133, which is zero or as good as that
    threshold = 0.0
    if differing.any():
        search = Search.begin(differing, n_kept(int(differing.sum()), options.density))
        [[low_B]] = yield CountKeys("spread", np.array([[search.bin]]))
        threshold = value_of(search.end(low_B))
    energies = yield Energies(threshold)
    shares = np.array(options.weights) * energies
    total = float(sum(shares.tolist()))
    weights = tuple((shares / total).tolist()) if total > 0 else options.weights
    return Elementwise(Spread(threshold), "elect", weights, options.scale, votes=options.weights)


def dare_linear(options: SparseOptions) -> Elementwise:
    """
    DARE (arXiv 2311.03099): drop elements at random, divide what is left by the `density` that is kept, and add up as
    task arithmetic does. On average over the seeds it is task arithmetic.
    """
    return Elementwise(Dropout(options.seed, options.density), "sum", options.shares, options.scale)


def dare_ties(options: SparseOptions) -> Elementwise:
    """DARE in place of the trimming of TIES: drop at random and rescale, elect a sign, average those that have it."""
    return Elementwise(Dropout(options.seed, options.density), "elect", options.weights, options.scale)


def della(options: SparseOptions) -> Elementwise:
    """
    DELLA (arXiv 2406.11617): drop elements at random, the smaller of a row the likelier, divide each by its own chance
    to stay, elect a sign, average those that have it.
    """
    keep = RankedDropout(options.seed, options.density, options.epsilon)
    return Elementwise(keep, "elect", options.weights, options.scale)


def consensus(options: SparseOptions) -> Elementwise:
    """
    Consensus task arithmetic (arXiv 2405.07813): add up the deltas where two experts or more have a part in the sum.

    An expert has one where the magnitude of its element exceeds `agreement` times that of the others' sum.
    """
    return Elementwise(Agreement(options.agreement, 2), "sum", options.shares, options.scale)


def ram(options: SparseOptions) -> Elementwise:
    """
    Reinforced Agent Merging (arXiv 2601.13572): elements that several experts changed are averaged over these, and
    those that only one changed stay as they are. Changed is what exceeds `min_change`.
    """
    above = value_of(int(magnitude_keys(np.array([options.min_change]))[0]) + 1)
    return Elementwise(Band((above,) * len(options.weights)), "mean", options.weights, options.scale)


def _largest(options: SparseOptions) -> Generator[Wish, NDArray[Any], tuple[float, ...]]:
    """Find for every expert the smallest magnitude among the `density` share of the largest."""
    counts = yield CountKeys("magnitudes")
    searches = [Search.begin(counts_B, n_kept(int(counts_B.sum()), options.density)) for counts_B in counts]
    low = yield CountKeys("magnitudes", np.array([[search.bin] for search in searches]))
    return tuple(value_of(search.end(low_B)) for search, [low_B] in zip(searches, low))
