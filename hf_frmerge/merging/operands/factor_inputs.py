"""What the engine reads for one module of adapters that become an adapter: factors, and never a dense delta."""

# Shape suffixes: N = experts.

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from xxhash import xxh3_128

from hf_frmerge.geometry.lowrank import factor_gram
from hf_frmerge.kernels.product import product

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from numpy.typing import NDArray

    from hf_frmerge.checkpoints.adapters.rows import AdapterRow
    from hf_frmerge.checkpoints.tensors.reader import Checkpoint
    from hf_frmerge.kernels.interface import Kernels
    from hf_frmerge.merging.planning.blocks import Piece


@dataclass(frozen=True)
class FactorInputs:
    """
    One module in all adapters. It is one block and one piece; a module that an adapter lacks is its zero delta.

    Attributes:
        row: the factors.
        labels: a name for every expert, for messages.
    """

    row: AdapterRow
    labels: Mapping[int, str]
    has_base = False
    factored = True

    @property
    def n_experts(self) -> int:
        """Adapters, with those that lack the module."""
        return len(self.row.deltas)

    @property
    def files(self) -> set[tuple[Checkpoint, str]]:
        """The files it is read from."""
        return set().union(*(delta.files for delta in self.row.deltas if delta is not None))

    def gram(
        self, kernels: Kernels, piece: Piece, *, precise: bool = False
    ) -> tuple[NDArray[np.float64], dict[int, str]]:
        """
        Return the Gram matrix `(1, N, N)` of the deltas, exact from the factors, and a digest of every adapter's.

        Raises `NonFiniteError` naming the adapter when NaN or infinity was read.
        """
        return factor_gram(self.row.factors(), product)[None], self.digests(piece)

    def digests(self, piece: Piece) -> dict[int, str]:
        """Return a digest of the factors and the scale of every adapter that has the module."""
        found = {}
        for index, delta in enumerate(self.row.deltas):
            if delta is not None:
                hashed = xxh3_128(repr(delta.scale).encode())
                for info in (delta.down, delta.up):
                    hashed.update(delta.checkpoint.read(info.name).data)
                found[index] = hashed.hexdigest()
        return found

    def release(self, piece: Piece) -> None:
        """Do nothing: factors are small, and read whole."""
