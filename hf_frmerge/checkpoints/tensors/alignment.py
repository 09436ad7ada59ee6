"""Match the tensors of several checkpoints by name and shape, and decide which are merged and which copied."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from hf_frmerge.checkpoints.model_structure import may_be_tied
from hf_frmerge.checkpoints.tensors.class_order import agree_on_classes, n_classes, without_heads
from hf_frmerge.checkpoints.tensors.quantised import refuse_quantised
from hf_frmerge.checkpoints.tensors.reader import Checkpoint, TensorInfo, some
from hf_frmerge.checkpoints.tensors.renames import agree_on_names, is_constant_buffer
from hf_frmerge.checkpoints.tensors.token_rows import TokenRows, TokenTable, agree_on_tokens, mapped_shape
from hf_frmerge.errors import CheckpointError

# Non-float tensors of more bytes than this are not compared between experts.
_COMPARE_LIMIT = 16 << 20
_COMPARE_CHUNK = 4 << 20
# Only used to word an error: what is merged never depends on what a tensor is called.
_EMBEDDING = re.compile("embed|wte|lm_head|shared")
# Why a tensor is left out.
TIED_TWICE = "tied and stored twice"
CONSTANT = "constant, computed by the model itself"
# Models tie a handful of weights. If more names than this differ, the checkpoints are of different architectures.
_MOST_TIED = 16


@dataclass(frozen=True, slots=True)
class AlignedTensor:
    """
    One tensor of the output.

    `dtype` and `shape` are those of the base model if there is one, else of the first expert. `donor` is the
    checkpoint a "copy" comes from: -1 the base model, 0 and up the experts in order.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    action: Literal["merge", "copy"]
    donor: int


@dataclass(frozen=True, slots=True)
class Alignment:
    """
    Output tensors in file order of the base model (else of the first expert), and notes for the user.

    `left_out` gives the reason for every tensor that some checkpoint stores and the output does not have. `token_rows`
    says which tensors were aligned by token, if any were.
    """

    tensors: list[AlignedTensor]
    notes: list[str]
    left_out: dict[str, str]
    token_rows: TokenRows | None = None


def align(
    experts: Sequence[Checkpoint],
    base: Checkpoint | None = None,
    is_apart: Callable[[str], bool] = lambda name: False,
    tokens: TokenTable | None = None,
) -> Alignment:
    """
    Match checkpoints tensor by tensor. Reads headers, and contents only where names differ.

    All float tensors must exist everywhere with one shape. Three kinds of differences are settled without loss, each
    with a note:

    * Non-float tensors (say, position ids) that are missing or differ somewhere are copied from the base model, else
      from the first expert that has them. Matrices of integers that differ are refused: they may be quantised codes.
    * Tensors that transformers loads under one name get the names of the first checkpoint; and the rows of heads that
      of its order of classes.
    * Constant buffers that some checkpoints store are copied if the first one stores them, else left out.
    * A float tensor that only some checkpoints store, and that repeats another tensor of theirs byte for byte, is a
      tied weight. It is dropped; or, if the donor of the config stores it, the other checkpoints read it from the
      tensor it repeats (`Checkpoint.alias`).
    * Dtypes may differ.
    * With `tokens`, embeddings and output layers may have other rows: those of a token belong together.

    Args:
        experts (`Sequence[Checkpoint]`):
            Full checkpoints, in the order the user listed them. May be empty if there is a base model.
        base (`Checkpoint`, *optional*):
            Base model.
        is_apart (`Callable`, *optional*):
            Whether a tensor, by its name in the first checkpoint if that has it, is none of those to be matched.
        tokens (`TokenTable`, *optional*):
            Tokens by which rows are matched. By default all models must have the same.

    Returns:
        `Alignment`: Tensors and notes.

    Raises:
        CheckpointError: If names, shapes or kinds of tensors differ otherwise, or a checkpoint is quantised (by its
            config, by its tensors, or because the models differ in a matrix of integers).
    """
    checkpoints = [*([base] if base is not None else []), *experts]
    first_index = 0 if base is None else -1  # donor index of checkpoints[0]; -1 is the base
    for checkpoint in checkpoints:
        refuse_quantised(checkpoint)
    notes = _repeated(experts) + _wrapper_notes(checkpoints) + agree_on_names(checkpoints)
    apart = [{name: info for name, info in each.tensors.items() if is_apart(name)} for each in checkpoints]
    for checkpoint, hidden in zip(checkpoints, apart):
        checkpoint.tensors = {name: info for name, info in checkpoint.tensors.items() if name not in hidden}
    try:
        return _align(checkpoints, first_index, notes, tokens)
    finally:
        for checkpoint, hidden in zip(checkpoints, apart):
            checkpoint.tensors |= hidden


def _align(
    checkpoints: Sequence[Checkpoint], first_index: int, notes: list[str], tokens: TokenTable | None
) -> Alignment:
    """Match tensors that have one name in all checkpoints; `first_index` is the donor index of the first of these."""
    _refuse_kinds(checkpoints)
    constants = _partial_constants(checkpoints)
    left_out, tied_notes = _settle_tied(checkpoints, constants)
    notes += _constant_notes(checkpoints, constants) + tied_notes
    _refuse_names(checkpoints, left_out | constants)
    constants_out = constants - set(checkpoints[0].tensors)
    token_rows = agree_on_tokens(checkpoints, tokens) if tokens is not None else None
    _refuse_shapes(checkpoints)
    notes += agree_on_classes(checkpoints)
    notes += _dtype_notes(checkpoints)

    tensors = []
    for name in _names_in_order(checkpoints):
        if name in left_out | constants_out:
            continue
        holders = [place for place, checkpoint in enumerate(checkpoints) if name in checkpoint.tensors]
        info = checkpoints[holders[0]].tensors[name]
        merged = info.is_float and info.numel > 0 and name not in constants
        shape = mapped_shape(checkpoints[holders[0]], info)
        tensors.append(AlignedTensor(name, info.dtype, shape, "merge" if merged else "copy", holders[0] + first_index))
        if not info.is_float:
            notes += _copy_notes(name, [checkpoints[place] for place in holders], len(checkpoints))
    reasons = dict.fromkeys(left_out, TIED_TWICE) | dict.fromkeys(constants_out, CONSTANT)
    return Alignment(tensors, notes, reasons, token_rows)


