"""Find the models of a recorded merge: where the user says, on the Hub, or where they were on this machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hf_frmerge.checkpoints.resolve import resolve
from hf_frmerge.errors import ArgumentError, CheckpointError
from hf_frmerge.merging.planning.coefficient_table import COEFFICIENTS_FILE
from hf_frmerge.merging.planning.corrections import CORRECTIONS_FILE
from hf_frmerge.merging.record.manifest import MANIFEST_FILE, local_sources, read_manifest

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from hf_frmerge.merging.record.manifest import Manifest


@dataclass(frozen=True)
class MergeModels:
    """
    The models of a merge.

    Attributes:
        experts: folders or Hub ids, in order.
        weights: one per expert; `None` if they are all alike, or not known.
        base_model: folder or Hub id, if a base took part.
    """

    experts: Sequence[str]
    weights: Sequence[float] | None = None
    base_model: str | None = None


def record_folder(model: str, token: str | None = None) -> str:
    """
    Return where the record of a merge can be read: its local folder, or `hub://org/name@commit` of a pushed one.

    Raises:
        CheckpointError: If there is no such folder.
        HubError: If the Hub cannot be reached or refuses.
    """
    # A local folder is not resolved: that one of its files is missing is for others to say.
    if Path(model).is_dir():
        return model
    return resolve(model, token=token, download=False, extra=(COEFFICIENTS_FILE, CORRECTIONS_FILE)).path


def find_models(
    folder: str | Path, manifest: Manifest, chosen: Sequence[str | None] = (), *, option: str
) -> MergeModels:
    """
    Find every model of a merge, to merge or verify once more.

    Args:
        folder: Where the record is.
        manifest: The record.
        chosen: Where the user says the models are, the experts in order, then the base; `None` where not said.
        option: How a user says it, for the error.

    Raises:
        CheckpointError: If a local model is not known on this machine.
    """
    places = _places(folder, manifest, chosen)
    missing = [model.name for model, place in zip(manifest.models, places) if place is None]
    if missing:
        raise CheckpointError(
            f"The merge used local models that are not known on this machine: {', '.join(missing)}. Say where they "
            f"are with {option}."
        )
    n_experts = len(manifest.experts)
    base_model = places[n_experts] if manifest.base_model is not None else None
    return MergeModels([place for place in places[:n_experts] if place is not None], manifest.weights, base_model)


def find_models_to_compare(
    folder: str | Path, experts: Sequence[str] = (), base_model: str | None = None
) -> MergeModels:
    """
    Find the models that a merged model is to be compared with: those it was made of, unless the user names others.

    Args:
        folder: Folder of a model; one that no merge wrote adds nothing.
        experts: Where the experts are now: all, in their order, or others to compare with, which have no weights then.
        base_model: Where the base is now.

    Raises:
        ArgumentError: If the record names local experts and no longer says where they are.
    """
    if not (Path(folder) / MANIFEST_FILE).is_file():
        return MergeModels(list(experts), None, base_model)
    manifest = read_manifest(folder)
    names = [expert.name for expert in manifest.experts]
    places = _places(folder, manifest, [*[None] * len(names), base_model])
    recorded, base_model = places[: len(names)], base_model or next(iter(places[len(names) :]), None)
    if experts:
        short = [Path(spec.partition("@")[0]).name for spec in experts]
        is_same = short == [Path(name).name for name in names]
        return MergeModels(list(experts), manifest.weights if is_same else None, base_model)
    if None in recorded:
        raise ArgumentError(
            f"{folder} does not say where {names[recorded.index(None)]!r} is on this machine: give --experts "
            "once for every expert, in their order."
        )
    return MergeModels([place for place in recorded if place is not None], manifest.weights, base_model)


def by_name(manifest: Manifest, chosen: Mapping[str, Sequence[str]]) -> list[str | None]:
    """
    Give every recorded model, experts then base, the place chosen for its name; `None` where none was.

    Args:
        manifest: Record of the merge.
        chosen: Name in the record -> where it is now. Two models of one name take two places, in order.

    Raises:
        ArgumentError: If `chosen` names a model that is not in the record.
    """
    names = [model.name for model in manifest.models]
    unknown = [name for name in chosen if name not in names]
    if unknown:
        expected = ", ".join(dict.fromkeys(names))
        raise ArgumentError(f"The merge had no expert {unknown[0]!r}: expected one of {expected}.")
    left = {name: list(places) for name, places in chosen.items()}
    return [(left[name].pop(0) if len(left[name]) > 1 else left[name][0]) if name in left else None for name in names]


def _places(folder: str | Path, manifest: Manifest, chosen: Sequence[str | None]) -> list[str | None]:
    """Where every recorded model is, the experts in order, then the base; `None` where that is not known."""
    local, _ = local_sources(Path(folder), manifest)
    chosen = [*chosen, *[None] * len(manifest.models)]
    return [said or model.pinned or path for said, model, path in zip(chosen, manifest.models, local)]
