"""
Read the tensors of a GGUF file as transformers would: its names, and what llama.cpp does to weights undone.

The gguf package has the arithmetic of the codes, transformers the tables of names and of what llama.cpp does: it
permutes the rows of q and k, adds one to norms, turns and joins matrices. Imports torch and transformers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

from hf_frmerge.checkpoints.gguf.folder import GgufFolder
from hf_frmerge.checkpoints.gguf.header import EXTRA, FLOATS, plain_dtype, read_gguf_header
from hf_frmerge.checkpoints.gguf.made_files import is_rotation
from hf_frmerge.checkpoints.names.empty_model import build_empty
from hf_frmerge.checkpoints.quantised.form import TORCH_DTYPES, Format, Group, Tensors
from hf_frmerge.checkpoints.quantised.in_place import put_in_place
from hf_frmerge.checkpoints.tensors.floats import DTYPE_CODES
from hf_frmerge.checkpoints.tensors.reader import Checkpoint, TensorInfo, some
from hf_frmerge.errors import CheckpointError

_ORIGINALS = "Merge the checkpoints that it was made from."


def dequantise_gguf(checkpoint: Checkpoint) -> list[str]:
    """
    Put the weights that transformers makes of a GGUF file in the place of its tensors.

    Args:
        checkpoint: Model in one or several GGUF files; it is changed in place.

    Returns:
        `list[str]`: Notes on how it is read, and on what the files that are made of it lack.

    Raises:
        CheckpointError: If transformers does not know the architecture, or file and config are not of one model.
    """
    spec, folder = checkpoint.source.spec, checkpoint.folder
    assert isinstance(folder, GgufFolder)
    folder.check_architecture()
    headers = [read_gguf_header(folder, file, spec) for file in checkpoint.files]
    tensors = [tensor for header in headers for tensor in header.tensors]
    types = {tensor.name: tensor.type for tensor in tensors}
    _refuse_unknown_codes(set(types.values()), spec)
    table = _table(checkpoint, headers[0].architecture)
    try:
        groups, by_rows = _groups(checkpoint.tensors, {tensor.name: tensor.shape for tensor in tensors}, table)
    except ValueError as error:
        raise CheckpointError(
            f"{spec!r} does not fit its config: {error}. Put the config.json of the model it was made from beside it. "
            f"{_ORIGINALS}"
        ) from error
    config = checkpoint.config()
    stated = DTYPE_CODES.get(str(config.get("dtype") or config.get("torch_dtype")), "BF16")
    dtype = plain_dtype(types.values()) or stated
    form = Format("GGUF", dtype, lambda _: groups, _process(table, types, dtype), frozenset(by_rows))
    used = put_in_place(checkpoint, form, groups)
    checkpoint.unused = {name: info for name, info in checkpoint.tensors.items() if name in types.keys() - used}
    checkpoint.tensors = {name: info for name, info in checkpoint.tensors.items() if name not in checkpoint.unused}
    kinds = some(sorted({Type(kind).name for kind in types.values()}), 6)
    return [
        f"{spec!r} is a GGUF file ({kinds}): its {len(groups)} weights, such as {next(iter(groups))}, are read as the "
        f"{dtype} that transformers makes of them, and merged as these. The output is not quantised.",
        *folder.notes,
    ]


@dataclass(frozen=True)
class _Table:
    """
    What transformers knows of the tensors of a file.

    Attributes:
        names: tensor in the file -> weight of the model; stacks of experts are told by the processor alone.
        processor: undoes what llama.cpp does to a tensor.
        own_names: weight -> the name it gets. If it is tied, and stored once, that is the model's first name for it.
        shapes: shapes of the weights.
        needed: names of the weights that must be stored.
    """

    names: Mapping[str, str]
    processor: TensorProcessor
    own_names: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    needed: frozenset[str]

    def weight_of(self, name: str) -> str | None:
        """Return the weight that a tensor of the file is, or is a part of; None if the model has none for it."""
        weight = self.names.get(name)
        if weight is None:
            made: Tensors = {}
            try:
                self.apply(name, np.zeros((1, 1, 1), np.float32), made)  # a stack of one expert of one number
            except (KeyError, ValueError):
                return None
            weight = next(iter(made))
        return self.own_names.get(weight, weight)

    def apply(self, name: str, values: np.ndarray, weights: Tensors) -> None:
        """Add what a tensor of the file is, or is a part of, to the weights."""
        made = self.processor.process(
            weights=values, name=name, tensor_key_mapping=self.names, parsed_parameters={"tensors": weights}
        )
        if made.name is not None:
            weights[self.names[made.name]] = torch.from_numpy(np.ascontiguousarray(made.weights))

    def leaves(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether transformers takes a tensor as it is."""
        if name not in self.names:
            return False
        values = np.broadcast_to(np.float32(-1), shape)  # takes no memory
        made = self.processor.process(
            weights=values, name=name, tensor_key_mapping=self.names, parsed_parameters={"tensors": {}}
        )
        return made.name == name and made.weights is values