def _names_in_order(checkpoints: Sequence[Checkpoint]) -> list[str]:
    """Return the tensor names of all checkpoints: those of the first in its file order, then the others."""
    return list(dict.fromkeys(name for checkpoint in checkpoints for name in checkpoint.tensors))


def _repeated(experts: Sequence[Checkpoint]) -> list[str]:
    notes = []
    for later, expert in enumerate(experts):
        for earlier in experts[:later]:
            if (expert.source.path, expert.source.adapter) == (earlier.source.path, earlier.source.adapter):
                notes.append(f"{expert.source.spec!r} is listed twice; it counts with both its weights.")
                break
    return notes


def _wrapper_notes(checkpoints: Sequence[Checkpoint]) -> list[str]:
    return [
        f"{checkpoint.source.spec!r} was saved inside a wrapper (torch.compile, DDP or FSDP), as in "
        f"{checkpoint.wrapped!r}: its names are read, and written, without. transformers would load none of them."
        for checkpoint in checkpoints
        if checkpoint.wrapped
    ]


def _partial_constants(checkpoints: Sequence[Checkpoint]) -> set[str]:
    """Return the constant float buffers that only some checkpoints store."""
    return {
        name
        for checkpoint in checkpoints
        for name, info in checkpoint.tensors.items()
        if info.is_float and is_constant_buffer(name) and any(name not in each.tensors for each in checkpoints)
    }


def _constant_notes(checkpoints: Sequence[Checkpoint], constants: set[str]) -> list[str]:
    if not constants:
        return []
    copied = constants & set(checkpoints[0].tensors)
    taken = f"copied from {checkpoints[0].source.spec!r}" if copied else "left out"
    return [f"{some(sorted(constants))} are constants that models compute themselves; they are {taken}."]


def _settle_tied(checkpoints: Sequence[Checkpoint], constants: set[str]) -> tuple[set[str], list[str]]:
    """Alias or drop float tensors that only some checkpoints store, if they repeat another tensor; note each."""
    common = set(checkpoints[0].tensors).intersection(*(checkpoint.tensors for checkpoint in checkpoints[1:]))
    settled = common | constants
    partial = [
        name
        for name in _names_in_order(checkpoints)
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
            and all(_same_bytes(each, each.tensors[name], each, each.tensors[other.name]) for each in holders)
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


def _same_bytes(left: Checkpoint, a: TensorInfo, right: Checkpoint, b: TensorInfo) -> bool:
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


def _refuse_kinds(checkpoints: Sequence[Checkpoint]) -> None:
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


def _refuse_names(checkpoints: Sequence[Checkpoint], left_out: set[str]) -> None:
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


def _refuse_shapes(checkpoints: Sequence[Checkpoint]) -> None:
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


def _dtype_notes(checkpoints: Sequence[Checkpoint]) -> list[str]:
    reference = checkpoints[0]
    holders: dict[tuple[int, str, str], list[str]] = {}
    for checkpoint in checkpoints[1:]:
        pairs: dict[tuple[str, str], int] = {}
        for name, info in reference.tensors.items():
            other = checkpoint.tensors.get(name)
            if other is not None and info.is_float and other.dtype != info.dtype:
                pairs[info.dtype, other.dtype] = pairs.get((info.dtype, other.dtype), 0) + 1
        for (expected, found), count in pairs.items():
            holders.setdefault((count, found, expected), []).append(repr(checkpoint.source.spec))
    return [
        f"{count} tensors are {found} in {some(specs)}, and {expected} in {reference.source.spec!r}."
        for (count, found, expected), specs in holders.items()
    ]


def _copy_notes(name: str, holders: list[Checkpoint], n_all: int) -> list[str]:
    donor = holders[0]
    info = donor.tensors[name]
    if len(holders) < n_all:
        whole = f"{name} ({info.dtype}) is missing in {n_all - len(holders)} of {n_all} checkpoints"
        return [f"{whole}; it is copied from {donor.source.spec!r}."]
    if info.nbytes > _COMPARE_LIMIT and not _may_be_codes(info):
        return []
    different = [
        other
        for other in holders[1:]
        if other.tensors[name].dtype != info.dtype
        or other.tensors[name].shape != info.shape
        or not _same_bytes(donor, info, other, other.tensors[name])
    ]
    if not different:
        return []
    named = some(repr(other.source.spec) for other in different)
    if _may_be_codes(info) and any(_may_be_codes(other.tensors[name]) for other in different):
        raise CheckpointError(
            f"{name} is a matrix of integers ({info.dtype}) that is another in {named} than in "
            f"{donor.source.spec!r}. Codes of quantised weights cannot be averaged, and those of one model do not fit "
            "the rest of another: merge the unquantised checkpoints. If it is no weight, store it alike in all."
        )
    return [f"{name} ({info.dtype}) differs in {named}; it is copied from {donor.source.spec!r}."]


def _may_be_codes(info: TensorInfo) -> bool:
    """Whether a non-float tensor may hold quantised codes: a matrix of integers, not a row of ids and not a mask."""
    return info.dtype != "BOOL" and sum(length > 1 for length in info.shape) > 1
