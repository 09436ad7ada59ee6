"""What a merge will do with one tensor of the output."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from hf_frmerge.checkpoints.tensors.reader import DTYPE_BITS


@dataclass(frozen=True)
class TensorStep:
    """
    One tensor of the output.

    Attributes:
        dtype: dtype code of the output (`"BF16"`, ...).
        action: `"merge"`, or `"copy"` from the model with index `donor` (-1 is the base).
        weights: one per expert, summing to 1; empty for a copy.
        group: tensors of one group lie on one sphere and get the same coefficients.
        n_blocks, block_len: how the tensor is cut into blocks, in elements.
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

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def cols(self) -> int:
        """Elements of a row."""
        return self.numel // self.shape[0] if self.shape and self.numel else 1

    @property
    def nbytes(self) -> int:
        """Bytes in the output."""
        return self.numel * DTYPE_BITS[self.dtype] // 8
