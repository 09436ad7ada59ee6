"""Names of the models of a merge in a record: short, apart, and without a local path, for the record is pushed."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, count
from pathlib import Path
from typing import Any

from hf_frmerge.evaluation.record import MERGED, Role

BASE = "base"
"""Name of the base model in the record of a merge."""


def models_of_merge(
    experts: Sequence[str], base_model: str | None = None, merged: Any = None
) -> tuple[dict[str, Any], dict[str, Role]]:
    """
    Name the models of a merge: the base, the experts by the last part of their path or id, the merged model.

    Args:
        experts (`Sequence[str]`): Folders or Hub ids.
        base_model (`str`, *optional*): Folder or Hub id.
        merged (`str` or `torch.nn.Module`, *optional*): Folder or Hub id, or the model itself.

    Returns:
        Name -> what was given, and name -> role.
    """
    models: dict[str, Any] = {}
    roles: dict[str, Role] = {}
    if base_model is not None:
        models[BASE], roles[BASE] = base_model, "base"
    for spec in experts:
        short = _last_part(spec)
        taken = {BASE, MERGED, *models}
        name = next(name for name in chain([short], (f"{short}-{n}" for n in count(2))) if name not in taken)
        models[name], roles[name] = spec, "expert"
    if merged is not None:
        models[MERGED], roles[MERGED] = merged, "merged"
    return models, roles


def _last_part(spec: str) -> str:
    path = Path(spec).expanduser()
    if path.is_dir():
        return path.resolve().name or "expert"
    return spec.partition("@")[0].rstrip("/").rpartition("/")[2] or "expert"
