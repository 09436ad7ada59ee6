"""Open the inputs of a step of the plan."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from hf_frmerge.checkpoints.adapters.folded import Folded
from hf_frmerge.merging.operands.dense_tensors import (
    DenseTensor,
    DoraTensor,
    FoldedTensor,
    ProductTensor,
    StoredTensor,
    ZeroTensor,
)
from hf_frmerge.merging.operands.low_rank_deltas import LowRankDeltas
from hf_frmerge.merging.operands.tensor_inputs import TensorInputs

if TYPE_CHECKING:
    from hf_frmerge.checkpoints.tensors.reader import Checkpoint
    from hf_frmerge.merging.operands.factor_inputs import FactorInputs
    from hf_frmerge.merging.operands.row_mapped import RowFill, StoredRows
    from hf_frmerge.merging.planning.corrections import Corrections
    from hf_frmerge.merging.planning.plan import Expert, MergePlan
    from hf_frmerge.merging.planning.tensor_step import TensorStep


def open_inputs(plan: MergePlan, step: TensorStep) -> TensorInputs | FactorInputs:
    """Return the inputs of a step: factors if the output is an adapter, else tensors."""
    if plan.layout is not None:
        return open_tensors(plan, step)
    from hf_frmerge.checkpoints.adapters.rows import AdapterRow
    from hf_frmerge.merging.operands.factor_inputs import FactorInputs

    rows = AdapterRow(tuple(e.adapter.deltas.get(step.name) if e.adapter else None for e in plan.experts))
    correction = _correction(plan.corrections, step) if plan.corrections is not None else None
    assert not isinstance(correction, StoredTensor)  # a fit that makes an adapter finds factors alone
    return FactorInputs(rows, plan.labels, correction)


def open_tensors(plan: MergePlan, step: TensorStep) -> TensorInputs:
    """Return the inputs of a tensor of a full model."""
    labels = plan.labels
    if step.action == "copy":
        donor = plan.base if step.donor < 0 else plan.experts[step.donor]
        assert donor is not None and donor.checkpoint is not None
        # A head that only the adapters have is copied from the first of them.
        is_stored = step.name in donor.checkpoint.tensors
        only = _stored(donor.checkpoint, step, plan) if is_stored else _first_dense(plan, step)
        operands = step.name, 1, 1, None, {0: only}, LowRankDeltas({}, 1), {0: labels[step.donor]}
        return TensorInputs(*operands, saturates=plan.args.on_overflow == "saturate")
    # In weight space full experts do not need the base. Adapters do: their weights are base plus delta.
    base: DenseTensor | None = None
    if plan.base is not None and (plan.space == "deltas" or any(expert.adapter for expert in plan.experts)):
        assert plan.base.checkpoint is not None
        is_stored = step.name in plan.base.checkpoint.tensors
        base = _stored(plan.base.checkpoint, step, plan) if is_stored else ZeroTensor()
    dense: dict[int, DenseTensor] = {}
    low_rank = {}
    for index, expert in enumerate(plan.experts):
        weights = _dense_tensor(plan, expert, step, base)
        if weights is not None:
            dense[index] = weights
        elif expert.adapter is not None and step.name in expert.adapter.deltas:
            low_rank[index] = expert.adapter.deltas[step.name]
    factored = base is not None and not dense and step.n_blocks == 1
    correction = _correction(plan.corrections, step) if plan.corrections is not None else None
    row_len = step.shape[-1] if len(step.shape) > 1 and step.shape[-1] > 1 else max(step.numel, 1)
    return TensorInputs(
        step.name,
        step.cols,
        len(plan.experts),
        base,
        dense,
        LowRankDeltas(low_rank, step.cols),
        labels,
        plan.space,
        factored,
        row_len,
        correction,
        plan.post_step(step),
        saturates=plan.args.on_overflow == "saturate",
    )


def _correction(corrections: Corrections, step: TensorStep) -> StoredTensor | ProductTensor | None:
    """Return what is added to a tensor, stored whole or as two factors; `None` if nothing is."""
    checkpoint, stored = corrections.checkpoint, corrections.checkpoint.tensors
    if step.name in stored:
        return StoredTensor(checkpoint, stored[step.name])
    if f"{step.name}.up" not in stored:
        return None
    up, down = (StoredTensor(checkpoint, stored[f"{step.name}.{factor}"]) for factor in ("up", "down"))
    return ProductTensor(up, down, step.cols)


def _stored(checkpoint: Checkpoint, step: TensorStep, plan: MergePlan) -> DenseTensor:
    """Return a model's tensor, its rows in the order of the output."""
    tensor = _whole(checkpoint, step.name)
    rows = _stored_rows(checkpoint, step)
    if rows is None:
        return tensor
    # Imported on use, here and below: most merges have all rows in their order.
    from hf_frmerge.merging.operands.row_mapped import RowMappedTensor

    if (rows.rows >= 0).all():
        return RowMappedTensor(rows)
    is_wide = any(m.checkpoint and m.checkpoint.tensors[step.name].dtype == "F64" for m in plan.models)
    return RowMappedTensor(rows, _row_fill(plan, step), "F64" if is_wide else "F32")


def _stored_rows(checkpoint: Checkpoint, step: TensorStep) -> StoredRows | None:
    rows = checkpoint.row_maps.get(step.name)
    if rows is None:
        return None
    from hf_frmerge.merging.operands.row_mapped import StoredRows

    return StoredRows(_whole(checkpoint, step.name), rows, step.numel // len(rows))


def _whole(checkpoint: Checkpoint, name: str) -> StoredTensor | FoldedTensor:
    """Return a model's tensor as it is stored, or as an adapter changes it."""
    info = checkpoint.tensors[name]
    # Single experts of a stack that another model stores whole are the exception: these are read in its own dtype.
    return FoldedTensor(checkpoint, info.recipe) if isinstance(info.recipe, Folded) else StoredTensor(checkpoint, info)


def _row_fill(plan: MergePlan, step: TensorStep) -> RowFill:
    """Return the rows of tokens that some models lack."""
    from hf_frmerge.merging.operands.row_mapped import RowFill

    weights = step.weights or plan.weights
    experts = [
        (weight, rows)
        for weight, expert in zip(weights, plan.experts)
        if expert.checkpoint is not None and (rows := _stored_rows(expert.checkpoint, step)) is not None
    ]
    base = _stored_rows(plan.base.checkpoint, step) if plan.base is not None and plan.base.checkpoint else None
    assert plan.donor.checkpoint is not None
    donor = base or experts[0][1]
    n_stored = plan.donor.checkpoint.tensors[step.name].numel // donor.cols
    return RowFill(experts, base, replace(donor, rows=np.arange(n_stored)))


def _first_dense(plan: MergePlan, step: TensorStep) -> DenseTensor:
    return next(tensor for expert in plan.experts if (tensor := _dense_tensor(plan, expert, step, None)) is not None)


def _dense_tensor(plan: MergePlan, expert: Expert, step: TensorStep, base: DenseTensor | None) -> DenseTensor | None:
    """Return the expert's full tensor, if it has one; an adapter has one for `modules_to_save` and DoRA modules."""
    if expert.checkpoint is not None:
        return _stored(expert.checkpoint, step, plan)
    assert expert.adapter is not None
    if step.name in expert.adapter.dense:
        return StoredTensor(expert.adapter.checkpoint, expert.adapter.dense[step.name])
    delta = expert.adapter.deltas.get(step.name)
    if delta is None or not delta.is_dora:
        return None
    assert isinstance(base, StoredTensor)  # a delta changes a tensor of the base
    return DoraTensor(base, delta, step.cols)
