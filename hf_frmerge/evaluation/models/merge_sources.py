"""Where the models of a finished merge are, from the record beside it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hf_frmerge.errors import ArgumentError
from hf_frmerge.merging.record.manifest import LOCAL_SOURCES_FILE, MANIFEST_FILE, read_manifest


@dataclass(frozen=True)
class MergeSources:
    """
    What a merged model was made of.

    Attributes:
        experts: folders or Hub ids with their commit, in order.
        weights: one per expert; `None` if they are not known.
        base_model: folder or Hub id with its commit, if a base took part.
    """

    experts: list[str]
    weights: list[float] | None
    base_model: str | None


def sources_of_merge(
    output_dir: str | Path, experts: Sequence[str] = (), base_model: str | None = None
) -> MergeSources:
    """
    Return what a merge was made of; what the caller names comes before what the record says.

    Args:
        output_dir (`str` or `Path`):
            Folder of a model; one that no merge wrote adds nothing.
        experts (`Sequence[str]`, *optional*):
            Where the experts are now: all, in their order, or others to compare with, which have no weights then.
        base_model (`str`, *optional*):
            Where the base is now.

    Raises:
        ArgumentError: If the record names local models and no longer says where they are.
    """
    folder = Path(output_dir)
    if not (folder / MANIFEST_FILE).is_file():
        return MergeSources(list(experts), None, base_model)
    manifest = read_manifest(folder)
    entries = manifest["experts"]
    weights = [float(entry["weight"]) for entry in entries]
    if experts:
        names = [Path(spec.partition("@")[0]).name for spec in experts]
        same = names == [Path(entry["id"]).name for entry in entries]
        return MergeSources(list(experts), weights if same else None, base_model or _base(folder, manifest))
    found = [_spec(entry, path) for entry, path in zip(entries, _paths(folder, len(entries)))]
    if None in found:
        raise ArgumentError(
            f"{folder} does not say where {entries[found.index(None)]['id']!r} is on this machine: give --experts "
            "once for every expert, in their order."
        )
    return MergeSources([spec for spec in found if spec is not None], weights, base_model or _base(folder, manifest))


def _base(folder: Path, manifest: dict) -> str | None:
    if manifest["base_model"] is None:
        return None
    return _spec(manifest["base_model"], _paths(folder, len(manifest["experts"]) + 1)[-1])


def _paths(folder: Path, count: int) -> list[str | None]:
    file = folder / LOCAL_SOURCES_FILE
    known = json.loads(file.read_text(encoding="utf-8"))["models"] if file.is_file() else []
    return [*known[:count], *[None] * (count - len(known))]


def _spec(entry: dict, path: str | None) -> str | None:
    return f"{entry['id']}@{entry['commit']}" if entry["on_hub"] else path
