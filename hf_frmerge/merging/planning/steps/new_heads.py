"""Heads that adapters bring along whole, because their base has none: classifiers on a language model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hf_frmerge.checkpoints.names.task_model import find_task_model
from hf_frmerge.checkpoints.tensors.reader import some
from hf_frmerge.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hf_frmerge.checkpoints.adapters.adapter import Adapter
    from hf_frmerge.checkpoints.tensors.header import TensorInfo
    from hf_frmerge.checkpoints.tensors.reader import Checkpoint
    from hf_frmerge.merging.planning.plan import Expert


OTHER_HEAD = "of a head that the output's class does not have"


@dataclass(frozen=True)
class NewHead:
    """
    Head that all adapters bring along, and that the base lacks.

    Attributes:
        tensors: name -> the tensor of the first adapter.
        left_out: tensors of the base that the class with this head does not have, such as another head.
        config: entries of `config.json` that name the class and its labels.
        notes: what the user should know.
    """

    tensors: dict[str, TensorInfo] = field(default_factory=dict)
    left_out: frozenset[str] = frozenset()
    config: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def find_new_head(experts: Sequence[Expert], base: Checkpoint | None) -> NewHead:
    """
    Find the head that adapters bring along, and the class of the model that has it.

    Args:
        experts: Experts, adapters matched to the base.
        base: Base model.

    Returns:
        `NewHead`: Empty if the base has all tensors that adapters change.

    Raises:
        CheckpointError: If an expert lacks the head, heads differ in size, or no class of transformers has the head
            and all other tensors from the base.
    """
    first = next((expert.adapter for expert in experts if expert.adapter and expert.adapter.new_tensors), None)
    if first is None or base is None:
        return NewHead()
    tensors = {name: first.dense[name] for name in sorted(first.new_tensors)}
    for expert in experts:
        _check_same(first, expert, tensors)
    task = first.config.raw.get("task_type")
    # A head may have several layers; that of the labels is the one with which all shapes are right.
    sizes = sorted({info.shape[0] for info in tensors.values() if info.shape})
    shapes = {name: info.shape for name, info in tensors.items()}
    models = (find_task_model(base.config(), base.source.spec, task, n_labels) for n_labels in sizes)
    model = next((each for each in models if each is not None and each.fits(shapes)), None)
    if model is None:
        raise CheckpointError(
            f"Adapter {first.spec!r} brings along {some(tensors)}, a head that {base.source.spec!r} does not have, "
            f"and transformers has no class with this head for its task_type {task!r}. {_ADVICE}"
        )
    in_memory = model.names.canonical(base.tensors) if model.names else {name: name for name in base.tensors}
    missing = sorted(model.shapes.keys() - set(in_memory.values()) - tensors.keys())
    if missing:
        raise CheckpointError(
            f"{model.config['architectures'][0]} with the head of adapter {first.spec!r} also has {some(missing)}, "
            f"which neither {base.source.spec!r} nor the adapter has: it was random when the adapter was trained, and "
            "was not saved. Train it with `modules_to_save` naming this module, too."
        )
    left_out = frozenset(name for name, own in in_memory.items() if own not in model.shapes)
    class_name = model.config["architectures"][0]
    note = (
        f"The adapters bring along {some(tensors)}, which {base.source.spec!r} does not have: the head is merged as "
        f"it is, and the output is a {class_name} with {model.n_labels} labels, in the adapters' order."
    )
    others = (
        [f"{some(sorted(left_out))} of {base.source.spec!r} is no part of it and is left out."] if left_out else []
    )
    return NewHead(tensors, left_out, model.config, (note, *others))


_ADVICE = (
    "Give every adapter its model once, and merge these:\n"
    "    from peft import PeftModel\n"
    "    from transformers import AutoModelForSequenceClassification  # or the class it was trained with\n"
    '    model = AutoModelForSequenceClassification.from_pretrained("THE BASE", num_labels=NUMBER)\n'
    '    PeftModel.from_pretrained(model, "THE ADAPTER").merge_and_unload().save_pretrained("with-head")'
)


def _check_same(first: Adapter, expert: Expert, tensors: dict[str, TensorInfo]) -> None:
    other = expert.adapter
    if other is None or other.new_tensors != first.new_tensors:
        raise CheckpointError(
            f"Adapter {first.spec!r} brings along {some(tensors)}, a head that its base does not have, and "
            f"{expert.spec!r} brings {some(sorted(other.new_tensors)) or 'none' if other else 'none'}: heads of "
            "different tasks have no mean. Merge adapters of one task."
        )
    for name, info in tensors.items():
        if other.dense[name].shape != info.shape:
            raise CheckpointError(
                f"The heads of adapters {first.spec!r} and {other.spec!r} differ in size: {name} is "
                f"{list(info.shape)} and {list(other.dense[name].shape)}. Classifiers with different labels have no "
                "mean; merge adapters of one task."
            )
