"""What MLX stores: words full of codes, with a scale and an offset for every few of a row. Imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from hf_frmerge.checkpoints.quantised.form import TORCH_DTYPES, Format, Group, Tensors
from hf_frmerge.checkpoints.tensors.reader import Checkpoint, TensorInfo

_WORD = 32  # bits of the words into which codes are packed
_BITS = (2, 3, 4, 5, 6, 8)

# Models of which MLX's copies hold the weights as transformers does, under the same names. Of others it adds one to
# norms, turns convolutions or stacks experts, which neither names nor shapes always show.
_AS_IN_TRANSFORMERS = frozenset({
    "cohere", "cohere2", "ernie4_5", "exaone4", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "granite", "helium",
    "llama", "mistral", "nemotron", "olmo", "olmo2", "olmo3", "phi", "phi3", "qwen2", "qwen3", "seed_oss", "smollm3",
    "stablelm", "starcoder2",
})  # fmt: skip


def mlx(section: Mapping[str, Any], model_type: object, dtype: str) -> Format:
    """
    Return the format of MLX.

    A weight is `scale * code + bias`, with scale and bias of `group_size` numbers of a row. The codes of a row are one
    string of bits, in words of 32, the first in the lowest bits.

    Args:
        section: What `config.json` says; a layer that is quantised otherwise has an entry by its name.
        model_type: That of the model.
        dtype: Code of the dtype of the weights.

    Raises:
        ValueError: If the section names another way to store codes, or the model may have other weights than
            transformers has.
    """
    mode = section.get("mode", "affine")
    if mode != "affine":
        raise ValueError(f"its mode is {mode!r}")
    if model_type not in _AS_IN_TRANSFORMERS:
        raise ValueError(f"MLX may hold weights of {model_type!r} in another form than transformers")

    def process(tensors: Tensors) -> Tensors:
        (module,) = {name.rpartition(".")[0] for name in tensors}
        codes, scales, biases = (tensors[f"{module}.{part}"] for part in ("weight", "scales", "biases"))
        size, bits = _sizes(section, module)
        numbers = _unpacked(codes, bits).unflatten(-1, (-1, size))
        weight = numbers * scales.float()[..., None] + biases.float()[..., None]
        return {f"{module}.weight": weight.flatten(-2).to(TORCH_DTYPES[dtype])}

    def find(checkpoint: Checkpoint) -> dict[str, Group]:
        groups: dict[str, Group] = {}
        for name, info in checkpoint.tensors.items():
            module, _, ending = name.rpartition(".")
            scales, biases = (checkpoint.tensors.get(f"{module}.{part}") for part in ("scales", "biases"))
            if ending == "weight" and info.dtype == "U32" and scales is not None and biases is not None:
                groups[name] = (_shape(info, scales, biases, *_sizes(section, module)), (info, scales, biases))
        return groups

    return Format("MLX", dtype, find, process)


def _sizes(section: Mapping[str, Any], module: str) -> tuple[int, int]:
    """Return the numbers of a group and the bits of a code in a layer."""
    own = section.get(module)
    stated = {**section, **own} if isinstance(own, dict) else section
    size, bits = stated.get("group_size"), stated.get("bits")
    if stated.get("mode", "affine") != "affine" or bits not in _BITS or not isinstance(size, int) or size < 1:
        raise ValueError(f"its config gives {module} bits {bits!r}, group_size {size!r}, mode {stated.get('mode')!r}")
    return size, int(bits)


def _shape(info: TensorInfo, scales: TensorInfo, biases: TensorInfo, size: int, bits: int) -> tuple[int, ...]:
    fits = info.shape[:-1] == scales.shape[:-1] and scales.shape == biases.shape and len(info.shape) > 1
    if not fits or info.shape[-1] * _WORD != scales.shape[-1] * size * bits:
        raise ValueError(
            f"codes {list(info.shape)}, scales {list(scales.shape)} and biases {list(biases.shape)} of {info.name} do "
            f"not fit groups of {size} with {bits} bits"
        )
    return (*info.shape[:-1], scales.shape[-1] * size)


def _unpacked(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the numbers in the rows of words, int32; a code may lie across two words."""
    octets = words.contiguous().view(torch.uint8).reshape(*words.shape[:-1], -1)
    # Eight codes fill as many bytes as a code has bits.
    chunks = octets.unflatten(-1, (-1, bits)).long()
    packed = (chunks << torch.arange(0, 8 * bits, 8)).sum(-1, keepdim=True)
    # Of codes of eight bits, the sign of 64 bits is part of the last.
    return ((packed >> torch.arange(0, 8 * bits, bits)) & (2**bits - 1)).flatten(-2)