def _process(table: _Table, types: Mapping[str, int], dtype: str) -> Callable[[Tensors], Tensors]:
    """Return what makes weights of stored tensors; `types`: tensor -> number of its ggml type."""

    def process(tensors: Tensors) -> Tensors:
        weights: Tensors = {}
        for name, tensor in tensors.items():
            is_plain = tensor.is_floating_point()
            values = tensor.float().numpy() if is_plain else dequantize(tensor.numpy(), Type(types[name]))
            table.apply(name, values, weights)
        return {table.own_names.get(name, name): each.to(TORCH_DTYPES[dtype]) for name, each in weights.items()}

    return process


def _table(checkpoint: Checkpoint, architecture: str) -> _Table:
    """Ask transformers for its tables, for the model that the config describes."""
    spec = checkpoint.source.spec
    model = build_empty(checkpoint.config(), spec)
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=model.config.to_dict())
    try:
        names = get_gguf_hf_weights_map(_TopLevel(model), processor, model_type=architecture)
    except (AttributeError, KeyError, NotImplementedError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{spec!r} is a GGUF file of the architecture {architecture!r}, of which transformers could not tell the "
            f"names of the tensors in a {type(model).__name__} ({type(error).__name__}: {error}). {_ORIGINALS}"
        ) from error
    first: dict[int, str] = {}
    parameters = list(model.named_parameters(remove_duplicate=False))
    first_names = {name: first.setdefault(id(parameter), name) for name, parameter in parameters}
    stored = {names.get(name) for name in checkpoint.tensors}
    own_names = {name: name if other in stored else other for name, other in first_names.items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return _Table(names, processor, own_names, shapes, frozenset(first.values()))


class _TopLevel:
    """A model without the modules of its modules: for each the tables would be made anew, which takes a minute."""

    def __init__(self, model: torch.nn.Module, config: Any = None) -> None:
        self._model, self._children = model, () if config else tuple(model.named_children())
        self.config = config or model.config
        self.state_dict = model.state_dict

    def named_children(self) -> list[tuple[str, _TopLevel]]:
        """Return the modules of the model, which have none themselves."""
        return [(name, _TopLevel(child, self.config)) for name, child in self._children]


def _groups(
    stored: Mapping[str, TensorInfo], shapes: Mapping[str, tuple[int, ...]], table: _Table
) -> tuple[dict[str, Group], set[str]]:
    """
    Return by name of a weight its shape and the tensors it is made of, and the names of those that are read by rows.

    Args:
        stored: Tensors of the file by name.
        shapes: Shapes of what they stand for.
        table: Where they belong.

    Raises:
        ValueError: If the model has no weight for a tensor, a tensor none for a weight, or shapes differ.
    """
    parts: dict[str, list[TensorInfo]] = {}
    for name, info in stored.items():
        weight = table.weight_of(name)
        if weight is not None:
            parts.setdefault(weight, []).append(info)
        elif not is_rotation(name):
            raise ValueError(f"the model has no weight for the tensor {name!r}")
    missing = sorted(table.needed - parts.keys())
    if missing:
        raise ValueError(f"the file holds no tensor for {some(missing)}")
    by_rows = set()
    for weight, infos in parts.items():
        wanted = table.shapes[weight]
        if sum(math.prod(shapes[info.name]) for info in infos) != math.prod(wanted):
            found = ", ".join(f"{info.name} {list(shapes[info.name])}" for info in infos)
            raise ValueError(f"{weight} has the shape {list(wanted)}, the file holds {found}")
        [first, *others] = infos
        if wanted == shapes[first.name] and wanted and not others and table.leaves(first.name, wanted):
            by_rows.add(weight)
    return {weight: (table.shapes[weight], tuple(infos)) for weight, infos in parts.items()}, by_rows


def _refuse_unknown_codes(kinds: set[int], spec: str) -> None:
    """Raise if there are codes that the gguf package does not dequantise."""
    for kind in kinds - FLOATS.keys():
        try:
            dequantize(np.zeros((1, GGML_QUANT_SIZES[Type(kind)][1]), np.uint8), Type(kind))
        except NotImplementedError as error:
            raise CheckpointError(
                f"{spec!r} is a GGUF file with tensors of type {Type(kind).name}, which the gguf package does not "
                f"dequantise. A newer one may: {EXTRA}. {_ORIGINALS}"
            ) from error
