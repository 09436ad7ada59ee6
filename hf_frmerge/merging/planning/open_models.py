"""Open the models of a merge: full ones, adapters, and adapters that are read as full models."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import TYPE_CHECKING

from hf_frmerge.checkpoints.adapters.config import CONFIG_NAME, kind_folded_by_peft
from hf_frmerge.checkpoints.folders import open_folder
from hf_frmerge.checkpoints.names.model_names import read_names
from hf_frmerge.checkpoints.tensors.quantised import is_quantised, refuse_quantised
from hf_frmerge.checkpoints.tensors.reader import open_checkpoint
from hf_frmerge.checkpoints.tensors.small_files import read_json
from hf_frmerge.errors import ArgumentError
from hf_frmerge.merging.planning.model_class import read_structure
from hf_frmerge.merging.planning.plan import Expert
from hf_frmerge.merging.planning.steps.set_apart import without_ruled

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from hf_frmerge.checkpoints.adapters.adapter import Adapter
    from hf_frmerge.checkpoints.adapters.folded import FoldedAdapter
    from hf_frmerge.checkpoints.source import Source
    from hf_frmerge.checkpoints.tensors.reader import Checkpoint
    from hf_frmerge.merging.arguments.tensor_rules import TensorRules


def open_models(sources: Sequence[Source], rules: TensorRules, with_base: bool) -> tuple[list[Expert], list[str]]:
    """
    Open the models of a merge.

    Adapters of kinds that have no low-rank factors, and `base+adapter`, are opened as full models, whose weights are
    computed when they are read.

    Args:
        sources: The experts, then the base if there is one.
        rules: Rules of the user for single tensors.
        with_base: Whether the last one is the base.

    Returns:
        `tuple`: The models in the same order, and notes about what is read otherwise than it is stored.
    """
    models: list[Expert] = []
    notes: list[str] = []
    base = sources[-1] if with_base else None
    for source in sources:
        if source.kind == "full":
            model = _open_full(source, notes)
        elif kind := _kind_folded_by_peft(source):
            model = _open_on_base(source, base, kind, notes)
        else:
            from hf_frmerge.checkpoints.adapters.adapter import open_adapter

            model = Expert(source, adapter=without_ruled(open_adapter(source), rules))
        models.append(model)
    return models, notes


def match_adapters(experts: list[Expert], base: Expert | None, to_adapter: bool, rules: TensorRules) -> list[Expert]:
    """Match the modules of adapters with the tensors of the base."""
    if base is None or base.checkpoint is None:
        return experts
    match = _matcher(base.checkpoint, into_adapter=to_adapter)
    return [
        # Rules are looked at again, by the base's names.
        replace(expert, adapter=without_ruled(match(expert.adapter), rules)) if expert.adapter is not None else expert
        for expert in experts
    ]


def _matcher(checkpoint: Checkpoint, *, into_adapter: bool) -> Callable[[Adapter], Adapter]:
    """Return what matches adapters with a full model."""
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    # Once for all adapters, and only if one asks.
    structure = functools.cache(lambda: read_structure(checkpoint))
    names = functools.cache(lambda: read_names(checkpoint.config(), checkpoint.source.spec))

    def match(adapter: Adapter) -> Adapter:
        matched = adapter.match(shapes, structure, names, into_adapter=into_adapter)
        matched.check_base_layers(checkpoint)
        return matched

    return match


def _open_full(source: Source, notes: list[str]) -> Expert:
    checkpoint = open_checkpoint(source)
    notes += _dequantise(checkpoint)
    if source.adapter is None:
        return Expert(source, checkpoint)
    refuse_quantised(checkpoint)
    notes.append(
        f"{source.spec!r} is merged as one model: its adapter is folded in, without rounding, while it is read."
    )
    return Expert(source, checkpoint, folded=_fold(source.adapter, checkpoint))


def _dequantise(checkpoint: Checkpoint) -> list[str]:
    """Let a model of codes be read as numbers; return notes on it."""
    if not is_quantised(checkpoint):
        return []
    from hf_frmerge.checkpoints.quantised.dequantise import dequantise  # on use: most models are plain numbers

    return dequantise(checkpoint)


def _fold(adapter: Source, checkpoint: Checkpoint) -> FoldedAdapter:
    """Let a full model be read with an adapter on it."""
    if _kind_folded_by_peft(adapter):
        from hf_frmerge.checkpoints.adapters.by_peft import fold_by_peft

        return fold_by_peft(adapter, checkpoint)
    from hf_frmerge.checkpoints.adapters.adapter import open_adapter
    from hf_frmerge.checkpoints.adapters.folded import fold

    return fold(checkpoint, _matcher(checkpoint, into_adapter=False)(open_adapter(adapter)))


def _open_on_base(source: Source, base: Source | None, kind: str, notes: list[str]) -> Expert:
    """Open an adapter that is more than low-rank factors, as a full model."""
    if base is None or base.kind != "full":
        named = read_json(open_folder(source.path), CONFIG_NAME, source.spec).get("base_model_name_or_path")
        raise ArgumentError(
            f"{source.spec!r} is an adapter of kind {kind}, which is more than low-rank factors and is folded into "
            f"its base: pass the model it was trained from as base_model (--base-model; its config names {named!r})."
        )
    checkpoint = open_checkpoint(replace(base, spec=source.spec, adapter=source))
    _dequantise(checkpoint)  # the base itself is noted
    refuse_quantised(checkpoint)
    notes.append(
        f"{source.spec!r} is an adapter of kind {kind}: PEFT folds it into {base.spec!r} while it is read, layer by "
        "layer, and it is merged as a full model."
    )
    return Expert(source, checkpoint, folded=_fold(source, checkpoint))


def _kind_folded_by_peft(source: Source) -> str | None:
    return kind_folded_by_peft(open_folder(source.path), source.spec)
