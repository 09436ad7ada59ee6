"""
Read a base with an adapter of any kind on it as one full model: PEFT itself computes the weights, layer by layer.

The model is built without its weights, and PEFT puts the adapter on it. When a weight is read, a copy of its layer
gets the weights of the base in float64 and is folded as `merge_and_unload` folds it. Imports torch and PEFT, which
takes seconds.
"""

from __future__ import annotations

import copy
import json
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from hf_frmerge.checkpoints.adapters.base_copies import PEFT_PREFIX, check_base_copy, copied_from_base
from hf_frmerge.checkpoints.adapters.config import CONFIG_NAME, FOLD_BY_HAND
from hf_frmerge.checkpoints.adapters.folded import Folded, FoldedAdapter, put_in_place, read_wide
from hf_frmerge.checkpoints.adapters.match import find_targets
from hf_frmerge.checkpoints.adapters.patterns import check_pattern
from hf_frmerge.checkpoints.alignment.renames import stack_experts
from hf_frmerge.checkpoints.names.empty_model import build_empty
from hf_frmerge.checkpoints.names.model_names import names_of
from hf_frmerge.checkpoints.quantised.recent import Recent
from hf_frmerge.checkpoints.tensors.reader import ADAPTER_FILE, Checkpoint, open_checkpoint, some
from hf_frmerge.checkpoints.tensors.small_files import read_file, read_json
from hf_frmerge.errors import CheckpointError, NonFiniteError

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from hf_frmerge.checkpoints.source import Source
    from hf_frmerge.checkpoints.tensors.header import TensorInfo, TensorSource

_BYTES_AN_ELEMENT = 40
"""The weight, the change and what it is made of, in float64."""

