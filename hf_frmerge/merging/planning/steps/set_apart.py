"""Tensors that rules of the user set apart from the merge: left out, or taken whole from one model."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hf_frmerge.checkpoints.alignment.align import AlignedTensor
from hf_frmerge.checkpoints.alignment.class_order import n_classes
from hf_frmerge.checkpoints.model_structure import may_be_tied
from hf_frmerge.checkpoints.names.empty_model import build_empty
from hf_frmerge.checkpoints.names.model_names import names_of
from hf_frmerge.checkpoints.tensors.reader import some
from hf_frmerge.errors import ArgumentError, CheckpointError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from hf_frmerge.checkpoints.adapters.adapter import Adapter
    from hf_frmerge.merging.arguments.tensor_rules import TensorRules
    from hf_frmerge.merging.planning.plan import Expert

ON_REQUEST = "left out on request"
NOT_TAKEN = "not used, as another model's are taken"

# Entries of config.json that belong to a head: they come with the head that is taken.
_OF_HEADS = ("architectures", "id2label", "label2id", "problem_type")


def without_ruled(adapter: Adapter, rules: TensorRules) -> Adapter:
    """Return an adapter without the modules that rules decide about; `set_apart` has their stored names."""
    dropped = {name for name in (*adapter.deltas, *adapter.dense) if rules.decides(name)}
    if not dropped:
        return adapter
    stored = {part.name: name for name, delta in adapter.deltas.items() if name in dropped for part in delta.stored}
    stored |= {info.name: name for name, info in adapter.dense.items() if name in dropped}
    return replace(
        adapter,
        deltas={name: delta for name, delta in adapter.deltas.items() if name not in dropped},
        dense={name: info for name, info in adapter.dense.items() if name not in dropped},
        base_layers={name: info for name, info in adapter.base_layers.items() if name not in dropped},
        new_tensors=adapter.new_tensors - dropped,
        set_apart={**adapter.set_apart, **stored},
    )


def taken_tensors(rules: TensorRules, models: Mapping[int, Expert]) -> list[AlignedTensor]:
    """
    Return the tensors that are copied on request; the donor of each is the index of its model.

    Args:
        rules: Rules of the user.
        models: Index -> model; -1 is the base.

    Raises:
        ArgumentError: If a rule matches nothing, or says of a tensor what another rule contradicts.
    """
    taken: dict[str, AlignedTensor] = {}
    for pattern, index in rules.take:
        model = models[index]
        if model.checkpoint is None:
            raise ArgumentError(
                f"`take` asks for {pattern.pattern!r} of {model.spec!r}, an adapter, which has changes of its base "
                "and not whole tensors. Fold it into its base first (frmerge merge ADAPTER --base-model BASE) and "
                "name the result."
            )
        stored = model.checkpoint.tensors
        names = [name for name in stored if pattern.search(name) and name not in model.checkpoint.aliases]
        if not names:
            raise ArgumentError(_matches_nothing("take", pattern.pattern, stored, f"of {model.spec!r}"))
        for name in names:
            if rules.leaves_out(name) or (name in taken and taken[name].donor != index):
                raise ArgumentError(
                    f"{name!r} matches the rule {pattern.pattern!r} of `take` and another rule that says otherwise. "
                    "Write rules that have no tensor in common."
                )
            info = stored[name]
            taken[name] = AlignedTensor(name, info.dtype, info.shape, "copy", index)
    return list(taken.values())


def check_rules_match(rules: TensorRules, models: Sequence[Expert]) -> None:
    """
    Check the rules against all names, before models are matched, as it may matter.

    Raises:
        ArgumentError: If a rule matches no tensor of any model, or `leave_out` matches all of them.
    """
    names = _all_names(models)
    patterns = [("leave_out", pattern) for pattern in rules.leave_out] + [("take", p) for p, _ in rules.take]
    for option, pattern in patterns:
        if not any(pattern.search(name) for name in names):
            raise ArgumentError(_matches_nothing(option, pattern.pattern, names, "of the models"))
    if all(rules.leaves_out(name) for name in names):
        raise ArgumentError(
            "`leave_out` matches every tensor of the models, so there is nothing left to merge. Write rules that "
            "match less."
        )


def reasons_of(rules: TensorRules, models: Sequence[Expert], taken: Collection[str]) -> dict[str, str]:
    """Return the reason for every tensor of the models that rules keep out of the output."""
    return {
        name: ON_REQUEST if rules.leaves_out(name) else NOT_TAKEN
        for name in _all_names(models)
        if rules.decides(name) and name not in taken
    }


def config_for_taken(donor: Expert, taken: Sequence[AlignedTensor], models: Mapping[int, Expert]) -> dict[str, Any]:
    """
    Return the changes of the donor's `config.json` with which its class has a place for the tensors that are taken.

    Nothing changes if the donor has tensors of these names and sizes itself, and no row in them stands for another
    label. Else they are a head, and class and labels come with it.

    Args:
        donor: Model whose config the output gets.
        taken: Tensors that are taken, with the index of their model.
        models: Index -> model.

    Raises:
        CheckpointError: If the tensors fit no class with these entries.
    """
    own, labels = donor.weights.tensors, donor.weights.config().get("id2label")

    def is_foreign(tensor: AlignedTensor) -> bool:
        theirs = models[tensor.donor].weights.config()
        has_row_for_each = tensor.shape[:1] == (n_classes(theirs),) and may_be_tied(tensor.name)
        is_other_head = has_row_for_each and theirs.get("id2label") != labels
        return tensor.name not in own or own[tensor.name].shape != tensor.shape or is_other_head

    foreign = {tensor.name: tensor for tensor in taken if is_foreign(tensor)}
    if not foreign:
        return {}
    config = {key: value for key, value in donor.weights.config().items() if key not in ("num_labels", *_OF_HEADS)}
    for model in (models[index] for index in dict.fromkeys(tensor.donor for tensor in foreign.values())):
        entries = _head_entries(model.weights.config())
        empty = build_empty({**config, **entries}, model.spec)
        names = names_of(empty)
        in_memory = names.canonical(foreign) if names else {name: name for name in foreign}
        shapes = {name: tuple(tensor.shape) for name, tensor in empty.state_dict().items()}
        if all(shapes.get(in_memory[name]) == tensor.shape for name, tensor in foreign.items()):
            return entries
    raise CheckpointError(
        f"The config.json of {donor.spec!r}, which the output gets, has no place for {some(foreign)} as "
        f"{some(repr(models[t.donor].spec) for t in foreign.values())} has them, not even with the labels from there. "
        "Take tensors of the sizes it has, or leave these out."
    )


def _head_entries(config: Mapping[str, Any]) -> dict[str, Any]:
    entries = {key: config[key] for key in _OF_HEADS if key in config}
    if "id2label" not in entries:  # transformers takes two labels then
        entries |= {"id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "label2id": {"LABEL_0": 0, "LABEL_1": 1}}
    return entries


def left_out_note(names: Collection[str]) -> str:
    """Say what it means that the output lacks tensors which the model has whose config it gets."""
    return (
        f"The output lacks {some(names)}, on request. If the class in its config.json has them, transformers fills "
        "them with untrained values when it loads the model: train them, or take them from an expert (--take "
        "REGEX=EXPERT)."
    )


def _all_names(models: Sequence[Expert]) -> list[str]:
    full = [name for model in models if model.checkpoint for name in model.checkpoint.tensors]
    adapters = [model.adapter for model in models if model.adapter]
    changed = [name for a in adapters for name in (*a.deltas, *a.dense, *a.set_apart.values())]
    return list(dict.fromkeys([*full, *changed]))


def _matches_nothing(option: str, text: str, names: Collection[str], owner: str) -> str:
    return (
        f"`{option}`: {text!r} matches none of the tensors {owner}, such as {some(list(names)[-3:])}. Correct it, or "
        "leave it out."
    )
