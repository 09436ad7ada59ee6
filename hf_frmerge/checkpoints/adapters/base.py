"""Find the base model that adapters share, and the name for it in the config of a merged adapter."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hf_frmerge.checkpoints.source import cached_hub_id, is_hub_id, name_of
from hf_frmerge.checkpoints.tensors.reader import some
from hf_frmerge.errors import CheckpointError

if TYPE_CHECKING:
    from hf_frmerge.checkpoints.adapters.adapter import Adapter
    from hf_frmerge.checkpoints.source import Source


def common_base(adapters: Sequence[Adapter], base: Source | None = None) -> tuple[str | None, str | None]:
    """
    Return the name and revision of the base model, for an adapter merged from these.

    If the user named a base, it is that one, whatever the adapters call theirs. Its name is its Hub id, else its path;
    but if the path is a copy of a Hub model that the adapters name (their last parts agree), it is that Hub id.
    Otherwise the adapters must agree. Two different names of which one is a local path count as the same base if their
    last parts agree (one folder seen from two machines); Hub ids must be equal. An adapter that names no base agrees
    with any. A Hub id is preferred to a path.

    Args:
        adapters (`Sequence[Adapter]`):
            Adapters to be merged.
        base (`Source`, *optional*):
            Base model that the user named.

    Raises:
        CheckpointError: If no base is given, and two adapters name different bases or revisions.
    """
    named = [(adapter.spec, *_named_by(adapter)) for adapter in adapters if adapter.config.base_model]
    if base is not None:
        return _name_of_chosen(base, {(name, revision) for _, name, revision in named})
    if not named:
        return None, None
    (first, name, revision), *others = named
    for other, their_name, their_revision in others:
        if not _same_base(name, their_name):
            raise CheckpointError(
                f"Adapters {first!r} and {other!r} were trained on different base models: {name!r} and "
                f"{their_name!r}. Deltas of different bases cannot be merged; if both names mean the same weights, "
                "say which they are: pass base_model (--base-model)."
            )
        if (revision or "main") != (their_revision or "main"):
            raise CheckpointError(
                f"Adapters {first!r} and {other!r} were trained on different revisions of {name!r}: "
                f"{revision or 'main'!r} and {their_revision or 'main'!r}. If the weights are the same, say which "
                "they are: pass base_model (--base-model)."
            )
    return next(((theirs, rev) for _, theirs, rev in named if _is_on_hub(theirs)), (name, revision))


def base_notes(adapters: Sequence[Adapter], base: Source) -> list[str]:
    """Note the bases that adapters name, if they differ from the base that the user named."""
    chosen, _ = name_of(base)
    others = [_named_by(adapter)[0] for adapter in adapters if adapter.config.base_model]
    others = [repr(name) for name in dict.fromkeys(others) if not _same_base(name, chosen)]
    return [f"The adapters were trained on {some(others)}; {base.spec!r} is taken for it."] if others else []


def _named_by(adapter: Adapter) -> tuple[str, str | None]:
    """Return the base an adapter names; a folder in a Hub cache is replaced by its Hub id, valid on every machine."""
    name = str(adapter.config.base_model)
    return cached_hub_id(name) or (name, adapter.config.revision)


def _name_of_chosen(base: Source, named: set[tuple[str, str | None]]) -> tuple[str, str | None]:
    name, revision = name_of(base)
    # Adapters that name org/model, and a local folder .../model: a copy of it. Others can only load org/model.
    copied = {(theirs, rev) for theirs, rev in named if _is_on_hub(theirs) and _last_part(theirs) == _last_part(name)}
    return copied.pop() if len(copied) == 1 and not is_hub_id(name) else (name, revision)


def _same_base(first: str, second: str) -> bool:
    if first == second:
        return True
    local = not (_is_on_hub(first) and _is_on_hub(second))
    return local and _last_part(first) == _last_part(second)


def _is_on_hub(name: str) -> bool:
    return "/" in name and is_hub_id(name)


def _last_part(name: str) -> str:
    return re.split(r"[/\\]+", name.rstrip("/\\"))[-1]
