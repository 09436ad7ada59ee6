"""What the converters of the compressed-tensors package make of the codes of each format. Imports torch and them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from compressed_tensors.entrypoints.convert import (
    AutoAWQConverter,
    CompressedTensorsDequantizer,
    FP8BlockDequantizer,
    ModelOptNvfp4Converter,
)
from compressed_tensors.utils.match import match_name

from hf_frmerge.checkpoints.quantised.form import TORCH_DTYPES, Format, Group, Tensors, tensor_of
from hf_frmerge.checkpoints.tensors.reader import DTYPE_BITS, Checkpoint, TensorInfo


def open_format(kind: str, section: Mapping[str, Any], dtype: str) -> Format:
    """
    Return the format of a checkpoint.

    Args:
        kind: `"fp8"` (scales of blocks), `"compressed-tensors"`, `"awq"` or `"modelopt"`.
        section: Its `quantization_config`; empty if it has none.
        dtype: Code of the dtype of the weights.
    """
    if kind == "fp8":
        return _fp8(section, dtype)
    if kind == "compressed-tensors":
        return _compressed("compressed-tensors", section, dtype)
    if kind == "awq":
        awq = AutoAWQConverter.from_autoawq_config(dict(section))
        awq.ignore = []  # what has codes is quantised, whatever the section says
        then = _compressed("AWQ", _dumped(awq.update_config(None)), dtype)
        return Format("AWQ", dtype, _awq_groups, lambda tensors: then.process(awq.process(tensors)))
    modelopt = ModelOptNvfp4Converter(targets=["re:.*"])
    then = _compressed("NVFP4", _dumped(modelopt.update_config(None)), dtype)
    return Format("ModelOpt NVFP4", dtype, _nvfp4_groups, lambda tensors: then.process(modelopt.process(tensors)))


def _fp8(section: Mapping[str, Any], dtype: str) -> Format:
    blocks = section.get("weight_block_size")

    def one(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        if scale.numel() == 1:
            size, scale = tuple(weight.shape), scale.reshape(1, 1)
        else:
            size = tuple(blocks or _block_size(weight.shape, scale.shape))
        converter = FP8BlockDequantizer(weight_block_size=size, dtype=TORCH_DTYPES[dtype])
        return converter.process({"module.weight": weight, "module.weight_scale_inv": scale})["module.weight"]

    def process(tensors: Tensors) -> Tensors:
        (name,) = (name for name in tensors if not name.endswith("_scale_inv"))
        weight, scale = tensors[name], tensors[f"{name}_scale_inv"]
        if weight.dim() == 3:  # a stack of experts
            return {name: torch.stack([one(*pair) for pair in zip(weight, scale)])}
        return {name: one(weight, scale)}

    def find(checkpoint: Checkpoint) -> dict[str, Group]:
        tensors = checkpoint.tensors
        pairs = ((name.removesuffix("_scale_inv"), info) for name, info in tensors.items())
        return {
            name: (tensors[name].shape, (tensors[name], scale))
            for name, scale in pairs
            if name != scale.name and name in tensors and tensors[name].dtype.startswith("F8")
        }

    return Format("fp8 with scales of blocks", dtype, find, process)


def _block_size(shape: Sequence[int], scales: Sequence[int]) -> tuple[int, int]:
    """Return the size of blocks from their number: 128 by 128, as all models have that do not say otherwise."""
    if [-(-length // 128) for length in shape] != list(scales):
        raise ValueError(f"scales of shape {tuple(scales)} are not those of blocks of 128 by 128 of {tuple(shape)}")
    return 128, 128


def _compressed(title: str, section: Mapping[str, Any], dtype: str) -> Format:
    # The class reads a file; the section may come from anywhere.
    with TemporaryDirectory(prefix="frmerge-") as folder:
        Path(folder, "config.json").write_text(json.dumps({"quantization_config": section}), encoding="utf-8")
        converter = CompressedTensorsDequantizer(folder, dtype=TORCH_DTYPES[dtype])

    def find(checkpoint: Checkpoint) -> dict[str, Group]:
        tensors, groups = checkpoint.tensors, dict[str, Group]()
        for name, info in tensors.items():
            module, _, ending = name.rpartition(".")
            needed = converter.get_dependencies(name) if ending in ("weight", "weight_packed") else set()
            if needed and needed <= tensors.keys() and not info.is_float:
                parts = (info, *(tensors[each] for each in sorted(needed)))
                groups[f"{module}.weight"] = (_shape(checkpoint, module, info, converter), parts)
        return groups

    return Format(title, dtype, find, converter.process)


def _shape(
    checkpoint: Checkpoint, module: str, info: TensorInfo, converter: CompressedTensorsDequantizer
) -> tuple[int, ...]:
    """Return the shape of a weight: as it is stored beside its codes, else that of the codes, several to a byte."""
    stated = checkpoint.tensors.get(f"{module}.weight_shape")
    if stated is not None:
        return tuple(tensor_of(stated, checkpoint.read_info(stated).copy()).tolist())
    if info.name.endswith(".weight"):
        return info.shape
    schemes = converter.quant_config.config_groups.values()
    scheme = next(s for s in schemes if "Linear" in s.targets or any(match_name(module, t) for t in s.targets))
    return (*info.shape[:-1], info.shape[-1] * DTYPE_BITS[info.dtype] // scheme.weights.num_bits)


def _awq_groups(checkpoint: Checkpoint) -> dict[str, Group]:
    tensors, groups = checkpoint.tensors, dict[str, Group]()
    for name, info in tensors.items():
        module, _, ending = name.rpartition(".")
        parts = [tensors.get(f"{module}.{other}") for other in ("scales", "qzeros")]
        if ending == "qweight" and parts[0] is not None:
            # Stored as (in, out / 8).
            shape = (info.shape[1] * 8, info.shape[0])
            groups[f"{module}.weight"] = (shape, (info, *(part for part in parts if part is not None)))
    return groups


def _nvfp4_groups(checkpoint: Checkpoint) -> dict[str, Group]:
    tensors, groups = checkpoint.tensors, dict[str, Group]()
    for name, info in tensors.items():
        module, _, ending = name.rpartition(".")
        parts = [tensors.get(f"{module}.{other}") for other in ("weight_scale", "weight_scale_2")]
        if ending == "weight" and info.dtype == "U8" and None not in parts:
            groups[name] = ((*info.shape[:-1], info.shape[-1] * 2), (info, *(part for part in parts if part)))
    return groups


def _dumped(config: Any) -> dict[str, Any]:
    dumped: dict[str, Any] = json.loads(config.model_dump_json())
    return dumped
