"""Names that wrappers of a model leave in a checkpoint: `torch.compile`, FSDP, DDP and the like."""

from __future__ import annotations

import re
from collections.abc import Iterable

# Children that `torch.compile`, FSDP and activation checkpointing put between a module and its owner, at any depth.
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
# DDP and DataParallel. A model may have a child of this name, so only one that everything lies under is theirs.
_PARALLEL = "module"
_IN_PATTERN = re.compile(rf"({'|'.join(sorted(_WRAPPERS))})(\\?\.)")


def unwrapped(names: Iterable[str]) -> dict[str, str]:
    """
    Take wrappers off the tensor names of one checkpoint.

    transformers and PEFT save `model.state_dict()` as it is: of a model wrapped by `torch.compile` every name starts
    with `_orig_mod.`, of one wrapped by DDP with `module.`, and wrappers nest. No loader takes them off.

    Args:
        names (`Iterable[str]`):
            All tensor names of the checkpoint.

    Returns:
        `dict[str, str]`: Name in the file -> name in the model, for all names, in their order. Two names may become
        one, if a checkpoint holds a module both wrapped and not.
    """
    parts = {name: [part for part in name.split(".") if part not in _WRAPPERS] for name in names}
    while parts and all(len(part) > 1 and part[0] == _PARALLEL for part in parts.values()):
        parts = {name: part[1:] for name, part in parts.items()}
    return {name: ".".join(part) for name, part in parts.items()}


def unwrapped_pattern(pattern: str) -> str:
    """Take wrappers out of a regular expression for module paths, such as a key of PEFT's `rank_pattern`."""
    return _IN_PATTERN.sub("", pattern)
