"""Where the models of a finished merge are, from the record beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hf_frmerge.errors import ArgumentError
from hf_frmerge.merging.record.manifest import MANIFEST_FILE, local_sources, read_manifest


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
    paths, _ = local_sources(folder, manifest)
    places = [model.pinned or path for model, path in zip(manifest.models, paths)]
    found, base = places[: len(manifest.experts)], places[-1] if manifest.base_model is not None else None
    if experts:
        names = [Path(spec.partition("@")[0]).name for spec in experts]
        same = names == [Path(expert.id).name for expert in manifest.experts]
        return MergeSources(list(experts), manifest.weights if same else None, base_model or base)
    if None in found:
        raise ArgumentError(
            f"{folder} does not say where {manifest.experts[found.index(None)].id!r} is on this machine: give "
            "--experts once for every expert, in their order."
        )
    return MergeSources([spec for spec in found if spec is not None], manifest.weights, base_model or base)
