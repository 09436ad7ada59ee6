"""Open the inputs of a step of the plan."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_frmerge.checkpoints.adapters.rows import AdapterRow
from hf_frmerge.merging.operands.factor_inputs import FactorInputs
from hf_frmerge.merging.operands.tensor_inputs import DenseTensor, DoraTensor, StoredTensor, TensorInputs

if TYPE_CHECKING:
    from hf_frmerge.merging.planning.plan import Expert, MergePlan
    from hf_frmerge.merging.planning.tensor_step import TensorStep


def open_inputs(plan: MergePlan, step: TensorStep) -> TensorInputs | FactorInputs:
    """Return the inputs of a step: factors if the output is an adapter, else tensors."""
    if plan.layout is not None:
        return open_tensors(plan, step)
    rows = AdapterRow(tuple(e.adapter.deltas.get(step.name) if e.adapter else None for e in plan.experts))
    return FactorInputs(rows, _labels(plan))


def open_tensors(plan: MergePlan, step: TensorStep) -> TensorInputs:
    """Return the inputs of a tensor of a full model."""
    labels = _labels(plan)
    if step.action == "copy":
        donor = plan.base if step.donor < 0 else plan.experts[step.donor]
        assert donor is not None and donor.checkpoint is not None
        only = StoredTensor(donor.checkpoint, donor.checkpoint.tensors[step.name])
        return TensorInputs(step.name, 1, 1, None, {0: only}, {}, {0: labels[step.donor]})
    # In weight space full experts do not need the base. Adapters do: their weights are base plus delta.
    base = None
    if plan.base is not None and (plan.space == "deltas" or any(expert.adapter for expert in plan.experts)):
        assert plan.base.checkpoint is not None
        base = StoredTensor(plan.base.checkpoint, plan.base.checkpoint.tensors[step.name])
    dense: dict[int, DenseTensor] = {}
    low_rank = {}
    for index, expert in enumerate(plan.experts):
        weights = _dense_tensor(expert, step, base)
        if weights is not None:
            dense[index] = weights
        elif expert.adapter is not None and step.name in expert.adapter.deltas:
            low_rank[index] = expert.adapter.deltas[step.name]
    factored = base is not None and not dense and step.n_blocks == 1
    row_len = step.shape[-1] if len(step.shape) > 1 and step.shape[-1] > 1 else max(step.numel, 1)
    return TensorInputs(
        step.name, step.cols, len(plan.experts), base, dense, low_rank, labels, plan.space, factored, row_len
    )


def _labels(plan: MergePlan) -> dict[int, str]:
    labels = {index: f"expert {expert.spec!r}" for index, expert in enumerate(plan.experts)}
    return labels | ({-1: f"base model {plan.base.spec!r}"} if plan.base is not None else {})


def _dense_tensor(expert: Expert, step: TensorStep, base: StoredTensor | None) -> DenseTensor | None:
    """Return the expert's full tensor, if it has one; an adapter has one for `modules_to_save` and DoRA modules."""
    if expert.checkpoint is not None:
        return StoredTensor(expert.checkpoint, expert.checkpoint.tensors[step.name])
    assert expert.adapter is not None and base is not None
    if step.name in expert.adapter.dense:
        return StoredTensor(expert.adapter.checkpoint, expert.adapter.dense[step.name])
    delta = expert.adapter.deltas.get(step.name)
    return DoraTensor(base, delta, step.cols) if delta and delta.is_dora else None
