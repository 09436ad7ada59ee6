"""Build a model card from the folder of a finished merge: its manifest, configuration and its sources' cards."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from hf_frmerge.checkpoints.disk import remove_file
from hf_frmerge.checkpoints.local_folder import LocalFolder
from hf_frmerge.checkpoints.tensors.small_files import read_json
from hf_frmerge.hub.card.card import write_card
from hf_frmerge.hub.card.data import CardSource, CardStatistics, MergeCard
from hf_frmerge.hub.card.licences import SourceMetadata, read_source_metadata
from hf_frmerge.hub.card.private_paths import is_public_base
from hf_frmerge.hub.card.tasks import read_task
from hf_frmerge.merging.arguments.merging_arguments import MergingArguments
from hf_frmerge.merging.planning.coefficient_table import COEFFICIENTS_FILE
from hf_frmerge.merging.planning.corrections import CORRECTIONS_FILE
from hf_frmerge.merging.record.manifest import (
    EVALUATION_FILE,
    MANIFEST_FILE,
    REPORT_FILE,
    Manifest,
    local_sources,
    parts_of_path,
    read_manifest,
)
from hf_frmerge.wording.account import losses_sentence
from hf_frmerge.wording.geometry import Geometry
from hf_frmerge.wording.parts import FIGURES

if TYPE_CHECKING:
    from hf_frmerge.evaluation.record import EvaluationRecord
    from hf_frmerge.merging.record.manifest_entries import RecordedFolder

FIGURES_FOLDER = "figures"


def describe_merge(
    output_dir: Path | str,
    manifest: Manifest | None = None,
    *,
    draw: Callable[[Path, Path], Mapping[str, Path]] | None = None,
    **card_fields: Any,
) -> Path:
    """
    Write the model card of the merge in a folder, with its figures.

    Args:
        output_dir (`Path` or `str`):
            Folder a merge wrote.
        manifest (`Manifest`, *optional*):
            Its record, if it is at hand; by default it is read.
        draw (`Callable`, *optional*):
            Function that saves the figures of one folder into another and returns their files by name, such as
            `report.figures.save_figures`. The default is a card without figures.
        card_fields:
            Passed to `card_of_folder`.

    Returns:
        `Path`: Path of the card.

    Raises:
        CheckpointError: If the folder holds no finished merge.
    """
    folder = Path(output_dir)
    figures_folder = folder / FIGURES_FOLDER
    figures = dict(draw(folder, figures_folder)) if draw is not None else {}
    for name in FIGURES.keys() - figures.keys():  # left over from an earlier card, and would be pushed
        remove_file(figures_folder / f"{name}.png")
    relative_paths = {name: file.relative_to(folder).as_posix() for name, file in figures.items()}
    return write_card(card_of_folder(folder, manifest, figures=relative_paths, **card_fields), folder)


def card_of_folder(output_dir: Path | str, manifest: Manifest | None = None, **card_fields: Any) -> MergeCard:
    """
    Collect the contents of a model card from the manifest and the evaluation record of a folder.

    Args:
        output_dir (`Path` or `str`):
            Folder a merge wrote.
        manifest (`Manifest`, *optional*):
            Its record, if it is at hand; by default it is read.
        card_fields:
            Fields of `MergeCard` to override, such as `hub_model_id`, `model_name` or `licence`.

    Returns:
        `MergeCard`: Input of `render_card` and `write_card`.

    Raises:
        CheckpointError: If the folder holds no finished merge.
    """
    folder = Path(output_dir)
    manifest = manifest or read_manifest(folder)
    arguments = manifest.arguments
    hub_model_id = card_fields.get("hub_model_id")
    name = hub_model_id.rpartition("/")[2] if hub_model_id else folder.resolve().name
    facts: dict[str, Any] = {
        "model_name": name,
        "output_kind": "adapter" if (folder / "adapter_config.json").is_file() else "full",
        "sources": _sources(folder, manifest),
        "method": manifest.method,
        "space": manifest.space,
        "block": arguments["block"],
        "norm": arguments["norm"],
        "task": read_task(folder),
        "non_default_arguments": _non_default(arguments),
        "evaluation": _evaluation(folder),
        "report_file": REPORT_FILE if _is_current(folder / REPORT_FILE) else None,
        "statistics": _statistics(manifest),
        "calibration": manifest.calibration,
        "notes": list(manifest.report.notes),
        "versions": manifest.all_versions,
        "manifest_files": [
            name for name in (MANIFEST_FILE, COEFFICIENTS_FILE, CORRECTIONS_FILE) if (folder / name).is_file()
        ],
    }
    return MergeCard(**{**facts, **card_fields})


def _sources(folder: Path, manifest: Manifest) -> list[CardSource]:
    """Collect the sources with the metadata of their cards, as far as these can be read."""
    paths, _ = local_sources(folder, manifest)
    sources = []
    for model, path in zip(manifest.models, paths):
        source, *on_it = [_source(part, place) for part, place in zip(model.parts, parts_of_path(path))]
        sources.append(
            replace(
                source,
                weight=model.weight if manifest.is_weighted else None,
                role="base" if model is manifest.base_model else "expert",
                adapter=on_it[0] if on_it else None,
            )
        )
    trained_on = _base_of_adapter(folder)
    # A merge of adapters needs no base to run, but its card should name the one they were trained on.
    if trained_on is not None and manifest.base_model is None:
        sources.append(CardSource(spec=trained_on, repo_id=trained_on, role="base"))
    return sources


def _source(model: RecordedFolder, path: str | None) -> CardSource:
    metadata = read_source_metadata(path) if _is_readable(path) else SourceMetadata()
    return CardSource(model.id, model.id if model.on_hub else None, model.commit, kind=model.kind, metadata=metadata)


def _evaluation(folder: Path) -> EvaluationRecord | None:
    """Load what was measured; without the file, spare a merge the imports that reading it takes."""
    if not (folder / EVALUATION_FILE).is_file():
        return None
    from hf_frmerge.evaluation.record import load_record

    return load_record(folder)


def _is_readable(path: str | None) -> TypeGuard[str]:
    """Whether the card of a source can be read: the folder is local or on the Hub, not behind another URL."""
    return path is not None and ("://" not in path or path.startswith("hub://"))


def _is_current(page: Path) -> bool:
    """Whether a report page is newer than the coefficients and the evaluation beside it, so belongs to them."""
    records = [page.with_name(name) for name in (COEFFICIENTS_FILE, EVALUATION_FILE)]
    return page.is_file() and all(
        page.stat().st_mtime_ns >= record.stat().st_mtime_ns for record in records if record.is_file()
    )


def _base_of_adapter(folder: Path) -> str | None:
    """Return the Hub id an adapter names as its base; `None` for a full model or if it may be a local folder."""
    name = read_json(LocalFolder(str(folder)), "adapter_config.json", str(folder)).get("base_model_name_or_path")
    return name if isinstance(name, str) and name and is_public_base(folder, name) else None


def _non_default(arguments: dict[str, Any]) -> dict[str, object]:
    """Select arguments that differ from their defaults; those this version does not know are dropped."""
    defaults = {field.name: field.default for field in fields(MergingArguments)}
    return {name: value for name, value in arguments.items() if name in defaults and value != defaults[name]}


def _statistics(manifest: Manifest) -> CardStatistics:
    merged = [tensor for tensor in manifest.tensors.values() if tensor.action == "merge"]
    return CardStatistics(
        n_tensors_merged=len(merged),
        n_tensors_copied=len(manifest.tensors) - len(merged),
        n_parameters=sum(math.prod(tensor.shape) for tensor in merged),
        geometry=Geometry.of_manifest(manifest),
        losses=losses_sentence(manifest.report.accounts),
    )
