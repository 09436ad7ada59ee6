"""Which base model adapters belong to, and the name that an adapter made from them gives it."""

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
    Return the name and revision that an adapter made from these gives its base model.

    A base that the user named settles it, whatever the adapters call theirs: it is named by its Hub id, also where it
    is a copy of what an adapter names by a Hub id with the same last part; else by its path. Without one, the
    adapters must agree. Two different names that are local paths are then taken as one base if their last parts
    agree (the same folder, seen from two machines); Hub ids must be equal. An adapter that names no base agrees with
    any. A Hub id goes before a path.

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
        return _name_of_given(base, {(name, revision) for _, name, revision in named})
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
    """Say what adapters call their base where that is not the base that the user named."""
    given, _ = name_of(base)
    others = [_named_by(adapter)[0] for adapter in adapters if adapter.config.base_model]
    others = [repr(name) for name in dict.fromkeys(others) if not _same_base(name, given)]
    return [f"The adapters were trained on {some(others)}; {base.spec!r} is taken for it."] if others else []


def _named_by(adapter: Adapter) -> tuple[str, str | None]:
    """What an adapter calls its base; a folder of the Hub's cache is called by its id on every machine."""
    name = str(adapter.config.base_model)
    return cached_hub_id(name) or (name, adapter.config.revision)


def _name_of_given(base: Source, named: set[tuple[str, str | None]]) -> tuple[str, str | None]:
    name, revision = name_of(base)
    # Adapters of org/model and a folder .../model: a copy of it, and org/model is what others can load.
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
