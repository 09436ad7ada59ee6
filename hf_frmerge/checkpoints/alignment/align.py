"""Match the tensors of several checkpoints by name and shape, and decide which are merged and which copied."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from hf_frmerge.checkpoints.alignment.class_order import agree_on_classes
from hf_frmerge.checkpoints.alignment.mismatches import refuse_kinds, refuse_names, refuse_shapes
from hf_frmerge.checkpoints.alignment.renames import agree_on_names, is_constant_buffer
from hf_frmerge.checkpoints.alignment.ties import names_in_order, same_bytes, settle_ties
from hf_frmerge.checkpoints.alignment.token_rows import TokenRows, TokenTable, agree_on_tokens, mapped_shape
from hf_frmerge.checkpoints.tensors.quantised import refuse_quantised
from hf_frmerge.checkpoints.tensors.reader import Checkpoint, TensorInfo, some
from hf_frmerge.errors import CheckpointError

# Non-float tensors of more bytes than this are not compared between experts.
_COMPARE_LIMIT = 16 << 20
# Why a tensor is left out.
TIED_TWICE = "tied and stored twice"
CONSTANT = "constant, computed by the model itself"


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
    says which tensors were aligned by token, if any were; `unties` that the output must not tie what its class ties.
    """

    tensors: list[AlignedTensor]
    notes: list[str]
    left_out: dict[str, str]
    token_rows: TokenRows | None = None
    unties: bool = False


def align(
    experts: Sequence[Checkpoint],
    base: Checkpoint | None = None,
    is_apart: Callable[[str], bool] = lambda name: False,
    tokens: TokenTable | None = None,
) -> Alignment:
    """
    Match checkpoints tensor by tensor. Reads headers, and contents only where names differ.

    All float tensors must exist everywhere with one shape. These differences are settled without loss, each
    with a note:

    * Non-float tensors (say, position ids) that are missing or differ somewhere are copied from the base model, else
      from the first expert that has them. Matrices of integers that differ are refused: they may be quantised codes.
    * Tensors that transformers loads under one name get the names of the first checkpoint; and the rows of heads that
      of its order of classes.
    * Constant buffers that some checkpoints store are copied if the first one stores them, else left out.
    * A float tensor that only some checkpoints store, and that repeats another tensor of theirs byte for byte, is a
      tied weight. It is dropped; or, if the donor of the config stores it, the other checkpoints read it from the
      tensor it repeats (`Checkpoint.alias`).
    * Tensors that all store and the class ties are one where they repeat each other in all, else the output unties
      them.
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
    refuse_kinds(checkpoints)
    constants = _partial_constants(checkpoints)
    ties = settle_ties(checkpoints, constants)
    left_out = ties.left_out
    notes += _constant_notes(checkpoints, constants) + ties.notes
    refuse_names(checkpoints, left_out | constants)
    constants_out = constants - set(checkpoints[0].tensors)
    token_rows = agree_on_tokens(checkpoints, tokens) if tokens is not None else None
    refuse_shapes(checkpoints)
    notes += agree_on_classes(checkpoints)
    notes += _dtype_notes(checkpoints)

    tensors = []
    for name in names_in_order(checkpoints):
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
    return Alignment(tensors, notes, reasons, token_rows, ties.unties)


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
        or not same_bytes(donor, info, other, other.tensors[name])
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
