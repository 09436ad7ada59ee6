"""Output of the merged tensors of a full model to memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from hf_frmerge.kernels.interface import digest, digests_of_parts
from hf_frmerge.merging.operands.apply import apply
from hf_frmerge.merging.operands.tensor_inputs import TensorInputs

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hf_frmerge.kernels.interface import Kernels
    from hf_frmerge.merging.engine.tensor_stack import TensorStack
    from hf_frmerge.merging.engine.tensor_work import TensorWork
    from hf_frmerge.merging.planning.blocks import Piece
    from hf_frmerge.merging.planning.plan import MergePlan


class MemoryOutput:
    """
    Output of tensors to memory, into the same place for every merge of the same models.

    Attributes:
        tensors: name -> raw elements, uint8, as a merge writes them to a file.
    """

    def __init__(self, plan: MergePlan) -> None:
        assert plan.layout is not None  # an adapter has factors of ranks that follow from the merge
        self.tensors: dict[str, NDArray[np.uint8]] = {
            step.name: np.empty(step.nbytes, np.uint8) for step in plan.steps
        }

    def lay_out(self, tensors: Sequence[TensorWork]) -> None:
        """Do nothing: every tensor has its place."""

    def merge(self, kernels: Kernels, tensor: TensorWork, piece: Piece) -> str:
        """Apply the decision to a piece; return the digest of the result."""
        assert tensor.decision is not None and isinstance(tensor.inputs, TensorInputs)
        return apply(tensor.inputs, tensor.decision, kernels, piece, self._place(tensor, piece), tensor.step.dtype)

    def merge_stack(self, kernels: Kernels, stack: TensorStack) -> list[str]:
        """Apply the decisions for a stack; return the digests of the results."""
        assert stack.decision is not None and isinstance(stack.inputs, TensorInputs)
        merged = np.empty(stack.step.nbytes, np.uint8)
        apply(stack.inputs, stack.decision, kernels, stack.pieces[0], merged, stack.step.dtype)
        for tensor, part in zip(stack.tensors, merged.reshape(len(stack.tensors), -1)):
            self.tensors[tensor.step.name][:] = part
        return digests_of_parts(merged, len(stack.tensors))

    def copy(self, kernels: Kernels, tensor: TensorWork, piece: Piece) -> str:
        """Copy a piece of the only input; return its digest."""
        assert isinstance(tensor.inputs, TensorInputs)
        place = self._place(tensor, piece)
        data, written = tensor.inputs.copy(kernels, piece, place, tensor.step.dtype)
        place[:] = data
        return written

    def read_back(self, tensor: TensorWork, piece: Piece) -> str:
        """Return the digest of a piece."""
        return digest(self._place(tensor, piece))

    def details(self, tensor: str) -> None:
        """Return None: the decision is all there is to say."""

    def _place(self, tensor: TensorWork, piece: Piece) -> NDArray[np.uint8]:
        start, stop = tensor.byte_range(piece)
        return self.tensors[tensor.step.name][start:stop]
