"""Give the tensors of several checkpoints of one model the same names, if they were stored under different ones."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from hf_frmerge.checkpoints.names.model_names import ModelNames, StackRun, read_names
from hf_frmerge.checkpoints.tensors.reader import Checkpoint, TensorInfo
from hf_frmerge.checkpoints.tensors.recipes import Run, rows_of
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
    notes = [note for other in others for note in _agree_on_stacks(names, reference, other)]
    stored = {canonical: name for name, canonical in _canonical(names, reference).items()}
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


def _agree_on_stacks(names: ModelNames, reference: Checkpoint, other: Checkpoint) -> list[str]:
    """Let `other` have experts one by one, or as a stack, as the first checkpoint has them."""
    ours, theirs = (names.stack({n: i.shape for n, i in each.tensors.items()}) for each in (reference, other))
    in_memory = {canonical: name for name, canonical in _canonical(names, other).items()}
    stacks_here = {canonical: name for name, canonical in _canonical(names, reference).items()}
    made: dict[str, TensorInfo] = {}
    used: set[str] = set()
    for stack, runs in ours.items():  # single ones here, a stack there
        whole = other.tensors.get(in_memory.get(stack, ""))
        if stack not in theirs and whole is not None:
            made |= _taken_apart(whole, runs, reference.tensors)
            used.add(whole.name)
    for stack, runs in theirs.items():  # a stack here, single ones there
        info = reference.tensors.get(stacks_here.get(stack, ""))
        parts = {run.name: other.tensors[run.name] for run in runs}
        if stack not in ours and info is not None and len({part.dtype for part in parts.values()}) == 1:
            made[info.name] = _joined(info.name, info.shape, runs, parts)
            used |= parts.keys()
    if not made:
        return []
    other.tensors = {name: info for name, info in other.tensors.items() if name not in used} | made
    return [
        f"{other.source.spec!r} stores experts {'one by one' if len(used) > len(made) else 'in stacks'} and "
        f"{reference.source.spec!r} does not: {len(used)} tensors are read as {len(made)}, as transformers loads them."
    ]


def stack_experts(checkpoint: Checkpoint, names: ModelNames, shapes: Mapping[str, Sequence[int]]) -> None:
    """
    Let a checkpoint that stores experts one by one be read as the stacks that transformers makes of them.

    Args:
        checkpoint (`Checkpoint`): Full model; it is changed in place.
        names (`ModelNames`): Names of its class.
        shapes (`Mapping[str, Sequence[int]]`): Name in memory -> shape.
    """
    for stack, runs in names.stack({name: info.shape for name, info in checkpoint.tensors.items()}).items():
        parts = {run.name: checkpoint.tensors[run.name] for run in runs}
        if len({part.dtype for part in parts.values()}) == 1:
            kept = {name: info for name, info in checkpoint.tensors.items() if name not in parts}
            checkpoint.tensors = {**kept, stack: _joined(stack, shapes[stack], runs, parts)}


def _joined(name: str, shape: Sequence[int], runs: Sequence[StackRun], parts: Mapping[str, TensorInfo]) -> TensorInfo:
    return rows_of(name, shape, [Run(parts[run.name], run.first, run.n_rows) for run in runs])


def _taken_apart(
    stack: TensorInfo, runs: Sequence[StackRun], parts: Mapping[str, TensorInfo]
) -> dict[str, TensorInfo]:
    """Return the tensors that `runs` of a stack are made of, as rows of the stack; names and shapes are of `parts`."""
    places: dict[str, list[tuple[int, Run]]] = {}
    row = 0
    for run in runs:
        places.setdefault(run.name, []).append((run.first, Run(stack, row, run.n_rows)))
        row += run.n_rows
    return {
        name: rows_of(name, parts[name].shape, [run for _, run in sorted(found, key=lambda place: place[0])])
        for name, found in places.items()
    }


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
