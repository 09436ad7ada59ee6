"""Where the matrices that a fit solves for lie among the weights of a block."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_frmerge.calibration.blocks.blockwise_model import Weights


@dataclass(frozen=True)
class StoredMatrix:
    """
    Matrix of a linear layer, and its bias.

    Attributes:
        weight: the parameter that has it, named within the block.
        bias: the parameter that its bias would be, whether there is one or not.
        place: where it is in a parameter that stacks the matrices of all experts of a mixture; `None` if it is alone.
        is_flipped: whether it is stored as `(in, out)`, as GPT-2 and gpt-oss do.
    """

    weight: str
    bias: str
    place: int | None = None
    is_flipped: bool = False

    def read(self, weights: Weights, *, with_bias: bool = False) -> Tensor:
        """Return the matrix as `(out, in)`; `with_bias` appends the bias as a last column."""
        names = [self.weight, self.bias] if with_bias else [self.weight]
        matrix, *bias = (weights[n] if self.place is None else weights[n][self.place] for n in names)
        matrix = matrix.T if self.is_flipped else matrix
        return torch.cat([matrix, bias[0][:, None]], dim=1) if bias else matrix

    def write(self, weights: dict[str, Tensor], matrix: Tensor, *, with_bias: bool = False) -> None:
        """Store what `read` returns, in a stack in place."""
        values = {self.weight: matrix[:, :-1] if with_bias else matrix}
        values[self.weight] = values[self.weight].T if self.is_flipped else values[self.weight]
        if with_bias:
            values[self.bias] = matrix[:, -1]
        for name, own in values.items():
            if self.place is None:
                weights[name] = own.contiguous()
            else:
                weights[name][self.place] = own


def is_linear(module: nn.Module) -> bool:
    """Whether a module multiplies its input by one matrix."""
    return isinstance(module, (nn.Linear, Conv1D))


def layer_matrix(block: nn.Module, name: str) -> StoredMatrix:
    """Return the matrix of a linear layer that is a module of its own."""
    is_flipped = isinstance(block.get_submodule(name), Conv1D)
    return StoredMatrix(f"{name}.weight", f"{name}.bias", is_flipped=is_flipped)


def n_in(module: nn.Module) -> int:
    """Return the number of inputs of a linear layer."""
    return int(module.get_parameter("weight").shape[0 if isinstance(module, Conv1D) else 1])


def n_out(module: nn.Module) -> int:
    """Return the number of outputs of a linear layer."""
    return int(module.get_parameter("weight").shape[1 if isinstance(module, Conv1D) else 0])
