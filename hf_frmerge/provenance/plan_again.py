"""A recorded merge, planned once more: from its manifest and wherever its models are now."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

from hf_frmerge.errors import CheckpointError
from hf_frmerge.merging.arguments.merging_arguments import RETIRED, MergingArguments
from hf_frmerge.merging.planning.build_plan import build_plan

if TYPE_CHECKING:
    from hf_frmerge.merging.planning.plan import MergePlan
    from hf_frmerge.merging.record.find_models import MergeModels
    from hf_frmerge.merging.record.manifest import Manifest


def plan_again(manifest: Manifest, models: MergeModels, folder: str, **changes: Any) -> MergePlan:
    """
    Plan a recorded merge of `models`.

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
    return build_plan(models.experts, MergingArguments(**{**recorded, **changes}), models.weights, models.base_model)
