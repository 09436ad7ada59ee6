"""Low-rank deltas of the experts of one tensor: their factors, read once, and their rows, formed piece by piece."""

# Shape suffixes: B = blocks, N = experts.

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from xxhash import xxh3_128_hexdigest

from hf_frmerge.geometry.lowrank import Factors
from hf_frmerge.kernels.interface import Operand
from hf_frmerge.kernels.product import product

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hf_frmerge.checkpoints.adapters.factors import LowRankDelta
    from hf_frmerge.merging.planning.blocks import Piece


class DeltaFactors(NamedTuple):
    """Factors of a delta, `left @ right`, and the digest of both."""

    left: NDArray[np.float32]
    right: NDArray[np.float32]
    digest: str


@dataclass(frozen=True, eq=False)
class LowRankDeltas(Mapping[int, "LowRankDelta"]):
    """
    Low-rank deltas of one tensor by the index of their expert.

    Attributes:
        by_expert: expert index -> its delta.
        cols: elements of a row; deltas are computed by whole rows.
    """

    by_expert: Mapping[int, LowRankDelta]
    cols: int
    _factors: dict[int, DeltaFactors] = field(default_factory=dict, repr=False)

    def __getitem__(self, index: int) -> LowRankDelta:
        return self.by_expert[index]

    def __iter__(self) -> Iterator[int]:
        return iter(self.by_expert)

    def __len__(self) -> int:
        return len(self.by_expert)

    def factors(self, index: int) -> DeltaFactors:
        """Return the factors of an expert's delta."""
        # Not locked: two threads may read the same factors at once, and get the same result.
        if index not in self._factors:
            left, right = self.by_expert[index].factors()
            self._factors[index] = DeltaFactors(left, right, xxh3_128_hexdigest(left.tobytes() + right.tobytes()))
        return self._factors[index]

    def delta(self, index: int, piece: Piece) -> Operand:
        """Return the elements of an expert's delta."""
        left, right, _ = self.factors(index)
        rows = slice(piece.start // self.cols, -(-piece.stop // self.cols))
        return self._elements(product(left[rows], right), piece)

    def weighted_sum(self, piece: Piece, coefficients_BN: NDArray[np.float64]) -> Operand:
        """Return the sum of the deltas, times their coefficients, as one product of stacked factors."""
        first_row = piece.start // self.cols
        rows = np.arange(first_row, -(-piece.stop // self.cols))
        # Which block of the piece every row lies in; if the piece is a part of one block, it is block 0 for all.
        rows_per_block = max(1, piece.block_len // self.cols)
        block_of_row = np.minimum((rows - first_row) // rows_per_block, piece.n_blocks - 1)
        scaled, rights = [], []
        for index in sorted(self.by_expert):
            left, right, _ = self.factors(index)
            scaled.append(left[rows] * coefficients_BN[block_of_row, index, None].astype(np.float32))
            rights.append(right)
        return self._elements(product(np.concatenate(scaled, axis=1), np.concatenate(rights, axis=0)), piece)

    def all_factors(self, n_experts: int) -> list[Factors]:
        """Return the factors of every expert's delta, unscaled; those of experts without one have rank 0."""
        found = {index: self.by_expert[index].oriented() for index in sorted(self.by_expert)}
        rows = len(found[min(found)].B)
        none = Factors(np.zeros((rows, 0)), np.zeros((0, self.cols)))
        return [found.get(index, none) for index in range(n_experts)]

    def _elements(self, rows: NDArray[np.float32], piece: Piece) -> Operand:
        """Return the elements of a piece, which may begin and end within a row, from whole rows of a delta."""
        offset = piece.start % self.cols
        flat = np.ascontiguousarray(rows, dtype=np.float32).reshape(-1)[offset : offset + piece.stop - piece.start]
        return Operand(np.ascontiguousarray(flat).view(np.uint8), "F32", is_delta=True)
