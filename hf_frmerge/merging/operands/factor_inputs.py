"""Inputs of one module when adapters are merged into an adapter: factors only, never a dense delta."""

# Shape suffixes: N = experts.

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_frmerge.geometry.lowrank import Factors, factor_gram
from hf_frmerge.kernels.product import product

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from numpy.typing import NDArray

    from hf_frmerge.checkpoints.adapters.rows import AdapterRow
    from hf_frmerge.checkpoints.tensors.reader import Checkpoint
    from hf_frmerge.kernels.interface import Kernels
    from hf_frmerge.merging.operands.dense_tensors import ProductTensor
    from hf_frmerge.merging.planning.blocks import Piece


@dataclass(frozen=True)
class FactorInputs:
    """
    Factors of one module in all adapters. A module is one block and one piece; if an adapter lacks it, its delta is 0.

    Attributes:
        row: the factors.
        labels: name of every expert, for messages.
        correction: what calibration adds to the merged delta, as factors.
    """

    row: AdapterRow
    labels: Mapping[int, str]
    correction: ProductTensor | None = None
    has_base = False
    factored = True
    n_saturated = 0  # a factor beyond its dtype is always refused

    @property
    def n_experts(self) -> int:
        """Number of adapters, including those that lack the module."""
        return len(self.row.deltas)

    @property
    def files(self) -> set[tuple[Checkpoint, str]]:
        """The files it is read from."""
        return set().union(*(delta.files for delta in self.row.deltas if delta is not None))

    def gram(
        self, kernels: Kernels, piece: Piece, *, precise: bool = False
    ) -> tuple[NDArray[np.float64], dict[int, str]]:
        """
        Return the Gram matrix `(1, N, N)` of the deltas, computed from the factors, and a digest for every adapter.

        Raises `NonFiniteError` with the name of the adapter if a factor holds NaN or infinity.
        """
        factors, digests = self.row.digested_factors()
        return factor_gram(factors, product)[None], digests

    def digests(self, piece: Piece) -> dict[int, str]:
        """Return for every adapter that has the module a digest of its factors and scale."""
        return {index: delta.digest() for index, delta in enumerate(self.row.deltas) if delta is not None}

    @property
    def correction_rank(self) -> int:
        """Rank of the correction; 0 without one."""
        return self.correction.rank if self.correction is not None else 0

    def read_correction(self) -> Factors:
        """Read the factors of the correction."""
        assert self.correction is not None
        return Factors(*self.correction.factors())

    def release(self, piece: Piece) -> None:
        """Do nothing: what reads the factors has unmapped their pages."""
