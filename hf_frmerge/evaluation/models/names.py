"""Name models and datasets in a record: short, unique, and without local paths, because the record is pushed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain, count
from pathlib import Path
from typing import Any

from hf_frmerge.errors import ArgumentError
from hf_frmerge.evaluation.record import MERGED, Role

BASE = "base"
"""Name of the base model in a record."""


def models_of_merge(
    experts: Sequence[str], base_model: str | None = None, merged: Any = None
) -> tuple[dict[str, Any], dict[str, Role]]:
    """
    Name the models of a merge: `base`, `merged`, and the experts by the last part of their path or Hub id.

    Args:
        experts (`Sequence[str]`): Folders or Hub ids.
        base_model (`str`, *optional*): Folder or Hub id.
        merged (`str` or `torch.nn.Module`, *optional*): Folder or Hub id, or the model itself.

    Returns:
        Name -> model as passed, and name -> role, with the base first and the merged model last.
    """
    models: dict[str, Any] = {}
    roles: dict[str, Role] = {}
    if base_model is not None:
        models[BASE], roles[BASE] = base_model, "base"
    for spec in experts:
        short = _last_part(spec)
        taken = {BASE, MERGED, *models}
        # Two experts may share a last part, as in `a/final` and `b/final`.
        name = next(name for name in chain([short], (f"{short}-{n}" for n in count(2))) if name not in taken)
        models[name], roles[name] = spec, "expert"
    if merged is not None:
        models[MERGED], roles[MERGED] = merged, "merged"
    return models, roles


def datasets_by_name(dataset: Any, default: Any, prefix: str) -> tuple[dict[str, Any], bool]:
    """
    Name the datasets of an evaluation.

    Args:
        dataset: A dataset, or datasets by name; `None` for `default`.
        default: Dataset, or datasets by name, passed to the constructor.
        prefix: Prefix of metric names. A single dataset is named `text`, or by the prefix without `eval_`.

    Returns:
        Name -> dataset, and whether the user named the datasets.

    Raises:
        ArgumentError: If there is no dataset.
    """
    dataset = dataset if dataset is not None else default
    if dataset is None:
        raise ArgumentError("An evaluation needs a dataset: pass eval_dataset here or to FisherRaoMerger.")
    if isinstance(dataset, Mapping):
        return dict(dataset), True
    return {"text" if prefix == "eval" else prefix.removeprefix("eval_"): dataset}, False


def _last_part(spec: str) -> str:
    """Return the name of a folder, or the repository name of a Hub id without revision."""
    path = Path(spec).expanduser()
    if path.is_dir():
        # Resolved, because "." and ".." are no names.
        return path.resolve().name or "expert"
    return spec.partition("@")[0].rstrip("/").rpartition("/")[2] or "expert"
