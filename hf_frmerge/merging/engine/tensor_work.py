"""State of the tensors that the engine is working on."""

# Shape suffixes: B = blocks, K = operands (the base first where there is one).

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from hf_frmerge.checkpoints.tensors.reader import DTYPE_BITS
from hf_frmerge.merging.operands.tensor_inputs import join_digests

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from hf_frmerge.checkpoints.tensors.reader import Checkpoint
    from hf_frmerge.merging.decisions import Decision
    from hf_frmerge.merging.engine.outcomes import FactorDetails
    from hf_frmerge.merging.operands.factor_inputs import FactorInputs
    from hf_frmerge.merging.operands.tensor_inputs import TensorInputs
    from hf_frmerge.merging.planning.blocks import Piece
    from hf_frmerge.merging.planning.tensor_step import TensorStep

# Below this mean square, float32 products of the first operand start to underflow, and the Gram pass is repeated with
# float64 products. It is far below the weights of any trained model, so only zero tensors pay for a second pass.
_TINY_MEAN_SQUARE = 1e-24


class TensorGram(NamedTuple):
    """Gram matrices of a tensor's blocks, `(B, K, K)`, and the digests of its inputs by role."""

    gram: NDArray[np.float64]
    inputs: dict[str, str]


@dataclass
class TensorWork:
    """
    One tensor that is being merged or copied.

    Attributes:
        skipped: whether it is copied because an observer asked for that.
        precise: whether its Gram pass multiplies in float64.
        decision: what the method decided, once that is known.
        details: of a module of an adapter: how its factors were written, once they are.
        n_saturated: how many of its values were beyond its dtype, once it is written.
        done: whether it is in its file and recorded.
    """

    step: TensorStep
    inputs: TensorInputs | FactorInputs
    pieces: list[Piece]
    skipped: bool = False
    precise: bool = False
    decision: Decision | None = None
    details: FactorDetails | None = None
    n_saturated: int = 0
    done: bool = False
    input_digests: list[dict[int, str]] = field(init=False)
    output_digests: list[str] = field(init=False)

    def __post_init__(self) -> None:
        # Gram matrices of blocks, or of parts of blocks, in one array. Small arrays that outlive the buffers allocated
        # beside them left holes in the heap of 20 kB for each piece.
        size = self.inputs.n_experts + self.inputs.has_base
        self.grams: NDArray[np.float64] = np.zeros((max(self.step.n_blocks, len(self.pieces)), size, size))
        self.input_digests = [{} for _ in self.pieces]
        self.output_digests = [""] * len(self.pieces)

    @property
    def is_cut(self) -> bool:
        """Whether the pieces are parts of blocks and not runs of whole blocks."""
        return len(self.pieces) > self.step.n_blocks

    def gram(self) -> NDArray[np.float64]:
        """Return the Gram matrices `(B, K, K)`; parts of a block are added in a fixed order, not as threads end."""
        if not self.is_cut:
            return self.grams
        total = np.zeros((self.step.n_blocks, *self.grams.shape[1:]))
        for piece, gram in zip(self.pieces, self.grams):
            total[piece.first_block] += gram
        return total

    def needs_precision(self, gram_BKK: NDArray[np.float64]) -> bool:
        """Whether the Gram pass that gave `gram_BKK` has to be repeated in float64."""
        if self.precise or self.inputs.factored:
            return False
        return bool(np.any(gram_BKK[:, 0, 0] < _TINY_MEAN_SQUARE * max(1, self.step.block_len)))

    def inputs_digest(self) -> dict[str, str]:
        """Return the digest of every input by role."""
        if len(self.input_digests) == 1:
            return {str(role): digest for role, digest in self.input_digests[0].items()}
        roles = self.input_digests[0] if self.input_digests else {}
        return {str(role): join_digests([piece[role] for piece in self.input_digests]) for role in roles}

    def output_digest(self) -> str:
        """Return the digest of the written bytes."""
        return join_digests(self.output_digests)

    def byte_range(self, piece: Piece) -> tuple[int, int]:
        """Return the range of a piece in the output, in bytes from the start of the tensor."""
        bits = DTYPE_BITS[self.step.dtype]
        return piece.start * bits // 8, piece.stop * bits // 8


@dataclass
class BatchWork:
    """
    Tensors that are solved together, or one that is copied.

    Attributes:
        units: what is measured and merged with one call each: the tensors, or stacks of them.
        is_large: whether the inputs together exceed the memory budget, so that pages are released after each piece.
        then: called when all queued jobs of the batch have ended.
        remaining: number of queued jobs that have not ended.
    """

    tensors: list[TensorWork]
    is_large: bool = False
    units: Sequence[TensorWork] = field(init=False)
    then: Callable[[BatchWork], None] = field(init=False)
    remaining: int = field(init=False)

    def __post_init__(self) -> None:
        self.units = self.tensors

    @cached_property
    def files(self) -> set[tuple[Checkpoint, str]]:
        """The files that its tensors are read from."""
        return {file for unit in self.units for file in unit.inputs.files}


def sum_grams(tensors: dict[str, TensorGram]) -> NDArray[np.float64]:
    """Add up the Gram matrices of the tensors of a group, in the order of their names."""
    first, *others = (tensors[name].gram for name in sorted(tensors))
    return sum(others, start=first)
