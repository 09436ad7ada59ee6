"""Small tensors that lie side by side in every file, worked on as the blocks of one: it is the calls that cost."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from hf_frmerge.merging.decisions import Solution
from hf_frmerge.merging.engine.tensor_work import TensorWork
from hf_frmerge.merging.operands.tensor_inputs import SHORT, TensorInputs
from hf_frmerge.merging.planning.blocks import PIECE_ELEMENTS, Piece

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hf_frmerge.checkpoints.tensors.layout import ShardLayout


@dataclass
class TensorStack(TensorWork):
    """
    Tensors of one block and one size, each of which begins where the one before it ends, in all inputs and the output.

    Attributes:
        tensors: these tensors.
    """

    tensors: list[TensorWork] = field(default_factory=list)

    def share_measurement(self) -> None:
        """Give every tensor its Gram matrix, and the digests of its inputs."""
        assert isinstance(self.inputs, TensorInputs)
        roles = self.inputs.digests_of_blocks(self.pieces[0])
        for index, tensor in enumerate(self.tensors):
            tensor.grams = self.grams[index : index + 1]
            tensor.input_digests[0] = {role: digests[index] for role, digests in roles.items()}

    def join_decisions(self) -> Solution:
        """Return the coefficients of all tensors, a row for each."""
        rows = []
        for tensor in self.tensors:
            assert isinstance(tensor.decision, Solution)  # as `Rule.is_blockwise` says
            rows.append(tensor.decision.coefficients)
        return Solution(np.concatenate(rows), None)


def stacked(tensors: Sequence[TensorWork], layout: ShardLayout) -> list[TensorWork]:
    """Put runs of small tensors that lie side by side together, up to the size of a piece; others stay as they are."""
    runs: list[list[TensorWork]] = []
    for tensor in tensors:
        fits = bool(runs) and (len(runs[-1]) + 1) * tensor.step.numel <= PIECE_ELEMENTS
        if fits and _follows(runs[-1][-1], tensor, layout):
            runs[-1].append(tensor)
        else:
            runs.append([tensor])
    return [_stack(run) if len(run) > 1 else run[0] for run in runs]


def _follows(first: TensorWork, second: TensorWork, layout: ShardLayout) -> bool:
    """Whether two tensors can be in one stack."""
    one, other = first.step, second.step
    shard, offset = layout.places[one.name]
    return (
        one.numel == other.numel <= SHORT
        and one.n_blocks == other.n_blocks == len(first.pieces) == len(second.pieces) == 1
        and one.dtype == other.dtype
        and layout.places[other.name] == (shard, offset + one.nbytes)
        and isinstance(first.inputs, TensorInputs)
        and isinstance(second.inputs, TensorInputs)
        and second.inputs.follow(first.inputs)
    )


def _stack(tensors: list[TensorWork]) -> TensorStack:
    step, inputs, n = tensors[0].step, tensors[0].inputs, len(tensors)
    assert isinstance(inputs, TensorInputs)
    step = replace(step, shape=(n, step.numel), n_blocks=n, block_len=step.numel)
    # Precise, as each of them alone would be: they are short.
    return TensorStack(step, inputs.with_next(n), [Piece(0, step.numel, 0, n)], precise=True, tensors=tensors)
