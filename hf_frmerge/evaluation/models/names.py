"""Names of models and datasets in a record: short, apart, and without a local path, for the record is pushed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain, count
from pathlib import Path
from typing import Any

from hf_frmerge.errors import ArgumentError
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


def datasets_by_name(dataset: Any, default: Any, prefix: str) -> tuple[dict[str, Any], bool]:
    """
    Name the datasets of an evaluation.

    Args:
        dataset: A dataset, or datasets by name; `None` for the default.
        default: The same, as it was given beforehand.
        prefix: Prefix of the metrics' names: one dataset alone is called `text`, or what follows `eval_` here.

    Returns:
        Name -> dataset, and whether the user gave the names.

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
    path = Path(spec).expanduser()
    if path.is_dir():
        return path.resolve().name or "expert"
    return spec.partition("@")[0].rstrip("/").rpartition("/")[2] or "expert"
