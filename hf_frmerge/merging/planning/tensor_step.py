"""Step of a plan: what happens to one tensor of the output."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from hf_frmerge.checkpoints.tensors.reader import DTYPE_BITS


@dataclass(frozen=True)
class TensorStep:
    """
    Plan for one tensor of the output.

    Attributes:
        dtype: dtype code of the output (`"BF16"`, ...).
        action: `"merge"`, or `"copy"` from the model with index `donor` (-1 is the base).
        weights: one per expert, summing to 1; empty for a copy.
        group: tensors of one group form one point and get the same coefficients.
        n_blocks, block_len: number of blocks, and elements in each.
        is_matrix: whether it is merged as a matrix, in one piece.
        scale: factor of the merged delta by layer.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    action: Literal["merge", "copy"]
    donor: int
    weights: tuple[float, ...]
    group: str
    n_blocks: int
    block_len: int
    is_matrix: bool = False
    scale: float = 1.0

    @cached_property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @cached_property
    def cols(self) -> int:
        """Elements of a row."""
        return self.numel // self.shape[0] if self.shape and self.numel else 1

    @cached_property
    def nbytes(self) -> int:
        """Bytes in the output."""
        return self.numel * DTYPE_BITS[self.dtype] // 8
