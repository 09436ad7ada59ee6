"""Tied tensors, which some checkpoints store once and others several times: told by their bytes and by the class."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from hf_frmerge.checkpoints.model_structure import leaf, may_be_tied, stated_ties, untying
from hf_frmerge.checkpoints.names.empty_model import build_empty
from hf_frmerge.checkpoints.tensors.reader import Checkpoint, TensorInfo, some
from hf_frmerge.errors import CheckpointError

# Models tie a handful of weights. If more names than this differ, the checkpoints are of different architectures.
_MOST_TIED = 16
_COMPARE_CHUNK = 4 << 20


@dataclass
class Ties:
    """
    What becomes of tied tensors.

    Attributes:
        left_out: tensors that repeat another, which the output does not need.
        unties: whether tensors that the class ties are different ones, and the output must not tie them.
        notes: for the user.
    """

    left_out: set[str] = field(default_factory=set)
    unties: bool = False
    notes: list[str] = field(default_factory=list)


def names_in_order(checkpoints: Sequence[Checkpoint]) -> list[str]:
    """Return the tensor names of all checkpoints: those of the first in its file order, then the others."""
    return list(dict.fromkeys(name for checkpoint in checkpoints for name in checkpoint.tensors))


def settle_ties(checkpoints: Sequence[Checkpoint], constants: set[str]) -> Ties:
    """
    Decide what becomes of tensors that are tied in some checkpoints, and alias those that others store.

    Args:
        checkpoints: Full models; the first gives the output its config.
        constants: Buffers of which it is already decided.

    Raises:
        CheckpointError: If a tie that does not hold cannot be taken off without another.
    """
    in_all = set(checkpoints[0].tensors).intersection(*(checkpoint.tensors for checkpoint in checkpoints[1:]))
    left_out, notes = _settle_partial(checkpoints, in_all, constants)
    ties = Ties(left_out, notes=notes)
    apart: dict[tuple[str, str], list[Checkpoint]] = {}
    for name, target in _tied_by_the_class(checkpoints[0], in_all):
        apart[name, target] = [
            each for each in checkpoints if not same_bytes(each, each.tensors[name], each, each.tensors[target])
        ]
    ties.unties = any(apart.values())
    for (name, target), different in apart.items():
        if different:
            _refuse_lost(name, target, checkpoints[0], in_all)
            named = some(repr(each.source.spec) for each in different)
            ties.notes.append(
                f"{name} is not {target} in {named}, though the class of {checkpoints[0].source.spec!r} ties the two: "
                "both are merged, and the output's config.json says `tie_word_embeddings: false`."
            )
        elif not ties.unties:  # a class that ties less may not find it where it is no more
            ties.left_out.add(name)
            ties.notes.append(f"{name} repeats {target} in all models (tied weights, stored twice); it is left out.")
    return ties


def _tied_by_the_class(first: Checkpoint, in_all: set[str]) -> Iterator[tuple[str, str]]:
    """
    Yield tensors that all checkpoints store and the class of the first ties, with those they are tied to.

    The class is only asked where two embeddings or output layers have one shape, and the config does not untie them:
    to import transformers takes seconds.
    """
    outside = [info for name, info in first.tensors.items() if name in in_all and info.is_float and may_be_tied(name)]
    matrices = [info.shape for info in outside if len(info.shape) == 2]
    stated = stated_ties(first.config())
    if len(set(matrices)) == len(matrices) or (stated and not any(stated)):
        return
    try:
        tied = build_empty(first.config(), first.source.spec).all_tied_weights_keys
    except CheckpointError:
        return  # a class of others: what its tensors are is for them to say
    for key, source in tied.items():
        names = [info.name for info in outside if leaf(info.name) == leaf(key)]
        targets = [info.name for info in outside if leaf(info.name) == leaf(source)]
        if (
            len(names) == len(targets) == 1
            and names != targets
            and first.tensors[names[0]].shape == first.tensors[targets[0]].shape
        ):
            yield names[0], targets[0]


def _refuse_lost(name: str, target: str, first: Checkpoint, in_all: set[str]) -> None:
    """Raise if a model that does not tie two tensors would start others at random that the class ties as well."""
    config, spec = first.config(), first.source.spec
    tied = build_empty(config, spec).all_tied_weights_keys
    freed = tied.keys() - build_empty({**config, **untying(config)}, spec).all_tied_weights_keys.keys()
    stored = {leaf(each) for each in in_all}
    lost = [key for key in sorted(freed) if leaf(key) not in stored]
    if lost:
        raise CheckpointError(
            f"{name} is not {target} in every model, though the class of {spec!r} ties the two. Without that tie it "
            f"would start {some(lost)} at random, which it ties as well: store a copy of {tied[lost[0]]} under that "
            "name in every model, and merge these."
        )


def _settle_partial(
    checkpoints: Sequence[Checkpoint], common: set[str], constants: set[str]
) -> tuple[set[str], list[str]]:
    """Alias or drop float tensors that only some checkpoints store, if they repeat another tensor; note each."""
    settled = common | constants
    partial = [
        name
        for name in names_in_order(checkpoints)
        if name not in settled and any(name in each.tensors and each.tensors[name].is_float for each in checkpoints)
    ]
    left_out: set[str] = set()
    notes: list[str] = []
    if len(partial) > _MOST_TIED:
        return left_out, notes  # another architecture: _refuse_names reports it
    for name in partial:
        holders = [checkpoint for checkpoint in checkpoints if name in checkpoint.tensors]
        target = _repeated_tensor(name, holders, common)
        if target is None:
            continue
        stored = some(repr(holder.source.spec) for holder in holders)
        if checkpoints[0] is holders[0]:
            # The config comes from a checkpoint that stores this tensor, so a loader may look for it: keep it.
            for checkpoint in checkpoints:
                if checkpoint not in holders:
                    checkpoint.alias(name, target)
            notes.append(f"{name} repeats {target} in {stored}; the others lack it and are read there.")
        else:
            left_out.add(name)
            notes.append(f"{name} repeats {target} in {stored} (tied weights, stored twice); it is left out.")
    return left_out, notes


def _repeated_tensor(name: str, holders: Sequence[Checkpoint], common: set[str]) -> str | None:
    """Return a tensor that all checkpoints have, and that equals `name` in every checkpoint which stores `name`."""
    info = holders[0].tensors[name]
    for other in holders[0].tensors.values():
        if (
            other.name in common
            and (other.dtype, other.shape) == (info.dtype, info.shape)
            and all(same_bytes(each, each.tensors[name], each, each.tensors[other.name]) for each in holders)
        ):
            # Fresh biases and norm weights are all 0 or all 1, so they are equal without being tied.
            return None if _is_constant(holders[0], info) else other.name
    return None


def _is_constant(checkpoint: Checkpoint, info: TensorInfo) -> bool:
    if info.numel == 0:
        return True
    size = info.nbytes // info.numel
    head = checkpoint.read(info.name, 0, min(info.nbytes, _COMPARE_CHUNK) // size * size).reshape(-1, size)
    return bool((head == head[0]).all())


def same_bytes(left: Checkpoint, a: TensorInfo, right: Checkpoint, b: TensorInfo) -> bool:
    """Whether two tensors have the same bytes; reads up to the first difference."""
    if a.nbytes != b.nbytes:
        return False
    step = 4096  # different tensors almost always differ in the first bytes; equal ones continue in large steps
    start = 0
    while start < a.nbytes:
        stop = min(start + step, a.nbytes)
        if not np.array_equal(left.read(a.name, start, stop), right.read(b.name, start, stop)):
            return False
        left.release(a.name, start, stop)
        right.release(b.name, start, stop)
        start, step = stop, _COMPARE_CHUNK
    return True
