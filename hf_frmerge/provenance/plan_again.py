"""A recorded merge, planned once more: from its manifest and wherever its models are now."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_frmerge.checkpoints.resolve import resolve
from hf_frmerge.errors import ArgumentError, CheckpointError
from hf_frmerge.merging.arguments.merging_arguments import RETIRED, MergingArguments
from hf_frmerge.merging.planning.build_plan import build_plan
from hf_frmerge.merging.planning.coefficient_table import COEFFICIENTS_FILE
from hf_frmerge.merging.record.manifest import Manifest

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from hf_frmerge.merging.planning.plan import MergePlan


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
    return resolve(model, token=token, download=False, extra=(COEFFICIENTS_FILE,)).path


def by_name(manifest: Manifest, chosen: Mapping[str, Sequence[str]]) -> list[str | None]:
    """
    Give every recorded model, experts then base, the place chosen for its name; `None` where none was.

    Args:
        manifest: Record of the merge.
        chosen: Name in the record -> where it is now. Two models of one name take two places, in order.

    Raises:
        ArgumentError: If `chosen` names a model that is not in the record.
    """
    names = [model.id for model in manifest.models]
    unknown = [name for name in chosen if name not in names]
    if unknown:
        expected = ", ".join(dict.fromkeys(names))
        raise ArgumentError(f"The merge had no expert {unknown[0]!r}: expected one of {expected}.")
    left = {name: list(places) for name, places in chosen.items()}
    return [(left[name].pop(0) if len(left[name]) > 1 else left[name][0]) if name in left else None for name in names]


def find_models(
    manifest: Manifest, given: Sequence[str | None], here: Sequence[str | None], *, option: str
) -> list[str]:
    """
    Say where every recorded model is to be read, the experts in order, then the base.

    Args:
        manifest: Record of the merge.
        given: Where the user says it is, if so; else it is taken from the Hub at its commit, or from `here`.
        here: Where local models were on this machine (`manifest.local_sources`).
        option: How a user gives a place, for the error.

    Raises:
        CheckpointError: If a local model is not known on this machine.
    """
    specs = [said or model.pinned or path for said, model, path in zip(given, manifest.models, here)]
    missing = [model.id for model, spec in zip(manifest.models, specs) if spec is None]
    if missing:
        raise CheckpointError(
            f"The merge used local models that are not known on this machine: {', '.join(missing)}. Say where they "
            f"are with {option}."
        )
    return [spec for spec in specs if spec is not None]


def plan_again(manifest: Manifest, models: Sequence[str], folder: str, **changes: Any) -> MergePlan:
    """
    Plan the recorded merge of `models` (the experts in order, then the base if there was one).

    Args:
        manifest: Record of the merge.
        models: Where they are.
        folder: Where the record is.
        changes: Arguments to set anew; they should not alter the result.

    Raises:
        CheckpointError: If the record has arguments that this version does not know, or the models do not fit.
    """
    known = {field.name for field in fields(MergingArguments)}
    recorded = {
        name: value
        for name, value in manifest.arguments.items()
        if name not in RETIRED and not name.endswith("_token")
    }
    unknown = sorted(recorded.keys() - known)
    if unknown:
        raise CheckpointError(
            f"The merge was made by hf_frmerge {manifest.hf_frmerge} with arguments that this version does not "
            f"know: {', '.join(unknown)}. Install that version."
        )
    # Whatever the merge did to its own folder, and whoever it told about it, is not repeated.
    recorded |= {"overwrite": False, "resume_from_checkpoint": False, "push_to_hub": False, "space": manifest.space}
    if recorded.get("coefficients") is not None:
        recorded["coefficients"] = folder  # the table that was given is part of the record
    n_experts = len(manifest.experts)
    return build_plan(
        list(models[:n_experts]),
        MergingArguments(**{**recorded, **changes}),
        manifest.weights,
        models[n_experts] if manifest.base_model is not None else None,
    )
