"""Formats whose codes are plain arithmetic away from the weights: GPTQ, and the MXFP4 of gpt-oss. Imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from hf_frmerge.checkpoints.quantised.form import TORCH_DTYPES, Format, Group, Tensors
from hf_frmerge.checkpoints.tensors.reader import Checkpoint, TensorInfo

_WORD = 32  # bits of the words into which GPTQ packs codes

# The numbers that four bits stand for: a sign, two bits of exponent, one of mantissa.
_FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
_SCALE_BIAS = 127  # of the exponents that MXFP4 stores for blocks


def gptq(section: Mapping[str, Any], dtype: str) -> Format:
    """
    Return the format of GPTQ and of its successors.

    A weight is `scale * (code - zero)`, with scale and zero of the group of its input (`g_idx`, or groups in order).
    Codes are packed along the inputs, zeros along the outputs, several to a word, the first in the lowest bits. The
    first version of the format stores zeros less one, modulo the number of codes.

    Args:
        section: `quantization_config`.
        dtype: Code of the dtype of the weights.

    Raises:
        ValueError: If it says that codes are packed otherwise.
    """
    version = section.get("checkpoint_format") or "gptq"
    if version not in ("gptq", "gptq_v2"):
        raise ValueError(f"its checkpoint_format is {version!r}")
    stated = section.get("bits")
    off_by = 1 if version == "gptq" else 0

    def process(tensors: Tensors) -> Tensors:
        (module,) = {name.rpartition(".")[0] for name in tensors}
        codes, scales = tensors[f"{module}.qweight"], tensors[f"{module}.scales"].float()
        bits = _bits(codes.shape, tensors[f"{module}.qzeros"].shape, scales.shape)
        zeros = (_unpacked(tensors[f"{module}.qzeros"], bits, dim=1) + off_by) % 2**bits
        numbers = _unpacked(codes, bits, dim=0)
        group = tensors.get(f"{module}.g_idx")
        if group is None:
            group = torch.arange(len(numbers)) // -(-len(numbers) // len(scales))
        group = group.long()
        weight = (numbers - zeros[group]) * scales[group]
        return {f"{module}.weight": weight.T.to(TORCH_DTYPES[dtype]).contiguous()}

    def find(checkpoint: Checkpoint) -> dict[str, Group]:
        groups: dict[str, Group] = {}
        for name, info in checkpoint.tensors.items():
            module, _, ending = name.rpartition(".")
            others = [checkpoint.tensors.get(f"{module}.{each}") for each in ("qzeros", "scales", "g_idx")]
            zeros, scales, order = others
            if ending == "qweight" and zeros is not None and scales is not None:
                bits = _bits(info.shape, zeros.shape, scales.shape)
                if order is None and stated not in (None, bits):
                    raise ValueError(f"{name} has codes of {bits} bits, and its config says {stated}")
                shape = (info.shape[1], info.shape[0] * _WORD // bits)
                if order is not None and order.shape != shape[1:]:
                    raise ValueError(f"{order.name} gives groups of {order.numel} inputs, {name} has {shape[1]}")
                groups[f"{module}.weight"] = (shape, (info, *(each for each in others if each is not None)))
        return groups

    return Format("GPTQ", dtype, find, process)


def _bits(codes: tuple[int, ...], zeros: tuple[int, ...], scales: tuple[int, ...]) -> int:
    """Return the bits of a code; zeros have as many, and their shape shows them."""
    if not (len(codes) == len(zeros) == len(scales) == 2 and codes[1] == scales[1] and zeros[0] == scales[0]):
        raise ValueError(f"codes {tuple(codes)}, zeros {tuple(zeros)} and scales {tuple(scales)} do not fit together")
    bits = _WORD * zeros[1] // scales[1]
    if bits not in (2, 4, 8) or zeros[1] * _WORD != bits * scales[1]:
        raise ValueError(f"its codes are not of 2, 4 or 8 bits ({zeros[1]} words of zeros for {scales[1]} outputs)")
    return bits


def _unpacked(words: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """Return the numbers that are packed into words along a dimension, int32."""
    shifts = torch.arange(0, _WORD, bits, dtype=torch.int32)
    shape = [1, 1, 1]
    shape[dim + 1] = len(shifts)
    return ((words.unsqueeze(dim + 1) >> shifts.reshape(shape)) & (2**bits - 1)).flatten(dim, dim + 1)


def mxfp4(dtype: str) -> Format:
    """
    Return the format of gpt-oss: experts stacked, two numbers of four bits to a byte, a power of two for every 32.

    The class has these matrices transposed.
    """

    def one(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        pairs = torch.stack([_FP4[(blocks & 15).long()], _FP4[(blocks >> 4).long()]], dim=-1)
        rows = torch.ldexp(pairs.flatten(-2), scales.int()[..., None] - _SCALE_BIAS).flatten(-2)
        return rows.T.to(TORCH_DTYPES[dtype])

    def process(tensors: Tensors) -> Tensors:
        (name,) = (each.removesuffix("_blocks") for each in tensors if each.endswith("_blocks"))
        blocks, scales = tensors[f"{name}_blocks"], tensors[f"{name}_scales"]
        experts, rows, groups, size = blocks.shape
        weight = torch.empty(experts, 2 * groups * size, rows, dtype=TORCH_DTYPES[dtype])
        for place in range(experts):  # one at a time: what is between codes and numbers takes 16 times their room
            weight[place] = one(blocks[place], scales[place])
        return {name: weight}

    def find(checkpoint: Checkpoint) -> dict[str, Group]:
        groups: dict[str, Group] = {}
        for name, info in checkpoint.tensors.items():
            scales = checkpoint.tensors.get(f"{name.removesuffix('_blocks')}_scales")
            if name.endswith("_blocks") and scales is not None and _are_blocks(info, scales):
                experts, rows, n_groups, size = info.shape
                groups[name.removesuffix("_blocks")] = ((experts, 2 * n_groups * size, rows), (info, scales))
        return groups

    return Format("MXFP4", dtype, find, process)


def _are_blocks(info: TensorInfo, scales: TensorInfo) -> bool:
    return info.dtype == scales.dtype == "U8" and len(info.shape) == 4 and info.shape[:3] == scales.shape
