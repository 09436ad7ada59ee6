"""Fit adapters into an adapter: the models are run whole, and the corrections are factors beside the experts'."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from hf_frmerge.errors import ArgumentError
from hf_frmerge.merging.planning.build_plan import build_plan

if TYPE_CHECKING:
    from hf_frmerge.merging.planning.plan import MergePlan


def as_whole_model(plan: MergePlan) -> MergePlan:
    """
    Plan a merge of adapters into an adapter again, as that of whole models, which can be run.

    Raises:
        ArgumentError: If there is no base to run them on, or the adapter cannot hold the corrections.
    """
    args = plan.args
    if plan.base is None:
        raise ArgumentError(
            "A calibrated merge runs its models, and adapters run on their base. Name it: base_model (--base-model)."
        )
    if args.calibration_form == "dense":
        raise ArgumentError(
            "calibration_form='dense' has a number for every weight, which no adapter can hold. Use "
            "calibration_form='low_rank', or adapter_output='merged'."
        )
    if args.fisher is None and (args.adapter_energy is not None or correction_rank(plan) < 1):
        most = max(sum(_ranks(plan, step.name)) for step in plan.steps)
        raise ArgumentError(
            "A calibrated adapter holds its experts' factors and beside them the corrections, so its rank is more "
            f"than {most} here. Leave out adapter_energy, and set adapter_rank above {most} or leave it out."
        )
    args = replace(args, adapter_output="merged", adapter_rank=None, adapter_energy=None, adapter_rank_pattern="auto")
    specs = [expert.spec for expert in plan.experts]
    return build_plan(specs, args, plan.weights, plan.base.spec, has_prompts=True)


def correction_rank(plan: MergePlan) -> int:
    """Return the rank of the low-rank form; in an adapter, what its rank leaves beside the experts' factors."""
    if plan.layout is not None or plan.args.adapter_rank is None:
        return plan.args.calibration_rank
    most = max(sum(_ranks(plan, step.name)) for step in plan.steps)
    return min(plan.args.calibration_rank, plan.args.adapter_rank - most)


def _ranks(plan: MergePlan, module: str) -> list[int]:
    return [e.adapter.deltas[module].rank for e in plan.experts if e.adapter and module in e.adapter.deltas]


def transposed_tensors(whole: MergePlan) -> set[str]:
    """Return the adapted tensors that the model stores as `(n_in, n_out)`."""
    adapters = [expert.adapter for expert in whole.experts if expert.adapter]
    return {name for adapter in adapters for name, delta in adapter.deltas.items() if delta.transposed}
