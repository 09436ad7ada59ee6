"""
Find the name that every stored tensor has in the model in memory.

transformers renames tensors when it loads them: prefixes of vision-language models, `gamma` and `beta`, experts that
are stored one by one. So two checkpoints of one model may have no name in common. The tables are those of the
installed transformers, for the class that `config.json` names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hf_frmerge.checkpoints.names.empty_model import build_empty
from hf_frmerge.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class ModelNames:
    """
    Names of the tensors of one class of transformers.

    Attributes:
        in_memory: names in the model in memory.
        parts: path of every part that is a model of its own -> the prefix its tensors have when it is wrapped by a
            class with a head, such as `"model.language_model"` -> `"model"`.
        rename: returns the name in memory of a stored name.
    """

    in_memory: frozenset[str]
    parts: dict[str, str]
    rename: Callable[[str], str]

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
    return ModelNames(frozenset(in_memory), parts, rename)


def _with_prefix(before: str, after: str, in_memory: str, prefix: str) -> str:
    """Change the prefix of a name as that of `after` was changed to get the name in memory."""
    if in_memory == f"{prefix}.{after}":
        return f"{prefix}.{before}"
    return before.removeprefix(f"{prefix}.") if after == f"{prefix}.{in_memory}" else before
