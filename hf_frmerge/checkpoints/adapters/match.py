"""Map the tensor names of an adapter, which are those of a model in memory, to the names in the base checkpoint."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

from hf_frmerge.checkpoints.adapters.config import FOLD_BY_HAND
from hf_frmerge.checkpoints.model_structure import leaf
from hf_frmerge.checkpoints.names.model_names import ModelNames
from hf_frmerge.checkpoints.tensors.reader import some
from hf_frmerge.errors import CheckpointError


def find_targets(
    spec: str,
    names: Mapping[str, Sequence[int]] | Iterable[str],
    shapes: Mapping[str, Sequence[int]],
    model_names: Callable[[], ModelNames | None] = lambda: None,
) -> dict[str, str]:
    """
    Find the base tensor of every name of an adapter.

    Names that the base has are taken as they are. The others must all become base tensors by the same change of prefix
    (`"model."` added, `"transformer."` removed, `"language_model.model."` for `"model.language_model."`). Matching
    each name by itself could assign layers of a vision tower to layers of the language model. If there is no such
    change, or more than one, the names that transformers gives the tensors of the base's class decide.

    Args:
        spec (`str`):
            Name of the adapter as the user wrote it, for errors.
        names (`Mapping[str, Sequence[int]]` or `Iterable[str]`):
            Tensor names in the adapter, with or without shapes. Shapes decide if several changes of prefix fit (the
            two sizes of a matrix in either order, since it may be stored transposed).
        shapes (`Mapping[str, Sequence[int]]`):
            Shape of every tensor of the base.
        model_names (`Callable`, *optional*):
            Returns the names of the base's class, or None; called only if needed, as it takes seconds.

    Returns:
        `dict[str, str]`: Name in the adapter -> name in the base.

    Raises:
        CheckpointError: If the tensors of the base cannot be told.
    """
    wanted = list(dict.fromkeys(names))
    targets = {name: name for name in wanted if name in shapes}
    unknown = [name for name in wanted if name not in shapes]
    if not unknown:
        return targets
    by_leaf: dict[str, list[str]] = {}
    for key in shapes:
        by_leaf.setdefault(leaf(key), []).append(key)
    # All names must share one change of prefix, so every candidate can be found from the first name.
    possible = {_edit(unknown[0], key) for key in by_leaf.get(leaf(unknown[0]), [])}
    edits = {edit for edit in possible if edit and all(_apply(edit, name) in shapes for name in unknown)}
    # If shapes rule out all candidates, keep them: the error below then lists them.
    if len(edits) > 1 and isinstance(names, Mapping):
        edits = {
            edit
            for edit in edits
            if all(sorted(shapes[str(_apply(edit, name))]) == sorted(names[name]) for name in unknown)
        } or edits
    if len(edits) == 1:
        (edit,) = edits
        matched: dict[str, str] | None = {name: str(_apply(edit, name)) for name in unknown}
    else:
        matched = _by_class(unknown, shapes, model_names())
    if matched:
        targets |= matched
    elif edits:
        candidates = sorted(str(_apply(edit, unknown[0])) for edit in edits)
        raise CheckpointError(
            f"Adapter {spec!r}: {unknown[0]!r} could mean several tensors of the base: {some(candidates)}. "
            "Save the base with the class the adapter was trained on."
        )
    elif made := _made_on_loading(unknown, shapes, model_names()):
        raise CheckpointError(
            f"Adapter {spec!r} changes {some(made)}, which the base does not store: transformers joins or parts other "
            f"tensors to make them when it loads the model. {FOLD_BY_HAND}"
        )
    else:
        raise CheckpointError(
            f"Adapter {spec!r} changes {some(unknown)}, which the base model does not have"
            f"{_closest(unknown[0], by_leaf)}. Pass the base it was trained on."
        )
    if len(set(targets.values())) < len(targets):
        raise CheckpointError(f"Adapter {spec!r}: two of its modules fall on one tensor of the base.")
    return targets


def _by_class(
    unknown: Sequence[str], shapes: Mapping[str, Sequence[int]], names: ModelNames | None
) -> dict[str, str] | None:
    """Match names by what transformers calls the tensors of the base's class in memory; None if that is not enough."""
    if names is None:
        return None
    stored = {in_memory: name for name, in_memory in names.canonical(shapes).items()}
    ours = names.canonical(unknown)
    if all(name in stored for name in ours.values()):
        return {name: stored[in_memory] for name, in_memory in ours.items()}
    # An adapter of a part that was trained by itself: the language model of a vision-language model.
    fits = []
    for path, prefix in names.parts.items():
        within = {name: f"{path}.{name.removeprefix(f'{prefix}.')}" for name in unknown}
        if all(name.startswith(f"{prefix}.") and within[name] in stored for name in unknown):
            fits.append({name: stored[within[name]] for name in unknown})
    return fits[0] if len(fits) == 1 else None


def _made_on_loading(unknown: Sequence[str], shapes: Iterable[str], names: ModelNames | None) -> list[str]:
    """Return the names of a class that no stored tensor has, neither as it is nor renamed."""
    if names is None or not names.in_memory.issuperset(unknown):
        return []
    stored = set(names.canonical(shapes).values())
    if names.in_memory.issuperset(stored):  # nothing is stored that others could be made of
        return []
    return [name for name in unknown if name not in stored]


def _edit(name: str, key: str) -> tuple[str, str] | None:
    """
    Return the change of prefix `(removed, added)` that turns `name` into `key`.

    None if the change would replace a part (`bert.` by `roberta.`, another model) or move a number (another layer or
    expert). Parts of a prefix may be added, removed or reordered, but not both added and removed.
    """
    mine, theirs = name.split("."), key.split(".")
    while mine and theirs and mine[-1] == theirs[-1]:
        del mine[-1], theirs[-1]
    fewer, more = sorted((Counter(mine), Counter(theirs)), key=Counter.total)
    if fewer - more or (fewer and any(part.isdigit() for part in more)):
        return None
    return "".join(f"{part}." for part in mine), "".join(f"{part}." for part in theirs)


def _apply(edit: tuple[str, str], name: str) -> str | None:
    """Change the prefix of a name; None if it does not have the prefix."""
    removed, added = edit
    return added + name.removeprefix(removed) if name.startswith(removed) else None


def _closest(name: str, by_leaf: Mapping[str, list[str]]) -> str:
    near = by_leaf.get(leaf(name), [])
    return f" (it has {some(near, 2)})" if near else ""
