"""Copies of tensors of the base, which PEFT stores in an adapter beside factors of an embedding or an output layer."""

from __future__ import annotations

import numpy as np

from hf_frmerge.checkpoints.tensors.floats import narrow, widen
from hf_frmerge.checkpoints.tensors.reader import Checkpoint, TensorInfo
from hf_frmerge.errors import CheckpointError

PEFT_PREFIX = "base_model.model."
"""Of the names of all tensors in an adapter."""

_ORIGINAL = ".base_layer"  # PEFT's name for the original layer of an adapted module
_COMPARE_ELEMENTS = 1 << 22  # elements compared at a time


def copied_from_base(name: str) -> str | None:
    """Return the tensor of the base that one of an adapter is a copy of; None if it is no copy."""
    layer, _, parameter = name.rpartition(".")
    if parameter in ("weight", "bias") and layer.endswith(_ORIGINAL):
        return f"{layer.removesuffix(_ORIGINAL)}.{parameter}"
    return None


def check_base_copy(adapter: Checkpoint, copy: TensorInfo, base: Checkpoint, target: str) -> None:
    """
    Compare an adapter's copy of a tensor of its base with the base itself.

    Args:
        adapter (`Checkpoint`): Tensors of the adapter.
        copy (`TensorInfo`): The copy.
        base (`Checkpoint`): The base.
        target (`str`): Name of the tensor there, of the same shape.

    Raises:
        CheckpointError: If it differs, that is, if the adapter was trained on another base.
    """
    original = base.tensors[target]
    size, original_size = copy.nbytes // copy.numel, original.nbytes // original.numel
    for start in range(0, copy.numel, _COMPARE_ELEMENTS):
        stop = min(start + _COMPARE_ELEMENTS, copy.numel)
        expected = widen(base.read(target, start * original_size, stop * original_size), original.dtype)
        if not np.array_equal(narrow(expected, copy.dtype), adapter.read(copy.name, start * size, stop * size)):
            raise CheckpointError(
                f"Adapter {adapter.source.spec!r} carries a copy of {target!r} that differs from the one in "
                f"{base.source.spec!r}: it was trained on another base, or the base's embedding was changed. "
                "Pass the base it was trained on."
            )
