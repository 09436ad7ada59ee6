"""Plan a recorded merge again from its manifest and the current places of its models."""

from __future__ import annotations

import os
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from hf_frmerge.errors import ArgumentError, CheckpointError
from hf_frmerge.merging.arguments.merging_arguments import RETIRED, MergingArguments
from hf_frmerge.merging.planning.build_plan import build_plan
from hf_frmerge.merging.planning.coefficient_table import COEFFICIENTS_FILE, read_coefficients
from hf_frmerge.merging.planning.corrections import CORRECTIONS_FILE, read_corrections

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from hf_frmerge.merging.planning.coefficient_table import CoefficientTable
    from hf_frmerge.merging.planning.plan import MergePlan
    from hf_frmerge.merging.record.find_models import MergeModels
    from hf_frmerge.merging.record.manifest import Manifest


def plan_again(manifest: Manifest, models: MergeModels, folder: str, **changes: Any) -> MergePlan:
    """
    Plan a recorded merge of `models`.

    Args:
        manifest: Record of the merge.
        models: Current places of its experts and base, with the weights.
        folder: Folder of the record, in which its coefficient table and corrections lie.
        changes: Arguments to override; they should not affect the result.

    Raises:
        CheckpointError: If this version does not know an argument of the record, or the models do not fit together.
    """
    # Tokens are left out: a record that had one should not use it.
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
    # Repeating a merge must not push, overwrite or resume, whatever the original did.
    # Pickles are opened because the user asks for it, not because the record of another does.
    recorded.pop("allow_pickle", None)
    # How much of this machine a merge takes is not for the record of another to say.
    recorded.pop("num_workers", None)
    recorded |= {"overwrite": False, "resume_from_checkpoint": False, "push_to_hub": False, "space": manifest.space}
    if recorded.get("coefficients") is not None:
        recorded["coefficients"] = folder  # the path the user gave may be gone, but the record has a copy of the table
    try:
        args = MergingArguments(**{**recorded, **changes})
    except ArgumentError as error:
        raise CheckpointError(f"The record in {folder} has arguments that cannot be: {error}") from error
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if args.memory_budget_bytes > memory:
        args.memory_budget = f"{memory}B"
    had_prompts = manifest.calibration is not None
    plan = build_plan(models.experts, args, models.weights, models.base_model, has_prompts=had_prompts)
    plan.calibration = manifest.calibration
    if CORRECTIONS_FILE in manifest.files:
        plan.corrections = read_corrections(folder)
    fitted = [name for name, tensor in manifest.tensors.items() if tensor.is_fitted]
    if fitted:
        table = read_coefficients(folder)
        plan.take_coefficients(replace(table, rows={name: _row(table, name) for name in fitted}))
    return plan


def _row(table: CoefficientTable, name: str) -> NDArray[np.float64]:
    if name not in table.rows:
        raise CheckpointError(
            f"{table.origin} has no coefficients of {name!r}, which was fitted on prompts. Restore "
            f"{COEFFICIENTS_FILE}, or calibrate again."
        )
    return table.rows[name]
