"""Recognise quantised checkpoints by their config or their tensors, and refuse them with a remedy that works."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from hf_frmerge.checkpoints.tensors.header import FLOAT_DTYPES
from hf_frmerge.checkpoints.tensors.reader import Checkpoint, some
from hf_frmerge.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from hf_frmerge.checkpoints.tensors.header import TensorInfo

# Endings of the names that quantisers give to their codes. They are checked even if config.json does not mention
# quantisation.
_CODES = (
    ("bitsandbytes, 8 bit", r"\.weight_format"),
    ("bitsandbytes, 4 bit", r"\.quant_state\..+"),
    ("GPTQ or AWQ", r"\.(qweight|qzeros)"),
    ("compressed-tensors", r"\.weight_packed"),
    ("MXFP4", r"_blocks"),
    ("quanto", r"\.weight\._data"),
    ("HQQ", r"\.W_q"),
    ("AQLM", r"\.codes"),
)
# Scales that are stored next to a `weight` which itself holds codes.
_SCALES = (
    ("bitsandbytes, 8 bit", "SCB"),
    ("bitsandbytes, 4 bit", "weight.absmax"),
    ("MLX", "scales"),
    ("FP8 or INT8", "weight_scale"),
    ("FP8", "weight_scale_inv"),
)

SECTIONS = ("quantization_config", "quantization", "compression_config")
"""Entries of `config.json` that say how a model is quantised; a model of plain weights has none."""

FOUR_BIT = ("bitsandbytes__nf4", "bitsandbytes__fp4")
"""Last parts of the names of what says how four bits of bitsandbytes are to be read."""

PLAIN = "plain numbers"
"""What a checkpoint holds of which only the config says that it is quantised."""

_ORIGINALS = "Merge the unquantised checkpoints it was made from"
# Method in `quantization_config` -> how to dequantise with transformers, for the methods where that works. The result
# must be saved with save_original_format=False: otherwise it is quantised again, or cannot be saved.
_WAYS_OUT = {
    "bitsandbytes": "load it with `from_pretrained`, call `model.dequantize()`",
    "fp8": "load it with `from_pretrained(..., quantization_config=FineGrainedFP8Config(dequantize=True))`",
}


def section_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what a `config.json` says of quantisation; empty if it says nothing."""
    section: Any = next((config[key] for key in SECTIONS if config.get(key)), {})
    return section if isinstance(section, dict) else {"quant_method": section}


def is_code(info: TensorInfo) -> bool:
    """Whether a tensor may hold quantised codes: a matrix of numbers that are neither floats nor truth values."""
    return not info.is_float and info.dtype != "BOOL" and sum(length > 1 for length in info.shape) > 1


def is_quantised(checkpoint: Checkpoint) -> bool:
    """Whether tensors look like codes, or the config says that they are; of a GGUF file names differ in any case."""
    if checkpoint.source.is_gguf:
        return True
    infos = checkpoint.tensors.values()
    # Not every code looks like one: bitsandbytes packs a matrix into one column.
    return bool(section_of(checkpoint.config())) or any(map(is_code, infos)) or made_by(infos) is not None


def refuse_quantised(checkpoint: Checkpoint) -> None:
    """
    Raise if a checkpoint is quantised: its numbers are codes, and a mean of codes is meaningless.

    Raises:
        CheckpointError: If its config or the names and dtypes of its tensors say that it is quantised.
    """
    spec = checkpoint.source.spec
    config = checkpoint.config()
    section = section_of(config)
    if section and not checkpoint.quantisation:
        method = str(section.get("quant_method", "MLX" if "quantization" in config else "unknown method"))
        raise CheckpointError(
            f"{spec!r} is quantised ({method}): its numbers are codes, which cannot be averaged. {way_out(method)}"
        )
    recognised = made_by(checkpoint.tensors.values())
    if recognised:
        method, names = recognised
        raise CheckpointError(
            f"{spec!r} is quantised ({method}, by its tensors {some(names)}), though its config.json does not say "
            f"how: its numbers are codes, which cannot be averaged. {_ORIGINALS}."
        )
    codes = [info for info in checkpoint.tensors.values() if info.dtype.startswith(("F4", "F6_", "F8", "C64"))]
    if codes:
        listed = some(f"{info.name} ({info.dtype})" for info in codes)
        raise CheckpointError(
            f"{spec!r} holds tensors of a dtype that cannot be merged: {listed}. Convert the checkpoint to one of "
            f"{', '.join(sorted(FLOAT_DTYPES))} first."
        )


def way_out(method: str) -> str:
    """Say what to do with a model that is quantised by a method, as a sentence."""
    steps = _WAYS_OUT.get(method)
    if steps is None:
        return f"{_ORIGINALS}."
    return f"{_ORIGINALS}, or {steps} and `model.save_pretrained(..., save_original_format=False)`, and merge that."


def made_by(infos: Iterable[TensorInfo]) -> tuple[str, list[str]] | None:
    """Return the name of the format and the tensors it is recognised by; `None` if no quantiser made them."""
    tensors = {info.name: info for info in infos}
    coded = [name for name, info in tensors.items() if not info.is_float]
    for method, pattern in _CODES:
        ending = re.compile(f".+{pattern}")
        names = [name for name in coded if ending.fullmatch(name)]
        if names:
            return method, names
    weights = [name for name in coded if name.endswith(".weight")]
    for method, scales in _SCALES:
        names = [name for name in weights if name.removesuffix("weight") + scales in tensors]
        if names:
            return method, names
    return None
