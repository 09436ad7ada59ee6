"""Checks that run before a merge downloads or writes anything."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_frmerge.hub.card.licences import licences_of_plan
from hf_frmerge.merging.engine.engine import worker_count
from hf_frmerge.merging.output_folder import check_output_dir
from hf_frmerge.merging.planning.disk_space import check_space

if TYPE_CHECKING:
    from hf_frmerge.merging.planning.plan import MergePlan


def check_plan(plan: MergePlan) -> None:
    """
    Check the output folder, the licences of the models, the memory budget, and the free disk space.

    Raises:
        ArgumentError: If the output folder is an input, or not empty, or the budget too small for one piece.
        MergeError: If a licence forbids derived works and was not allowed by name, or a disk is too small.
    """
    # A failure after the download would come too late: it may be 100 GB.
    check_output_dir(plan.args, plan.input_paths)
    licences_of_plan(plan).raise_if_refused()
    worker_count(plan)  # raises if there can be none
    check_space(plan)
