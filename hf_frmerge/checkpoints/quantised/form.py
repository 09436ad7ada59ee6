"""What a way to store weights as codes is. Imports torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hf_frmerge.checkpoints.tensors.reader import DTYPE_BITS, Checkpoint, TensorInfo
from hf_frmerge.errors import CheckpointError

Tensors = dict[str, torch.Tensor]
Group = tuple[tuple[int, ...], tuple[TensorInfo, ...]]
"""Shape of a dequantised weight, and the stored tensors it is made of; the first gives it its place."""

TORCH_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
    "I64": torch.int64, "U32": torch.uint32,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip


@dataclass(frozen=True)
class Format:
    """
    One way to store weights as codes.

    Attributes:
        title: what it is called in messages.
        dtype: dtype code of the weights it is dequantised to.
        find: returns by name of a weight its shape and the tensors it is made of.
        process: returns the weights that stored tensors stand for, by name.
        by_rows: names of weights, each made of one tensor, of which any rows can be made of their own codes.
    """

    title: str
    dtype: str
    find: Callable[[Checkpoint], dict[str, Group]]
    process: Callable[[Tensors], Tensors]
    by_rows: frozenset[str] = frozenset()

    @property
    def itemsize(self) -> int:
        """Bytes of an element of the weights."""
        return DTYPE_BITS[self.dtype] // 8

    def convert(self, info: TensorInfo, stored: Mapping[str, tuple[TensorInfo, NDArray[np.uint8]]]) -> NDArray[Any]:
        """
        Return the bytes of one weight.

        Args:
            info: Name and shape of the weight.
            stored: Name -> description and bytes of every tensor that it is made of.

        Raises:
            CheckpointError: If it cannot be made, or is another tensor than was expected.
        """
        tensors = {name: tensor_of(part, data) for name, (part, data) in stored.items()}
        try:
            weight = self.process(tensors)[info.name]
        except (IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{info.name!r} could not be dequantised from {', '.join(stored)} ({type(error).__name__}: {error})."
            ) from error
        if tuple(weight.shape) != info.shape or weight.dtype != TORCH_DTYPES[self.dtype]:
            raise CheckpointError(
                f"{info.name!r} was expected to be {self.dtype} {list(info.shape)}, but is "
                f"{weight.dtype} {list(weight.shape)}."
            )
        flat: NDArray[np.uint8] = weight.contiguous().reshape(-1).view(torch.uint8).numpy()
        return flat


def tensor_of(info: TensorInfo, data: NDArray[np.uint8]) -> torch.Tensor:
    """Return the stored bytes of a tensor as torch sees them."""
    if info.dtype not in TORCH_DTYPES:
        raise CheckpointError(f"{info.name!r} is {info.dtype}, which no format that can be dequantised has.")
    return torch.from_numpy(data).view(TORCH_DTYPES[info.dtype]).reshape(info.shape)
