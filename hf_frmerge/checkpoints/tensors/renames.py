"""Give the tensors of several checkpoints of one model the same names, if they were stored under different ones."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from hf_frmerge.checkpoints.names.model_names import ModelNames, read_names
from hf_frmerge.checkpoints.tensors.reader import Checkpoint
from hf_frmerge.errors import CheckpointError

# Buffers that a model computes from its config. Old versions of transformers stored them, newer ones do not.
_CONSTANT = re.compile(r"(.+\.)?(rotary_emb\.inv_freq|position_ids|masked_bias)")


def is_constant_buffer(name: str) -> bool:
    """Whether a tensor is computed from the config, so that it does not matter whether a checkpoint stores it."""
    return _CONSTANT.fullmatch(name) is not None


def agree_on_names(checkpoints: Sequence[Checkpoint]) -> list[str]:
    """
    Rename the tensors of checkpoints to the names that the first one has on disk.

    Names are compared as transformers loads them into the class of the first checkpoint. It is asked only if names of
    float tensors differ, as importing it takes seconds. Names of a class that it does not have are left as they are.

    Args:
        checkpoints (`Sequence[Checkpoint]`):
            Base model if there is one, then the full experts. All but the first may be renamed in place.

    Returns:
        `list[str]`: A note for each renamed checkpoint.

    Raises:
        CheckpointError: If two tensors of a checkpoint have the same name in memory.
    """
    reference, *others = checkpoints
    if all(_float_names(other) == _float_names(reference) for other in others):
        return []
    names = read_names(reference.config(), reference.source.spec)
    if names is None:
        return []
    stored = {canonical: name for name, canonical in _canonical(names, reference).items()}
    notes = []
    for other in others:
        renamed = {
            theirs: stored[canonical]
            for theirs, canonical in _canonical(names, other).items()
            if canonical in stored and stored[canonical] != theirs
        }
        _refuse_taken(other, renamed)
        if renamed:
            infos = [replace(info, name=renamed.get(name, name)) for name, info in other.tensors.items()]
            other.tensors = {info.name: info for info in infos}
            old, new = next(iter(renamed.items()))
            notes.append(
                f"{len(renamed)} tensors of {other.source.spec!r} have other names than in {reference.source.spec!r} "
                f"({old} is {new} there). transformers loads both as the same tensors; the output has the names of "
                f"{reference.source.spec!r}."
            )
    return notes


def _refuse_taken(checkpoint: Checkpoint, renamed: dict[str, str]) -> None:
    taken = next((new for new in renamed.values() if new in checkpoint.tensors and new not in renamed), None)
    if taken is not None:
        raise CheckpointError(
            f"{checkpoint.source.spec!r} stores {taken!r} under another name and has another tensor of that name. "
            "Load the model and save it again."
        )


def _float_names(checkpoint: Checkpoint) -> set[str]:
    return {name for name, info in checkpoint.tensors.items() if info.is_float and not is_constant_buffer(name)}


def _canonical(names: ModelNames, checkpoint: Checkpoint) -> dict[str, str]:
    canonical = names.canonical(checkpoint.tensors)
    owner: dict[str, str] = {}
    for name, in_memory in canonical.items():
        other = owner.setdefault(in_memory, name)
        if other != name:
            raise CheckpointError(
                f"{checkpoint.source.spec!r} stores {other!r} and {name!r}, which transformers both loads as "
                f"{in_memory!r}. Remove the one that is not meant, or load the model and save it again."
            )
    return canonical
