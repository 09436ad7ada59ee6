"""
Find the name that every stored tensor has in the model in memory.

transformers renames tensors when it loads them: prefixes of vision-language models, `gamma` and `beta`, experts that
are stored one by one. So two checkpoints of one model may have no name in common. The tables are those of the
installed transformers, for the class that `config.json` names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from hf_frmerge.checkpoints.names.empty_model import build_empty
from hf_frmerge.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.core_model_loading import WeightConverter

Shape = tuple[int, ...]


class StackRun(NamedTuple):
    """Rows `[first, first + n_rows)` of a stored tensor; a row is all that its last index runs over."""

    name: str
    first: int
    n_rows: int


class StackedRows(NamedTuple):
    """Rows `[first, first + n_rows)` of the matrix at `place` of a parameter that stacks matrices."""

    stack: str
    place: int
    first: int
    n_rows: int


@dataclass(frozen=True)
class ModelNames:
    """
    Names of the tensors of one class of transformers.

    Attributes:
        in_memory: names in the model in memory.
        parts: path of every part that is a model of its own -> the prefix its tensors have when it is wrapped by a
            class with a head, such as `"model.language_model"` -> `"model"`.
        rename: returns the name in memory of a stored name.
        stack: returns the rows of the tensors in memory that are joined of several stored ones.
    """

    in_memory: frozenset[str]
    parts: dict[str, str]
    rename: Callable[[str], str]
    stack: Callable[[Mapping[str, Shape]], dict[str, list[StackRun]]]

    def canonical(self, names: Iterable[str]) -> dict[str, str]:
        """
        Return one name for all the names that a tensor has in checkpoints of this class.

        Args:
            names (`Iterable[str]`):
                Names in a checkpoint, or in an adapter.

        Returns:
            `dict[str, str]`: Stored name -> name in memory. The parts of a tensor that is stored in parts, such as the
            experts of a stack, keep names of their own.
        """
        return {name: self.rename(name) for name in names}


def read_names(config: Mapping[str, Any], spec: str) -> ModelNames | None:
    """
    Read the names that transformers gives the tensors of a model.

    Args:
        config (`Mapping[str, Any]`):
            Contents of its `config.json`.
        spec (`str`):
            Name of the checkpoint as the user wrote it.

    Returns:
        `ModelNames`, *optional*: None if the installed transformers does not have the class, or no such table.
    """
    try:
        return names_of(build_empty(config, spec))
    except CheckpointError:
        return None


def names_of(model: PreTrainedModel) -> ModelNames | None:
    """Read the names of the tensors of a built model; None if the installed transformers has no such table."""
    from transformers import PreTrainedModel

    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    except ImportError:
        return None

    table = get_model_conversion_mapping(model)
    renamings = [entry for entry in table if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in table if isinstance(entry, WeightConverter)]
    prefix, in_memory = model.base_model_prefix, model.state_dict()

    def rename(name: str) -> str:
        renamed, converted = rename_source_key(name, renamings, converters, prefix, in_memory)
        if renamed not in in_memory and name in in_memory:
            return name  # as transformers does: a name of the model itself is not renamed away
        if converted is None:
            return renamed
        before = rename_source_key(name, renamings, [], None, None)[0]
        after = rename_source_key(before, [], converters, None, None)[0]
        return _with_prefix(before, after, renamed, prefix)

    parts = {
        path: part.base_model_prefix
        for path, part in model.named_modules()
        if path and isinstance(part, PreTrainedModel)
    }

    def stack(stored: Mapping[str, Shape]) -> dict[str, list[StackRun]]:
        groups: dict[str, list[tuple[str, str]]] = {}
        for name in sorted(stored, key=_natural):
            renamed, pattern = rename_source_key(name, renamings, converters, prefix, in_memory)
            if pattern is not None and renamed in in_memory and name not in in_memory:
                groups.setdefault(renamed, []).append((pattern, name))
        stacks = {}
        for renamed, members in groups.items():
            converter = next(each for each in converters if members[0][0] in each.source_patterns)
            shapes = [(pattern, name, stored[name]) for pattern, name in members]
            rows = _stacked_rows(converter, shapes, tuple(in_memory[renamed].shape))
            if rows is not None:
                stacks[renamed] = rows
        return stacks

    return ModelNames(frozenset(in_memory), parts, rename, stack)


def _stacked_rows(
    converter: WeightConverter, members: Sequence[tuple[str, str, Shape]], shape: Shape
) -> list[StackRun] | None:
    """
    Return the rows of a tensor in memory, in order; None if it is not made of whole rows of the stored ones.

    transformers' own operations are run on numbers of rows in place of weights, with one column.

    Args:
        converter: Entry of transformers' table.
        members: Pattern, name and shape of every stored tensor, in the order in which transformers loads them.
        shape: Shape in memory.
    """
    import torch

    if any(not own or own[-1] != shape[-1] for _, _, own in members):
        return None
    collected: dict[str, list[torch.Tensor]] = {}
    owners: list[tuple[str, int]] = []
    for pattern, name, own in members:
        count = math.prod(own[:-1])
        numbers = torch.arange(len(owners), len(owners) + count).reshape(*own[:-1], 1)
        collected.setdefault(pattern, []).append(numbers)
        owners += [(name, row) for row in range(count)]
    joined: dict[str, Any] = dict(collected)
    try:
        for operation in converter.operations:
            joined = operation.convert(
                joined, source_patterns=converter.source_patterns, target_patterns=converter.target_patterns
            )
        (result,) = joined.values()
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        return None  # an operation on columns, or one that needs the model
    if not isinstance(result, torch.Tensor) or tuple(result.shape) != (*shape[:-1], 1):
        return None
    order = result.reshape(-1).tolist()
    if sorted(order) != list(range(len(owners))):
        return None
    runs: list[StackRun] = []
    for name, row in (owners[number] for number in order):
        last = runs[-1] if runs else None
        if last is not None and last.name == name and last.first + last.n_rows == row:
            runs[-1] = last._replace(n_rows=last.n_rows + 1)
        else:
            runs.append(StackRun(name, row, 1))
    return runs


def _natural(name: str) -> list[tuple[int, int | str]]:
    """Sort numbers in names as numbers, as transformers does before it joins tensors."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in name.split(".")]


def _with_prefix(before: str, after: str, in_memory: str, prefix: str) -> str:
    """Change the prefix of a name as that of `after` was changed to get the name in memory."""
    if in_memory == f"{prefix}.{after}":
        return f"{prefix}.{before}"
    return before.removeprefix(f"{prefix}.") if after == f"{prefix}.{in_memory}" else before
