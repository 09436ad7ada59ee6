"""The merged delta of a module as factors: a sum of the adapters', or what a spectral method makes of their cores."""

# Shape suffixes: N = experts.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hf_frmerge.geometry.lowrank import Factors, concatenate, kept_rank, recompress
from hf_frmerge.geometry.sphere import combine, dot
from hf_frmerge.merging.decisions import Solution
from hf_frmerge.merging.operands.factor_inputs import FactorInputs
from hf_frmerge.merging.operands.merge_by_lapack import merge_factors
from hf_frmerge.methods.spectral.decision import Spectral

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hf_frmerge.merging.engine.tensor_work import TensorWork


@dataclass(frozen=True)
class SumOfFactors:
    """
    What is summed to the delta of a module: the adapters that have a coefficient, and what calibration adds.

    Attributes:
        inputs: factors of all adapters, and the correction.
        coefficients: of every adapter.
    """

    inputs: FactorInputs
    coefficients: NDArray[np.float64]

    @property
    def used(self) -> list[bool]:
        """Whose factors are written: of adapters with a coefficient; if there are none, of the first."""
        row = self.inputs.row
        used = [bool(c) and delta is not None for c, delta in zip(self.coefficients, row.deltas)]
        return used if any(used) else [delta is row.first for delta in row.deltas]

    @property
    def rank(self) -> int:
        """Rank of the factors side by side."""
        ranks = (delta.rank for delta, use in zip(self.inputs.row.deltas, self.used) if use and delta is not None)
        return sum(ranks) + self.inputs.correction_rank

    @property
    def most_rank(self) -> int:
        """Upper limit for the rank of the delta."""
        return min(self.rank, self.inputs.row.n_out, self.inputs.row.n_in)

    def rank_to_write(self, rank: int | None, energy: float | None) -> int:
        """Return the rank to write. For an energy bound that takes half of a recompression, with one to follow."""
        if energy is not None:
            return kept_rank(concatenate(*self._read()), rank, energy)
        return self.rank if rank is None else rank

    def compute(self, rank: int) -> tuple[Factors, float]:
        """Return the factors side by side, or recompressed to a smaller rank, and what that loses."""
        if rank < self.rank:
            return recompress(concatenate(*self._read()), rank)
        return _exact(*self._read()), 0.0

    def norm(self, gram_NN: NDArray[np.float64]) -> float:
        """Return the norm of the sum without a correction, from the Gram matrix of the adapters."""
        squared = dot(combine(self.coefficients, gram_NN), self.coefficients)
        return float(np.sqrt(np.maximum(squared, 0.0)))

    def _read(self) -> tuple[list[Factors], NDArray[np.float64]]:
        """Read the factors; return them with their coefficients."""
        factors, coefficients = self.inputs.row.factors(self.used), self.coefficients
        if self.inputs.correction is not None:
            factors.append(self.inputs.read_correction())
            coefficients = np.append(coefficients, 1.0)
        return factors, coefficients


@dataclass(frozen=True)
class MergedCores:
    """
    What a spectral method makes of the cores of a module's deltas, and what calibration adds.

    The deltas are laid out as PEFT has them, outputs by inputs, also where the model stores the weight the other way.

    Attributes:
        tensor: name of the weight, for messages.
        inputs: factors of all adapters, and the correction.
        decision: of the method.
    """

    tensor: str
    inputs: FactorInputs
    decision: Spectral

    @property
    def rank(self) -> int:
        """Rank of the common space: the ranks of the adapters added up, unless the weight has a smaller one."""
        row = self.inputs.row
        ranks = sum(delta.rank for delta in row.deltas if delta is not None) + self.inputs.correction_rank
        return min(ranks, row.n_out, row.n_in)

    @property
    def most_rank(self) -> int:
        """Upper limit for the rank of the delta."""
        return self.rank

    def rank_to_write(self, rank: int | None, energy: float | None) -> int:
        """Return the rank to write; for an energy bound the cores are merged, which is done again to write them."""
        if energy is not None:
            return kept_rank(self._merge(), rank, energy)
        return self.rank if rank is None else rank

    def compute(self, rank: int) -> tuple[Factors, float]:
        """Return the factors, both of the same size, and what a rank below that of the delta loses."""
        return recompress(self._merge(), rank)

    def _merge(self) -> Factors:
        """Merge the cores, scale the result, and add the correction."""
        merged = merge_factors(self.tensor, self.decision, self.inputs.row.factors(), self.inputs.labels)
        parts, scales = [merged], [self.decision.scale]
        if self.inputs.correction is not None:
            parts.append(self.inputs.read_correction())
            scales.append(1.0)
        return concatenate(parts, np.array(scales))


MergedFactors = SumOfFactors | MergedCores


def merged_factors(tensor: TensorWork) -> MergedFactors:
    """Return what was decided for a module as factors."""
    assert isinstance(tensor.inputs, FactorInputs)
    if isinstance(tensor.decision, Spectral):
        return MergedCores(tensor.step.name, tensor.inputs, tensor.decision)
    assert isinstance(tensor.decision, Solution)
    return SumOfFactors(tensor.inputs, tensor.decision.coefficients[0])


def _exact(factors: Sequence[Factors], coefficients: NDArray[np.float64]) -> Factors:
    """Do what `concatenate` does, in float32 if the inputs are: half the memory traffic, and it is rounded next."""
    used = [(pair, c) for pair, c in zip(factors, coefficients) if pair.A.shape[0]]
    scales = [c * pair.scale for pair, c in used]
    up = np.concatenate([pair.B for pair, _ in used], axis=1)
    # The product is taken in float64, and rounded as it is stored.
    np.multiply(up, np.repeat(scales, [pair.A.shape[0] for pair, _ in used]), out=up, casting="same_kind")
    return Factors(up, np.concatenate([pair.A for pair, _ in used]))
