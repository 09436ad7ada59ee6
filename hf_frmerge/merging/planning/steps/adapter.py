"""Steps of a merge whose output is an adapter: one for each module, with the shape of its delta."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_frmerge.checkpoints.adapters.base import base_notes, common_base
from hf_frmerge.checkpoints.tensors.floats import DTYPE_CODES
from hf_frmerge.checkpoints.tensors.reader import some
from hf_frmerge.errors import ArgumentError, CheckpointError
from hf_frmerge.merging.planning.blocks import group_of
from hf_frmerge.merging.planning.steps.matrices import is_inner_matrix, matrix_note
from hf_frmerge.merging.planning.steps.planned_steps import PlannedSteps
from hf_frmerge.merging.planning.steps.set_apart import reasons_of
from hf_frmerge.merging.planning.steps.tensor_weights import check_groups, scales_by_tensor, weights_by_tensor
from hf_frmerge.merging.planning.tensor_step import TensorStep

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hf_frmerge.checkpoints.adapters.adapter import Adapter
    from hf_frmerge.merging.arguments.merging_arguments import MergingArguments
    from hf_frmerge.merging.arguments.tensor_rules import TensorRules
    from hf_frmerge.merging.planning.plan import Expert


def adapter_steps(
    args: MergingArguments,
    experts: Sequence[Expert],
    base: Expert | None,
    weights: list[float],
    rules: TensorRules,
) -> PlannedSteps:
    """
    Plan a step for each module of adapters that are merged into an adapter.

    Args:
        args: Options.
        experts: Adapters, matched to the base if there is one.
        base: Base model.
        weights: One number per expert.
        rules: Rules of the user for single tensors.

    Raises:
        ArgumentError: If options ask for what factors cannot express, or leave no module.
        CheckpointError: If an adapter holds what factors cannot express, or adapters have different bases.
    """
    from hf_frmerge.checkpoints.adapters.rows import align_adapters, missing_notes

    adapters = [expert.adapter for expert in experts if expert.adapter]
    _check_expressible(args, adapters)
    common_base(adapters, base.source if base else None)
    rows = align_adapters(adapters)
    if not rows:
        raise ArgumentError("`leave_out` leaves no module to merge. Give expressions of fewer.")
    names = [row.first.target for row in rows]
    weights_for, notes = weights_by_tensor(args, weights, names)
    scale_of = scales_by_tensor(args, names)
    dtype = DTYPE_CODES.get(args.dtype, rows[0].first.up.dtype)
    steps = [
        TensorStep(
            name=row.first.target,
            dtype=dtype,
            shape=row.first.shape,
            action="merge",
            donor=-1,
            weights=weights_for[row.first.target],
            group=group_of(row.first.target, args.block),
            n_blocks=1,
            block_len=row.n_out * row.n_in,
            is_matrix=args.merges_matrices and is_inner_matrix(row.first.target, row.first.shape),
            scale=scale_of[row.first.target],
        )
        for row in rows
    ]
    check_groups(steps)
    notes += [matrix_note(args, steps)] if args.merges_matrices else []
    notes += missing_notes(adapters, rows, args.strict, is_matched=base is not None)
    notes += base_notes(adapters, base.source) if base else []
    if base and base.source.is_gguf:
        notes.append(
            f"The adapter names {base.spec!r} as its base, which PEFT cannot load by its name, as it is a GGUF file. "
            "Write the model that it was made from into adapter_config.json (base_model_name_or_path), or load the "
            "file with transformers (`gguf_file=`) and put the adapter on that."
        )
    return PlannedSteps(steps, notes, left_out=reasons_of(rules, experts, ()))


def _check_expressible(args: MergingArguments, adapters: Sequence[Adapter]) -> None:
    """Raise if the result cannot be written as low-rank factors."""
    if args.block not in ("tensor", "layer", "model"):
        raise ArgumentError(
            f"block={args.block!r} gives rows of one module different coefficients, which factors cannot express. Use "
            '"tensor", "layer" or "model", or adapter_output="merged".'
        )
    for adapter in adapters:
        if adapter.dense:
            raise CheckpointError(
                f"Adapter {adapter.spec!r} holds full tensors beside its factors (modules_to_save: "
                f'{some(adapter.dense)}), which a merged adapter cannot carry. Use adapter_output="merged".'
            )
        for delta in adapter.deltas.values():
            delta.check_low_rank()
