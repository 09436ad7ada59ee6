"""Let a quantised checkpoint be read as plain numbers, tensor by tensor, where the compressed-tensors package can."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hf_frmerge.checkpoints.names.empty_model import transposed_layers
from hf_frmerge.checkpoints.quantised.in_place import put_in_place
from hf_frmerge.checkpoints.tensors.floats import DTYPE_CODES
from hf_frmerge.checkpoints.tensors.quantised import FOUR_BIT, PLAIN, is_code, made_by, section_of, way_out
from hf_frmerge.checkpoints.tensors.reader import Checkpoint, some
from hf_frmerge.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hf_frmerge.checkpoints.quantised.form import Format

EXTRA = "pip install 'hf_frmerge[quantised]'"

_ARITHMETIC = ("gptq", "mxfp4", "bitsandbytes", "mlx")

# What a runtime that computes with codes wants to know of activations and caches; plain weights do not need it.
_OF_ACTIVATIONS = frozenset(
    f"{what}_{suffix}"
    for what in ("input", "output", "activation", "k", "v", "q", "kv")
    for suffix in ("scale", "scale_inv", "zero_point", "global_scale", "amax")
)


def dequantise(checkpoint: Checkpoint) -> list[str]:
    """
    Put what a quantised checkpoint's codes stand for in the place of its codes; contents are read when they are asked.

    The formats are those that the compressed-tensors package converts (its own, fp8 with scales of blocks, AutoAWQ's
    and ModelOpt's NVFP4), GPTQ, and the MXFP4 of gpt-oss. They are told by the tensors; the section in `config.json`
    gives what these do not show. A section over plain weights is passed over. What is quantised otherwise is left as
    it is, for `refuse_quantised`. A GGUF file is read so whatever its tensors are.

    Args:
        checkpoint (`Checkpoint`): Full model; it is changed in place.

    Returns:
        `list[str]`: A note, if there was anything to be done.

    Raises:
        CheckpointError: If a package is needed and missing, or what is there cannot be converted.
    """
    if checkpoint.source.is_gguf:
        from hf_frmerge.checkpoints.quantised.gguf import dequantise_gguf

        return dequantise_gguf(checkpoint)
    spec, section = checkpoint.source.spec, section_of(checkpoint.config())
    infos = checkpoint.tensors.values()
    # Not every code looks like one: bitsandbytes packs a matrix into one column.
    if not any(is_code(info) for info in infos) and made_by(infos) is None:
        if not section:
            return []
        checkpoint.quantisation = PLAIN
        return [
            f"The config.json of {spec!r} says that it is quantised, but its weights are plain numbers: they are "
            "merged as these, and the output's config.json does not say so any more."
        ]
    form = _format_of(checkpoint, section)
    if form is None:
        return []
    try:
        groups = form.find(checkpoint)
    except ValueError as error:
        raise CheckpointError(f"{spec!r} is quantised ({form.title}), but {error}. {way_out(form.title)}") from error
    if not groups:
        return []
    if form.title == "GPTQ":
        _refuse_transposed(checkpoint, groups)
    unused = {name: info for name, info in checkpoint.tensors.items() if name.rpartition(".")[2] in _OF_ACTIVATIONS}
    used = put_in_place(checkpoint, form, groups)
    checkpoint.unused = {name: info for name, info in unused.items() if name not in used}
    checkpoint.tensors = {name: info for name, info in checkpoint.tensors.items() if name not in checkpoint.unused}
    return [
        f"{spec!r} is quantised ({form.title}): {len(groups)} weights, such as {some(groups, 1)}, are dequantised to "
        f"{form.dtype} while they are read, and merged as these. The output is not quantised."
    ]


def _format_of(checkpoint: Checkpoint, section: Mapping[str, Any]) -> Format | None:
    """Return the format that tensors and section show; None if it is none of those that can be converted."""
    spec, config = checkpoint.source.spec, checkpoint.config()
    endings = {name.rpartition(".")[2] for name in checkpoint.tensors}
    # MLX names no method, but the sizes of its groups.
    method = str(section.get("quant_method", "mlx" if "group_size" in section else ""))
    kind = _kind_of(endings, method)
    if kind is None:
        return None
    dtype = DTYPE_CODES.get(str(config.get("dtype") or config.get("torch_dtype")), "BF16")
    if kind not in _ARITHMETIC:
        return _format_of_package(spec, kind, section, dtype)
    try:
        return _format_of_arithmetic(kind, section, config.get("model_type"), dtype)
    except ValueError as error:
        raise CheckpointError(f"{spec!r} is quantised ({kind}), but {error}. {way_out(kind)}") from error


def _format_of_arithmetic(kind: str, section: Mapping[str, Any], model_type: object, dtype: str) -> Format:
    """Return a format that takes no package but torch; raises ValueError if it is not known in this form."""
    from hf_frmerge.checkpoints.quantised.arithmetic import gptq, mxfp4
    from hf_frmerge.checkpoints.quantised.bits_and_bytes import bits_and_bytes
    from hf_frmerge.checkpoints.quantised.mlx import mlx

    if kind == "gptq":
        return gptq(section, dtype)
    if kind == "mlx":
        return mlx(section, model_type, dtype)
    return mxfp4(dtype) if kind == "mxfp4" else bits_and_bytes(dtype)


def _kind_of(endings: set[str], method: str) -> str | None:
    """Return the name of a format, from the last parts of the names of tensors and the method in the section."""
    if any(ending.endswith("_scale_inv") for ending in endings):
        return "fp8"
    if endings & {"SCB", *FOUR_BIT}:
        return "bitsandbytes"
    if method == "mxfp4":
        return method if any(ending.endswith("_blocks") for ending in endings) else None
    needed = {
        "gptq": {"qweight"},
        "mlx": {"biases"},
        "compressed-tensors": {"weight_packed", "weight_scale"},
        "awq": {"qweight"},
        "modelopt": {"weight_scale"},
    }
    return method if endings & needed.get(method, set()) else None


def _format_of_package(spec: str, kind: str, section: Mapping[str, Any], dtype: str) -> Format:
    """Return a format that the compressed-tensors package converts."""
    try:
        import compressed_tensors.entrypoints.convert  # noqa: F401

        from hf_frmerge.checkpoints.quantised.formats import open_format
    except ImportError as error:
        raise CheckpointError(
            f"{spec!r} is quantised ({kind}). It can be dequantised while it is read with a package that is not "
            f"installed: {EXTRA}. {way_out(kind)}"
        ) from error
    try:
        return open_format(kind, section, dtype)
    except (AttributeError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{spec!r} is quantised ({kind}) in a way that compressed-tensors does not convert "
            f"({type(error).__name__}: {error}). {way_out(kind)}"
        ) from error


def _refuse_transposed(checkpoint: Checkpoint, groups: Mapping[str, object]) -> None:
    """Raise if a weight belongs to a layer that has it transposed (GPT-2): which way codes lie is not written down."""
    layers = transposed_layers(checkpoint.config(), checkpoint.source.spec)
    transposed = [name for name in layers if name in groups]
    if transposed:
        raise CheckpointError(
            f"{checkpoint.source.spec!r} is quantised (GPTQ), and its class has {some(transposed)} transposed: "
            f"whether the codes are, too, is not written down. {way_out('gptq')}"
        )
