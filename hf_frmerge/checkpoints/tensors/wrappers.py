"""Remove the names that wrappers of a model (`torch.compile`, FSDP, DDP) leave in the tensor names of a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Iterable

# Attribute under which `torch.compile`, FSDP and activation checkpointing keep the wrapped module, at any depth.
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
# The same for DDP and DataParallel. A model may also have a child of this name, so it is only removed as a prefix that
# all tensors share.
_PARALLEL = "module"
_IN_PATTERN = re.compile(rf"({'|'.join(sorted(_WRAPPERS))})(\\?\.)")


def unwrapped(names: Iterable[str]) -> dict[str, str]:
    """
    Remove wrappers from the tensor names of one checkpoint.

    transformers and PEFT save `model.state_dict()` as it is. If the model is wrapped by `torch.compile`, every name
    starts with `_orig_mod.`; if it is wrapped by DDP, with `module.`; and wrappers nest. No loader removes them.

    Args:
        names (`Iterable[str]`):
            All tensor names of the checkpoint.

    Returns:
        `dict[str, str]`: Name in the file -> name in the model, in the order of `names`. Two names may map to the same
        one, if a checkpoint holds a module both wrapped and not.
    """
    parts = {name: [part for part in name.split(".") if part not in _WRAPPERS] for name in names}
    while parts and all(len(part) > 1 and part[0] == _PARALLEL for part in parts.values()):
        parts = {name: part[1:] for name, part in parts.items()}
    return {name: ".".join(part) for name, part in parts.items()}


def unwrapped_pattern(pattern: str) -> str:
    """Remove wrappers from a regular expression for module paths, such as a key of PEFT's `rank_pattern`."""
    return _IN_PATTERN.sub("", pattern)
