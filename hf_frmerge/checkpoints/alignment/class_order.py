"""Give the heads of several classifiers the same order of classes, where their configs order them differently."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from hf_frmerge.checkpoints.names.heads import tensors_of_classes
from hf_frmerge.checkpoints.names.model_names import read_names
from hf_frmerge.checkpoints.tensors.reader import Checkpoint, some
from hf_frmerge.errors import CheckpointError

# Names that transformers gives to classes of which nothing is known.
_UNNAMED = re.compile(r"LABEL_\d+")


def without_heads(heads: Collection[str], others: Collection[str]) -> str:
    """
    Say how to merge models without their heads, or with that of one of them.

    Args:
        heads (`Collection[str]`): Tensors of the heads.
        others (`Collection[str]`): All other tensors.
    """
    modules = sorted({_shortest(name, others) for name in heads})
    pattern = f"^({'|'.join(map(re.escape, modules))})\\b"
    return (
        f"To merge the rest, leave the heads out (--leave-out '{pattern}'), or take those of one expert (--take "
        f"'{pattern}=EXPERT', EXPERT being its number)."
    )


def _shortest(name: str, others: Collection[str]) -> str:
    """Return the shortest part of a name, from its start, that belongs to none of the others."""
    parts = name.split(".")
    starts = (".".join(parts[:n]) for n in range(1, len(parts)))
    return next((start for start in starts if not any(f"{other}.".startswith(f"{start}.") for other in others)), name)


def class_names(config: Mapping[str, Any]) -> list[str] | None:
    """Return the names of the classes in a `config.json`, in the order of their rows; None if it names none."""
    named = config.get("id2label")
    if not isinstance(named, dict) or not all(str(key).isdigit() for key in named):
        return None
    by_row = [str(named[key]) for key in sorted(named, key=int)]
    return None if len(by_row) < 2 or all(map(_UNNAMED.fullmatch, by_row)) else by_row


def n_classes(config: Mapping[str, Any]) -> int:
    """Return the number of classes in a `config.json`; transformers takes 2 if it gives none."""
    return int(config.get("num_labels") or len(config.get("id2label") or "ab"))


def row_order(wanted: Sequence[str], actual: Sequence[str]) -> tuple[int, ...] | None:
    """
    Return the row of every wanted class in a head with other rows; None if the classes are not the same.

    Names may differ in case and in spaces around them.
    """
    of_wanted, of_actual = ([name.strip().casefold() for name in names] for names in (wanted, actual))
    if sorted(of_wanted) != sorted(of_actual) or len(set(of_actual)) < len(of_actual):
        return None
    return tuple(of_actual.index(name) for name in of_wanted)


def agree_on_classes(checkpoints: Sequence[Checkpoint]) -> list[str]:
    """
    Reorder the rows of classification heads to the order of classes in the first checkpoint.

    Row `k` of a head belongs to class `k` of `id2label`; averaging heads of another order would mix classes. The class
    of the model is asked which tensors these are, only if orders differ.

    Args:
        checkpoints (`Sequence[Checkpoint]`):
            Base model if there is one, then the full experts, with the same tensor names. The rows of all but the
            first may be reordered in place.

    Returns:
        `list[str]`: A note for each reordered checkpoint.

    Raises:
        CheckpointError: If classes differ or cannot be matched.
    """
    reference = checkpoints[0]
    named = {checkpoint: names for checkpoint in checkpoints if (names := class_names(checkpoint.config()))}
    first, *rest = named or [reference]
    differing = [other for other in rest if _differ(named[first], named[other])]
    heads = _heads(reference, len(named[first])) if differing else []
    if not heads:
        return []
    if first is not reference:
        raise CheckpointError(
            f"{first.source.spec!r} and {differing[0].source.spec!r} order their classes differently, and the "
            f"config.json of {reference.source.spec!r}, which the output gets, names none. Write the id2label and "
            "label2id of its rows into it."
        )
    notes = []
    for other in differing:
        order = row_order(named[first], named[other])
        if order is None:
            raise _other_classes(first, other, named[first], named[other], heads)
        for name in heads:
            if name in other.tensors:
                other.row_maps[name] = np.array(order)
        notes.append(
            f"{other.source.spec!r} orders its classes differently ({some(named[other])}): the rows of {some(heads)} "
            f"are taken in the order of {reference.source.spec!r} ({some(named[first])})."
        )
    return notes


def _differ(first: Sequence[str], other: Sequence[str]) -> bool:
    return len(first) == len(other) and row_order(first, other) != tuple(range(len(first)))


def _heads(reference: Checkpoint, n_classes: int) -> list[str]:
    """Return the stored names of the tensors with a row for every class."""
    config, spec = reference.config(), reference.source.spec
    try:
        by_class = tensors_of_classes(config, spec, n_classes)
    except CheckpointError as error:
        raise CheckpointError(
            "The models name their classes differently, and nothing tells which of their tensors have a row for every "
            f"class: {error} Give all the same order of classes, with the same id2label in config.json."
        ) from error
    names = read_names(config, spec)
    stored = {name: names.canonical([name])[name] if names else name for name in reference.tensors}
    heads = [name for name, in_memory in stored.items() if in_memory in by_class]
    mixed = [name for name in heads if not by_class[stored[name]]]
    if mixed:
        raise CheckpointError(
            f"The models name their classes differently, and {some(mixed)} of {spec!r} has more than a row for each "
            "of them. Give all the same order of classes, with the same id2label in config.json."
        )
    return heads


def _other_classes(
    first: Checkpoint, other: Checkpoint, ours: Sequence[str], theirs: Sequence[str], heads: Sequence[str]
) -> CheckpointError:
    return CheckpointError(
        f"{first.source.spec!r} and {other.source.spec!r} are classifiers of different classes ({some(ours)}; "
        f"{some(theirs)}): a merge would mix the rows of {some(heads)}. If they mean the same, write the same "
        f"id2label and label2id into both config.json files. {without_heads(heads, first.tensors.keys() - set(heads))}"
    )
