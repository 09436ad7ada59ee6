"""Refuse models whose tensors do not belong together, with what differs and what helps."""

from __future__ import annotations

import re
from collections.abc import Sequence

from hf_frmerge.checkpoints.alignment.class_order import n_classes, without_heads
from hf_frmerge.checkpoints.alignment.token_rows import mapped_shape
from hf_frmerge.checkpoints.model_structure import may_be_tied
from hf_frmerge.checkpoints.tensors.reader import Checkpoint, TensorInfo, some
from hf_frmerge.errors import CheckpointError

# Only used to word an error: what is merged never depends on what a tensor is called.
_EMBEDDING = re.compile("embed|wte|lm_head|shared")


def refuse_kinds(checkpoints: Sequence[Checkpoint]) -> None:
    """Raise `CheckpointError` if a tensor has floats in one model and integers in another."""
    reference = checkpoints[0]
    for checkpoint in checkpoints[1:]:
        wrong = [
            f"{name} is {info.dtype} in {reference.source.spec!r} and {checkpoint.tensors[name].dtype} here"
            for name, info in reference.tensors.items()
            if name in checkpoint.tensors and checkpoint.tensors[name].is_float != info.is_float
        ]
        if wrong:
            raise CheckpointError(
                f"{checkpoint.source.spec!r} stores numbers of another kind: {some(wrong)}. If it is quantised, "
                "dequantise it first."
            )


def refuse_names(checkpoints: Sequence[Checkpoint], left_out: set[str]) -> None:
    """Raise `CheckpointError` if a model lacks a float tensor that another has, but for those that are left out."""
    reference = checkpoints[0]
    wanted = {name for name, info in reference.tensors.items() if info.is_float} - left_out
    for checkpoint in checkpoints[1:]:
        present = {name for name, info in checkpoint.tensors.items() if info.is_float} - left_out
        missing = sorted(wanted - present)
        extra = sorted(present - wanted)
        if not missing and not extra:
            continue
        parts = []
        if missing:
            parts.append(f"it lacks {len(missing)} tensors ({some(missing)})")
        if extra:
            parts.append(f"it has {len(extra)} others ({some(extra)})")
        raise CheckpointError(
            f"{checkpoint.source.spec!r} and {reference.source.spec!r} do not have the same tensors: "
            f"{' and '.join(parts)}. {_names_hint(wanted, present, missing, extra, checkpoint, reference)}"
        )


def _names_hint(
    wanted: set[str],
    present: set[str],
    missing: list[str],
    extra: list[str],
    checkpoint: Checkpoint,
    other: Checkpoint,
) -> str:
    for longer, shorter, owner in ((present, wanted, checkpoint), (wanted, present, other)):
        prefix = _common_prefix(longer, shorter)
        if prefix:
            return (
                f"The names in {owner.source.spec!r} have the prefix {prefix!r} that the other's have not: without it "
                "they match. Take it off with safetensors (`load_file`, then `save_file` under "
                f"`name.removeprefix({prefix!r})`, keeping the rest of the folder). Loading it with a class that does "
                "not know the prefix would start from random weights."
            )
    stored = {**checkpoint.tensors, **other.tensors}
    has_matrix = any(name in stored and len(stored[name].shape) == 2 for name in (*missing, *extra))  # as heads are
    if len(missing) + len(extra) == 1 and has_matrix:
        return (
            "If one of the two ties this weight to another and the other trained it separately, give the first a copy "
            "of its own: load it, `model.config.tie_word_embeddings = False`, `model.get_output_embeddings().weight = "
            "torch.nn.Parameter(model.get_input_embeddings().weight.detach().clone())`, and save it."
        )
    if has_matrix and all(may_be_tied(name) for name in (*missing, *extra)):
        advice = without_heads([*missing, *extra], wanted & present)
        return f"Their layers have the same names, so they differ in their heads. {advice}"
    return "Only models of one architecture and size can be merged."


def _common_prefix(longer: set[str], shorter: set[str]) -> str | None:
    """Return the prefix that turns most names of `shorter` into names of `longer`, if there is one."""
    if not shorter:
        return None
    # Look for the longest of the unmatched names: it is the least likely to end like another name by accident.
    probe = max(shorter - longer, key=len, default=None)
    if probe is None:
        return None
    for name in longer:
        if name.endswith("." + probe):
            prefix = name[: -len(probe)]
            # Some tensors may be missing for other reasons, so a majority is enough.
            matching = sum(prefix + each in longer for each in shorter)
            if 2 * matching > len(shorter):
                return prefix
    return None


def refuse_shapes(checkpoints: Sequence[Checkpoint]) -> None:
    """Raise `CheckpointError` if a float tensor has another shape in one model than in another."""
    reference = checkpoints[0]
    for checkpoint in checkpoints[1:]:
        wrong = [
            (info, checkpoint.tensors[name])
            for name, info in reference.tensors.items()
            if info.is_float
            and name in checkpoint.tensors
            and mapped_shape(checkpoint, checkpoint.tensors[name]) != mapped_shape(reference, info)
        ]
        if not wrong:
            continue
        listed = some(
            f"{other.name} is {list(other.shape)} in {checkpoint.source.spec!r} and {list(expected.shape)} in "
            f"{reference.source.spec!r}"
            for expected, other in wrong
        )
        alike = reference.tensors.keys() - {expected.name for expected, _ in wrong}
        hint = _shapes_hint(wrong, alike, (n_classes(reference.config()), n_classes(checkpoint.config())))
        raise CheckpointError(f"{len(wrong)} tensors differ in shape: {listed}. {hint}")


def _shapes_hint(wrong: list[tuple[TensorInfo, TensorInfo]], alike: set[str], classes: tuple[int, int]) -> str:
    rows = {(expected.shape[0], other.shape[0]) for expected, other in wrong if expected.shape and other.shape}
    only_rows = all(expected.shape[1:] == other.shape[1:] for expected, other in wrong) and len(rows) == 1
    if only_rows and any(_EMBEDDING.search(expected.name) for expected, _ in wrong):
        ((expected_rows, other_rows),) = rows
        return (
            f"The vocabularies have different sizes ({other_rows} and {expected_rows}). Choose whose tokens the "
            "output gets, and rows are matched by token: --tokenizer-source base, union or an expert "
            "(tokenizer_source)."
        )
    if rows == {classes}:
        return (
            f"They are the heads of classifiers with {classes[0]} and {classes[1]} labels, which have no mean. "
            f"{without_heads([expected.name for expected, _ in wrong], alike)}"
        )
    return "Only models of one architecture and size can be merged."