# What PEFT, torch and the layers raise for configurations that do not fit the weights, or this version.
_ERRORS = (
    ArithmeticError, AssertionError, AttributeError, ImportError, KeyError, IndexError, NotImplementedError,
    RuntimeError, TypeError, ValueError,
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Layer:
    """
    Layer of the empty model that the adapter changes.

    Attributes:
        path: its path in the model.
        module: the layer with the adapter on it.
        own: the layer's own parameters, without values, by their names within the layer.
        infos: where the base stores them.
    """

    path: str
    module: torch.nn.Module
    own: dict[str, torch.nn.Parameter]
    infos: dict[str, TensorInfo]

    def fold(self, source: TensorSource) -> dict[str, NDArray[np.float64]]:
        """Return the weights of the layer with the adapter folded in, by their names within the layer."""
        import torch

        copies: dict[int, Any] = {}
        layer: Any = copy.deepcopy(self.module, copies)
        with torch.no_grad():
            for name, info in self.infos.items():
                parameter = copies.get(id(self.own[name]))
                if parameter is not None and _is_empty(self.own[name]):
                    values = read_wide(source, info, 0, info.numel).astype(np.float64)
                    parameter.data = torch.from_numpy(values.reshape(info.shape))
            # What `merge_and_unload` does with every such layer.
            if hasattr(layer, "unload_and_optionally_merge_module"):
                layer = layer.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
            else:
                layer.merge(safe_merge=False, adapter_names=None)
                layer = layer.get_base_layer()
        made = dict(layer.named_parameters())
        return {name: made[name].detach().double().numpy().reshape(-1) for name in self.infos}


@dataclass(frozen=True)
class _FoldedByPeft(Folded):
    """Weight of a layer that PEFT folds; the layer is computed as a whole, and kept while it is read in pieces."""

    layer: _Layer
    name: str
    checkpoint: Checkpoint
    recent: Recent

    @property
    def adapter(self) -> Checkpoint:
        """The adapter's tensors."""
        return self.checkpoint

    def read_wide(self, source: TensorSource, start: int, stop: int) -> NDArray[np.floating]:
        """Return elements `[start, stop)`."""
        dtype = np.float64 if self.wide_dtype == "F64" else np.float32
        kept = self.recent.get(f"{self.layer.path}.{self.name}", partial(self._compute, source, dtype))
        return kept.view(dtype)[start:stop]

    def _compute(self, source: TensorSource, dtype: type[np.floating]) -> NDArray[np.uint8]:
        return self.layer.fold(source)[self.name].astype(dtype).view(np.uint8)


def fold_by_peft(adapter: Source, model: Checkpoint) -> FoldedAdapter:
    """
    Put the weights that PEFT makes of a model with an adapter in the place of the model's own; read on demand.

    Args:
        adapter (`Source`):
            Adapter of one of the kinds in `FOLDED_BY_PEFT`.
        model (`Checkpoint`):
            Its base; it is changed in place.

    Raises:
        CheckpointError: If PEFT cannot put the adapter on this model, or does not use all of its tensors; or if what
            it makes of a layer takes more than the layer's own weights.
    """
    checkpoint = open_checkpoint(adapter)
    raw = read_json(checkpoint.folder, CONFIG_NAME, adapter.spec)
    _check_patterns(raw, adapter.spec)
    try:
        layers, copies = _layers_of(checkpoint, raw, model)
        recent = Recent()
        folded = {
            layer.infos[name].name: _FoldedByPeft(layer.infos[name], layer, name, checkpoint, recent)
            for layer in layers
            for name in layer.infos
        }
    except _ERRORS as error:
        raise _refusal(checkpoint, _said(error), FOLD_BY_HAND) from error
    _try_one(min(folded.values(), key=lambda each: each.info.numel), model)  # what does not work should be known now
    for name, original in copies.items():
        check_base_copy(checkpoint, checkpoint.tensors[name], model, original.name)
    put_in_place(model, folded)
    model.largest_computed = max(each.info.numel for each in folded.values()) * _BYTES_AN_ELEMENT
    return FoldedAdapter(checkpoint, _targets(checkpoint, layers, next(iter(folded))), frozenset(copies))


def _try_one(weight: _FoldedByPeft, model: Checkpoint) -> None:
    """Raise if PEFT does not fold a layer."""
    try:
        values = weight.read_wide(model, 0, weight.info.numel)
    except NonFiniteError:
        raise
    except _ERRORS as error:  # PEFT says of a layer here what it says of a whole model
        advice = "So it does not with `merge_and_unload`, either. It cannot be merged: leave it out."
        raise _refusal(weight.checkpoint, _said(error), advice) from error
    if not np.isfinite(values).all():
        raise _refusal(weight.checkpoint, f"what it makes of {weight.info.name} is not finite", FOLD_BY_HAND)


def _said(error: Exception) -> str:
    return f"{' '.join(str(error).split()).rstrip('.')[:400]} ({type(error).__name__})"


def _refusal(adapter: Checkpoint, reason: str, advice: str) -> CheckpointError:
    spec = adapter.source.spec
    return CheckpointError(f"Adapter {spec!r}: PEFT cannot fold it into its base layer by layer: {reason}. {advice}")


def _layers_of(
    checkpoint: Checkpoint, raw: dict[str, Any], model: Checkpoint
) -> tuple[list[_Layer], dict[str, TensorInfo]]:
    """Put the adapter on the empty model; return the layers that it changes, and what it has copies of."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    empty: Any = build_empty(model.config(), model.source.spec)
    table = names_of(empty)
    _make_placeholders(empty, tuple(raw.get("modules_to_save") or ()))
    own = dict(empty.named_parameters(remove_duplicate=False))
    if table is not None and raw.get("target_parameters"):
        stack_experts(model, table, {name: tuple(each.shape) for name, each in own.items()})
    peft_model, copies = _put_on(checkpoint, raw, empty)
    layers: list[_Layer] = []
    shapes = {name: info.shape for name, info in model.tensors.items()}
    for path, module in peft_model.base_model.model.named_modules():
        inside_another = layers and path.startswith(f"{layers[-1].path}.")
        if inside_another or not isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            continue
        inner = _own_of(path, own)
        known = {f"{path}.{name}": tuple(each.shape) for name, each in inner.items()}
        targets = find_targets(checkpoint.source.spec, known, shapes, lambda: table)
        infos = {name: model.tensors[targets[f"{path}.{name}"]] for name in inner}
        wrong = [info.name for name, info in infos.items() if info.shape != tuple(inner[name].shape)]
        if wrong:
            raise ValueError(f"{some(wrong)} of the base has another shape in memory")
        layers.append(_Layer(path, cast("torch.nn.Module", module), inner, infos))
    changed = [name for name, each in own.items() if each.dim() == 1 and not _is_empty(each)]
    outside = [name for name in changed if not any(name.startswith(f"{layer.path}.") for layer in layers)]
    if outside or not layers:
        raise ValueError(f"it changes {some(outside) if outside else 'no layer'} beside its layers")
    return layers, _originals(checkpoint, copies, layers)


def _put_on(checkpoint: Checkpoint, raw: dict[str, Any], empty: Any) -> tuple[Any, list[str]]:
    """Put the adapter on the empty model; return PEFT's model, and the tensors that are copies of the base's."""
    from peft import PeftConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file

    with TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # A copy, since the adapter may be anywhere; without what is about other models.
        config = {**raw, "base_model_name_or_path": None, "auto_mapping": None, "inference_mode": True}
        Path(folder, CONFIG_NAME).write_text(json.dumps(config))
        Path(folder, ADAPTER_FILE).write_bytes(read_file(checkpoint.folder, ADAPTER_FILE, checkpoint.source.spec))
        stored = load_file(Path(folder, ADAPTER_FILE))
        peft_config = PeftConfig.from_pretrained(folder)
        unknown = [key for key, value in raw.items() if value and key not in peft_config.to_dict()]
        if unknown:
            raise ValueError(f"this version does not know {some(unknown)} in {CONFIG_NAME}")
        peft_model: Any = get_peft_model(empty, peft_config)
        expected = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
        # A bias that the adapter trains has the name of a copy.
        copies = [name for name in stored if copied_from_base(name) and name not in expected]
        stored = {name: each for name, each in stored.items() if name not in copies}
        result: Any = set_peft_model_state_dict(peft_model, stored)
    lost = [*result.unexpected_keys, *(expected.keys() - stored.keys())]
    if lost:
        raise ValueError(f"{some(sorted(lost))} of the adapter and the model do not fit together")
    return peft_model, copies


def _own_of(path: str, own: dict[str, torch.nn.Parameter]) -> dict[str, torch.nn.Parameter]:
    """Return the parameters of one layer by their names within it; another must not share them."""
    inner = {name.removeprefix(f"{path}."): each for name, each in own.items() if name.startswith(f"{path}.")}
    tied = [f"{path}.{name}" for name, each in inner.items() if sum(each is other for other in own.values()) > 1]
    if tied:
        raise ValueError(f"the model ties {some(tied)} to another weight, and both would change")
    return inner


def _originals(checkpoint: Checkpoint, copies: list[str], layers: list[_Layer]) -> dict[str, TensorInfo]:
    """Return, by the names of an adapter's copies, where the base stores what they are copies of."""
    places = {f"{PEFT_PREFIX}{layer.path}.{name}": info for layer in layers for name, info in layer.infos.items()}
    originals = {name: places.get(str(copied_from_base(name))) for name in copies}
    found = {name: info for name, info in originals.items() if info and info.shape == checkpoint.tensors[name].shape}
    if len(found) < len(copies):
        raise ValueError(f"it carries {some(originals.keys() - found.keys())}, and changes no such layer of the model")
    return found


def _check_patterns(raw: dict[str, Any], spec: str) -> None:
    """Look at the regular expressions of others before PEFT uses them."""
    for field in ("target_modules", "exclude_modules", "layers_pattern", "rank_pattern", "alpha_pattern"):
        value = raw.get(field)
        for pattern in [value] if isinstance(value, str) else value if isinstance(value, dict) else ():
            check_pattern(pattern, field, spec)


def _make_placeholders(empty: torch.nn.Module, whole: tuple[str, ...]) -> None:
    """
    Give all parameters of an empty model NaN in float64 for values; matrices take the memory of one number.

    NaN, since what an adapter takes of the base when it is put on is then seen in the result. Layers that the adapter
    stores whole have memory of their own, to be written to.
    """
    import torch

    made: dict[int, torch.nn.Parameter] = {}
    for path, module in empty.named_modules():
        is_whole = any(path.endswith(name) or f"{name}." in f"{path}." for name in whole)
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in made:
                nan = torch.full((), float("nan"), dtype=torch.float64)
                values = nan.expand(parameter.shape)
                values = values.clone() if is_whole or parameter.dim() < 2 else values
                made[id(parameter)] = torch.nn.Parameter(values, requires_grad=False)
            module._parameters[name] = made[id(parameter)]


def _is_empty(parameter: torch.nn.Parameter) -> bool:
    return parameter.numel() == 0 or bool(parameter.detach().reshape(-1)[0].isnan())


def _targets(checkpoint: Checkpoint, layers: list[_Layer], other: str) -> dict[str, str]:
    """Return the tensor of the model that each of the adapter's belongs to; shared ones are given to `other`."""
    targets = dict.fromkeys(checkpoint.tensors, other)
    for layer in layers:
        first = next(iter(layer.infos.values())).name
        targets |= {name: first for name in checkpoint.tensors if f".{layer.path}." in f".{name}."}
    return targets
