"""The card's facts, read from the folder of a finished merge: its manifest, its configuration, its sources' cards."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeGuard

from hf_frmerge.checkpoints.disk import remove_file
from hf_frmerge.evaluation.record import load_record
from hf_frmerge.hub.card.card import write_card
from hf_frmerge.hub.card.data import CardSource, CardStatistics, MergeCard
from hf_frmerge.hub.card.licences import SourceMetadata, read_source_metadata
from hf_frmerge.hub.card.private_paths import is_public_base
from hf_frmerge.hub.card.tasks import read_task
from hf_frmerge.merging.arguments.merging_arguments import MergingArguments
from hf_frmerge.merging.record.manifest import (
    COEFFICIENTS_FILE,
    EVALUATION_FILE,
    MANIFEST_FILE,
    REPORT_FILE,
    local_sources,
    read_manifest,
)
from hf_frmerge.wording.geometry import Geometry
from hf_frmerge.wording.parts import FIGURES

FIGURES_FOLDER = "figures"


def describe_merge(
    output_dir: Path | str, *, draw: Callable[[Path, Path], Mapping[str, Path]] | None = None, **card_fields: Any
) -> Path:
    """
    Write the model card of the merge in a folder, with its figures.

    Args:
        output_dir (`Path` or `str`):
            Folder a merge wrote.
        draw (`Callable`, *optional*):
            Saves the figures of a folder into another and returns their files by name: `report.figures.save_figures`.
            Without it the card has none.
        card_fields:
            As for `card_of_folder`.

    Returns:
        `Path`: The card.

    Raises:
        CheckpointError: If the folder holds no finished merge.
    """
    folder = Path(output_dir)
    place = folder / FIGURES_FOLDER
    figures = dict(draw(folder, place)) if draw is not None else {}
    for name in FIGURES.keys() - figures.keys():  # of what was here before
        remove_file(place / f"{name}.png")
    shown = {name: file.relative_to(folder).as_posix() for name, file in figures.items()}
    return write_card(card_of_folder(folder, figures=shown, **card_fields), folder)


def card_of_folder(output_dir: Path | str, **card_fields: Any) -> MergeCard:
    """
    Collect what a model card says about the merge in a folder, and what the record of an evaluation there says.

    Args:
        output_dir (`Path` or `str`):
            Folder a merge wrote.
        card_fields:
            Fields of `MergeCard` to set by hand, such as `hub_model_id`, `model_name` or `licence`.

    Returns:
        `MergeCard`: For `render_card` or `write_card`.

    Raises:
        CheckpointError: If the folder holds no finished merge.
    """
    folder = Path(output_dir)
    manifest = read_manifest(folder)
    arguments = manifest["arguments"]
    hub_model_id = card_fields.get("hub_model_id")
    name = hub_model_id.rpartition("/")[2] if hub_model_id else folder.resolve().name
    facts: dict[str, Any] = {
        "model_name": name,
        "output_kind": "adapter" if (folder / "adapter_config.json").is_file() else "full",
        "sources": _sources(folder, manifest),
        "method": manifest["method"],
        "space": manifest["space"],
        "block": arguments["block"],
        "norm": arguments["norm"],
        "task": read_task(folder),
        "non_default_arguments": _non_default(arguments),
        "evaluation": load_record(folder),
        "report_file": REPORT_FILE if _is_current(folder / REPORT_FILE) else None,
        "statistics": _statistics(manifest),
        "notes": manifest["notes"],
        "versions": {"hf_frmerge": manifest["hf_frmerge"], **manifest["versions"]},
        "manifest_files": [name for name in (MANIFEST_FILE, COEFFICIENTS_FILE) if (folder / name).is_file()],
    }
    return MergeCard(**{**facts, **card_fields})


def _sources(folder: Path, manifest: dict[str, Any]) -> list[CardSource]:
    entries = [*manifest["experts"], *([manifest["base_model"]] if manifest["base_model"] else [])]
    paths, _ = local_sources(folder, manifest)
    sources = [
        CardSource(
            spec=entry["id"],
            repo_id=entry["id"] if entry["on_hub"] else None,
            commit=entry["commit"],
            weight=entry.get("weight"),
            role="base" if index == len(manifest["experts"]) else "expert",
            kind=entry["kind"],
            metadata=read_source_metadata(path) if _is_readable(path) else SourceMetadata(),
        )
        for index, (entry, path) in enumerate(zip(entries, paths))
    ]
    trained_on = _base_of_adapter(folder)
    if trained_on is not None and not manifest["base_model"]:
        sources.append(CardSource(spec=trained_on, repo_id=trained_on, role="base"))
    return sources


def _is_readable(path: str | None) -> TypeGuard[str]:
    """Whether the card of a source can be read there; that of a source behind another URL is not looked for."""
    return path is not None and ("://" not in path or path.startswith("hub://"))


def _is_current(page: Path) -> bool:
    """Whether a page is of this merge and of its last evaluation."""
    records = [page.with_name(name) for name in (COEFFICIENTS_FILE, EVALUATION_FILE)]
    return page.is_file() and all(
        page.stat().st_mtime_ns >= record.stat().st_mtime_ns for record in records if record.is_file()
    )


def _base_of_adapter(folder: Path) -> str | None:
    """Return the Hub id an adapter names as its base; `None` for a full model, and for what may be a local folder."""
    config = folder / "adapter_config.json"
    if not config.is_file():
        return None
    name = json.loads(config.read_text(encoding="utf-8")).get("base_model_name_or_path")
    return name if name and is_public_base(folder, name) else None


def _non_default(arguments: dict[str, Any]) -> dict[str, object]:
    defaults = {field.name: field.default for field in fields(MergingArguments)}
    return {name: value for name, value in arguments.items() if name in defaults and value != defaults[name]}


def _statistics(manifest: dict[str, Any]) -> CardStatistics:
    entries = manifest["tensors"].values()
    merged = [entry for entry in entries if entry["action"] == "merge"]
    return CardStatistics(
        n_tensors_merged=len(merged),
        n_tensors_copied=len(entries) - len(merged),
        n_parameters=sum(math.prod(entry["shape"]) for entry in merged),
        geometry=Geometry.of_manifest(manifest),
    )
