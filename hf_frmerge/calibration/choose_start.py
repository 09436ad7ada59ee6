"""Choose the merge without data that is nearest to the experts on prompts, for a fit to start from."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from hf_frmerge.calibration.forward import mean_squared_distance, run_forward
from hf_frmerge.calibration.weights import WeightReader
from hf_frmerge.kernels.load import load_kernels
from hf_frmerge.merging.planning.choose_method import CANDIDATES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hf_frmerge.calibration.blockwise_model import BlockwiseModel
    from hf_frmerge.calibration.streams import Batch
    from hf_frmerge.merging.planning.plan import MergePlan


def start_distances(
    whole: MergePlan, model: BlockwiseModel, batches: Sequence[Batch]
) -> dict[str, tuple[float | None, ...]]:
    """
    Return by candidate the mean squared distance to every expert on its prompts; `None` where it has none.

    Experts and candidates run one after another; one block of one of them is in memory at a time.

    Args:
        whole: Plan of the merge into a whole model, by any of the candidates.
        model: Modules of its models.
        batches: Prompts to judge by.
    """
    kernels = load_kernels(whole.args.device)
    reader = WeightReader(whole, kernels, model.model)
    own = [[batch for batch in batches if batch.expert == expert] for expert in range(len(whole.experts))]
    experts = {
        index: run_forward(model, partial(reader.expert, index), prompts)
        for index, prompts in enumerate(own)
        if prompts
    }
    every = [batch for prompts in own for batch in prompts]
    found: dict[str, tuple[float | None, ...]] = {}
    for candidate in CANDIDATES:
        plan = replace(whole, args=candidate.of(whole.args))
        merged = run_forward(model, WeightReader(plan, kernels, model.model).start, every)
        first, row = 0, []
        for index, prompts in enumerate(own):
            part = merged.part(first, len(prompts))
            row.append(mean_squared_distance(part, experts[index]) if prompts else None)
            first += len(prompts)
        found[candidate.label] = tuple(row)
    return found
