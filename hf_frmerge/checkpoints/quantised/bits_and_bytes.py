"""What bitsandbytes stores: NF4 and FP4, quantised once or twice, and rows of eight bits. Imports torch."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch

from hf_frmerge.checkpoints.json_text import parse_json
from hf_frmerge.checkpoints.names.empty_model import transposed_layers
from hf_frmerge.checkpoints.quantised.form import TORCH_DTYPES, Format, Group, Tensors
from hf_frmerge.checkpoints.tensors.quantised import FOUR_BIT
from hf_frmerge.checkpoints.tensors.reader import Checkpoint, TensorInfo

_STATE = tuple(f".quant_state.{each}" for each in FOUR_BIT)
_ROWS = 127  # the code of the largest number in a row of eight bits


def bits_and_bytes(dtype: str) -> Format:
    """
    Return the format of bitsandbytes.

    Four bits: a weight is `quant_map[code] * absmax` with one `absmax` for a block of `blocksize` numbers, in the
    order of the weight; two codes lie in a byte, the first in the upper half, whatever dtype the bytes are stored as.
    Quantised twice, `absmax` is itself `nested_quant_map[code] * nested_absmax + nested_offset`, in other blocks.
    Eight bits: a row of a weight is `code * SCB / 127`. transformers turns the weights of `Conv1D` (GPT-2) before it
    has them quantised; they are turned back.

    Args:
        dtype: Code of the dtype of the weights.
    """
    turned: set[str] = set()

    def process(tensors: Tensors) -> Tensors:
        state = next((name for name in tensors if name.endswith(_STATE)), None)
        if state is not None:
            name = _name_of(state)
            weight = _four_bit(name, tensors[state], tensors)
        else:
            name = next(name for name in tensors if name.endswith(".weight"))
            weight = _eight_bit(name, tensors)
        return {name: (weight.T if name in turned else weight).to(TORCH_DTYPES[dtype]).contiguous()}

    def find(checkpoint: Checkpoint) -> dict[str, Group]:
        found = {**_four_bit_groups(checkpoint), **_eight_bit_groups(checkpoint)}
        turned.update(_turned(checkpoint, found.keys()))
        return {name: (shape[::-1] if name in turned else shape, parts) for name, (shape, parts) in found.items()}

    return Format("bitsandbytes", dtype, find, process)


@dataclass(frozen=True)
class _State:
    """What is written of a weight of four bits: its shape, numbers a block, and how its scales are to be read."""

    shape: tuple[int, ...]
    block: int
    nested_block: int
    offset: float


def _read_state(data: bytes) -> _State:
    """Parse what is written; raises ValueError if something is missing or no number of its kind."""
    values: Any = parse_json(data, finite=True)
    if not isinstance(values, dict):
        raise ValueError("it is not an object")
    shape: Any = values.get("shape")
    block: Any = values.get("blocksize")
    nested: Any = values.get("nested_blocksize", 1)
    offset = values.get("nested_offset", 0.0)
    sizes = [*shape, block, nested] if isinstance(shape, list) and shape else [None]
    if not all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in sizes):
        raise ValueError(f"shape {shape!r}, blocksize {block!r} and nested_blocksize {nested!r} are not all sizes")
    if not isinstance(offset, (int, float)):
        raise ValueError(f"nested_offset is {offset!r}")
    return _State(tuple(shape), block, nested, float(offset))


def _four_bit_groups(checkpoint: Checkpoint) -> dict[str, Group]:
    groups: dict[str, Group] = {}
    for state_name, info in checkpoint.tensors.items():
        if not state_name.endswith(_STATE):
            continue
        name = _name_of(state_name)
        try:
            state = _read_state(bytes(checkpoint.read_info(info)))
        except ValueError as error:
            raise ValueError(f"{state_name} cannot be read: {error}") from error
        parts = [checkpoint.tensors.get(part) for part in (name, f"{name}.absmax", f"{name}.quant_map")]
        nested = [checkpoint.tensors.get(f"{name}.nested_{part}") for part in ("absmax", "quant_map")]
        if None in parts or nested.count(None) == 1:
            raise ValueError(f"not all that {name!r} is made of is there")
        present = [part for part in (*parts, *nested) if part is not None]
        _check_sizes(state, present)
        groups[name] = (state.shape, (*present, info))
    return groups


def _name_of(state_name: str) -> str:
    """Return the name of the weight that a state belongs to."""
    return state_name.rpartition(".quant_state.")[0]


def _check_sizes(state: _State, parts: list[TensorInfo]) -> None:
    """Raise if codes and scales are not as many as a weight of this shape has."""
    n_blocks = -(-math.prod(state.shape) // state.block)
    wanted = {"codes": -(-math.prod(state.shape) // 2), "absmax": n_blocks, "quant_map": 16}
    stored = [parts[0].nbytes, *(part.numel for part in parts[1:])]
    if len(parts) > len(wanted):
        wanted |= {"nested_absmax": -(-n_blocks // state.nested_block), "nested_quant_map": 256}
    for (part, number), there in zip(wanted.items(), stored):
        if number != there:
            raise ValueError(f"{parts[0].name} of shape {list(state.shape)} needs {number} of {part}, not {there}")


def _four_bit(name: str, stored_state: torch.Tensor, tensors: Tensors) -> torch.Tensor:
    state = _read_state(stored_state.numpy().tobytes())
    scales = tensors[f"{name}.absmax"].reshape(-1)
    if f"{name}.nested_absmax" in tensors:
        codes = tensors[f"{name}.nested_quant_map"].float()[scales.long()]
        scales = codes * _spread(tensors[f"{name}.nested_absmax"], state.nested_block, len(codes)) + state.offset
    pairs = tensors[name].contiguous().view(torch.uint8).reshape(-1)
    numbers = tensors[f"{name}.quant_map"].float()[torch.stack([pairs >> 4, pairs & 15], dim=-1).flatten().int()]
    numbers = numbers[: math.prod(state.shape)]  # an odd one has half a byte to spare
    return (numbers * _spread(scales, state.block, len(numbers))).reshape(state.shape)


def _spread(scales: torch.Tensor, block: int, length: int) -> torch.Tensor:
    """Return the scale of every number."""
    return scales.float().reshape(-1).repeat_interleave(block)[:length]


def _eight_bit_groups(checkpoint: Checkpoint) -> dict[str, Group]:
    groups: dict[str, Group] = {}
    for name, info in checkpoint.tensors.items():
        module = name.removesuffix(".weight")
        scales, layout = (checkpoint.tensors.get(f"{module}.{part}") for part in ("SCB", "weight_format"))
        if module == name or info.dtype != "I8" or scales is None:
            continue
        if len(info.shape) != 2 or scales.numel != info.shape[0]:
            raise ValueError(f"{scales.name} has {scales.numel} scales for {name} of shape {list(info.shape)}")
        if layout is not None and checkpoint.read_info(layout).any():
            raise ValueError(f"{layout.name} says that codes do not lie in rows, but as some GPUs want them")
        groups[name] = (info.shape, (info, scales, *([layout] if layout is not None else [])))
    return groups


def _eight_bit(name: str, tensors: Tensors) -> torch.Tensor:
    return tensors[name].float() * (tensors[f"{name.removesuffix('weight')}SCB"].reshape(-1, 1).float() / _ROWS)


def _turned(checkpoint: Checkpoint, names: Collection[str]) -> list[str]:
    """Return the weights that their class has transposed."""
    layers = transposed_layers(checkpoint.config(), checkpoint.source.spec)
    # Names on disk may lack the prefix of the base model, which the class has.
    return [name for name in names if any(layer == name or layer.endswith(f".{name}") for layer in layers)]
