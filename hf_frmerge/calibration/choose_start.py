"""Choose the merge without data that is nearest to the experts on prompts, for a fit to start from."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from hf_frmerge.calibration.blocks.forward import merge_distances
from hf_frmerge.merging.planning.choose_method import CANDIDATES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hf_frmerge.calibration.blocks.blockwise_model import BlockwiseModel
    from hf_frmerge.calibration.blocks.streams import Batch
    from hf_frmerge.merging.planning.plan import MergePlan


def start_distances(
    whole: MergePlan, model: BlockwiseModel, batches: Sequence[Batch]
) -> dict[str, tuple[float | None, ...]]:
    """
    Return by candidate the mean squared distance to every expert on its prompts; see `merge_distances`.

    Args:
        whole: Plan of the merge into a whole model, by any of the candidates.
        model: Modules of its models.
        batches: Prompts to judge by.
    """
    plans = {candidate.label: replace(whole, args=candidate.of(whole.args)) for candidate in CANDIDATES}
    return merge_distances(plans, model, batches)
