"""Map tensor names of a model in memory to names in a checkpoint that was saved with another prefix."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from hf_frmerge.checkpoints.reader import some
from hf_frmerge.errors import CheckpointError


def find_targets(spec: str, names: Iterable[str], shapes: Mapping[str, Sequence[int]]) -> dict[str, str]:
    """
    Find the base tensor of every name of an adapter.

    Names that the base has are taken as they are. The others must all become base tensors by one and the same change
    of prefix (`"model."` added, `"transformer."` removed, ...): a rule for each name alone would let the layers of a
    vision tower answer for those of the language model.

    Args:
        spec (`str`):
            What the user calls the adapter, for errors.
        names (`Iterable[str]`):
            Tensor names the adapter asks for.
        shapes (`Mapping[str, Sequence[int]]`):
            Shape of every tensor of the base.

    Returns:
        `dict[str, str]`: adapter's name -> base's name.

    Raises:
        CheckpointError: If no change of prefix fits, or more than one.
    """
    wanted = list(dict.fromkeys(names))
    targets = {name: name for name in wanted if name in shapes}
    unknown = [name for name in wanted if name not in shapes]
    if not unknown:
        return targets
    by_leaf: dict[str, list[str]] = {}
    for key in shapes:
        by_leaf.setdefault(_leaf(key), []).append(key)
    edits = set(_prefix_edits(unknown[0], by_leaf))
    for name in unknown[1:]:
        edits = {edit for edit in edits if _apply(edit, name) in shapes}
    if not edits:
        raise CheckpointError(
            f"Adapter {spec!r} changes {some(unknown)}, which the base model does not have"
            f"{_closest(unknown[0], by_leaf)}. Pass the base it was trained on; a tied output layer is stored only "
            "once and cannot be changed alone."
        )
    if len(edits) > 1:
        found = sorted(str(_apply(edit, unknown[0])) for edit in edits)
        raise CheckpointError(
            f"Adapter {spec!r}: {unknown[0]!r} could mean several tensors of the base: {some(found)}. "
            "Save the base with the class the adapter was trained on."
        )
    edit = edits.pop()
    for name in unknown:
        targets[name] = str(_apply(edit, name))
    if len(set(targets.values())) < len(targets):
        raise CheckpointError(f"Adapter {spec!r}: two of its modules fall on one tensor of the base.")
    return targets


def _leaf(name: str) -> str:
    return ".".join(name.split(".")[-2:])


def _prefix_edits(name: str, by_leaf: Mapping[str, list[str]]) -> Iterable[tuple[str, str]]:
    """Changes of prefix `(removed, added)` that turn `name` into a base tensor and add or remove, not both."""
    for key in by_leaf.get(_leaf(name), []):
        if key.endswith("." + name):
            yield "", key.removesuffix(name)
        elif name.endswith("." + key):
            yield name.removesuffix(key), ""


def _apply(edit: tuple[str, str], name: str) -> str | None:
    removed, added = edit
    return added + name.removeprefix(removed) if name.startswith(removed) else None


def _closest(name: str, by_leaf: Mapping[str, list[str]]) -> str:
    near = by_leaf.get(_leaf(name), [])
    return f" (it has {some(near, 2)})" if near else ""
