"""Steps of a merge whose output is a full model: one for each of its tensors."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hf_frmerge.checkpoints.adapters.base import base_notes
from hf_frmerge.checkpoints.adapters.folded import folded_within
from hf_frmerge.checkpoints.alignment.align import AlignedTensor, Alignment, align
from hf_frmerge.checkpoints.model_structure import untying
from hf_frmerge.checkpoints.tensors.floats import DTYPE_CODES
from hf_frmerge.checkpoints.tensors.quantised import SECTIONS
from hf_frmerge.checkpoints.tensors.reader import FLOAT_DTYPES, some
from hf_frmerge.errors import CheckpointError
from hf_frmerge.merging.planning.blocks import block_shape, group_of, head_dim_of
from hf_frmerge.merging.planning.steps.matrices import is_inner_matrix, matrix_note
from hf_frmerge.merging.planning.steps.new_heads import OTHER_HEAD, NewHead, find_new_head
from hf_frmerge.merging.planning.steps.planned_steps import PlannedSteps
from hf_frmerge.merging.planning.steps.set_apart import config_for_taken, left_out_note, reasons_of, taken_tensors
from hf_frmerge.merging.planning.steps.tensor_weights import check_groups, scales_by_tensor, weights_by_tensor
from hf_frmerge.merging.planning.tensor_step import TensorStep
from hf_frmerge.merging.planning.vocabulary.choose_tokens import (
    full_models,
    refuse_changed_rows,
    refuse_taken_rows,
    token_table,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hf_frmerge.checkpoints.vocabularies.choice import TokenChoice
    from hf_frmerge.merging.arguments.merging_arguments import MergingArguments
    from hf_frmerge.merging.arguments.tensor_rules import TensorRules
    from hf_frmerge.merging.planning.plan import Expert


def full_model_steps(
    args: MergingArguments,
    experts: Sequence[Expert],
    base: Expert | None,
    weights: list[float],
    rules: TensorRules,
    choice: TokenChoice | None,
) -> PlannedSteps:
    """
    Plan a step for each tensor of a full model.

    Args:
        args: Options.
        experts: Full models, and adapters that are matched to the base.
        base: Base model.
        weights: One number per expert.
        rules: Rules of the user for single tensors.
        choice: Tokens of the output, if they were chosen.

    Raises:
        ArgumentError: If options contradict each other or the models.
        CheckpointError: If models do not fit together, or a change that an adapter makes would be lost.
    """
    head = find_new_head(experts, base.checkpoint if base else None)
    full = [expert.checkpoint for expert in experts if expert.checkpoint]
    tokens = token_table(choice, full_models(experts, base), args)
    aligned = align(full, base.checkpoint if base else None, rules.decides, tokens)
    notes = [*aligned.notes, *head.notes, *_adapter_notes(experts, base, args.strict)]
    models = dict(enumerate(experts)) | ({-1: base} if base else {})
    taken = taken_tensors(rules, models)
    refuse_taken_rows(taken, aligned.token_rows)
    refuse_changed_rows(experts, aligned.token_rows)
    reasons = reasons_of(rules, list(models.values()), {tensor.name for tensor in taken})
    donor = base or next(expert for expert in experts if expert.checkpoint)
    if not donor.weights.config():
        raise CheckpointError(
            f"{donor.spec!r} has an empty config.json ({{}}), so what is made from it could not be loaded. Put the "
            "one of its model class there."
        )
    lacking = [name for name in donor.weights.tensors if name in reasons]
    notes += [left_out_note(lacking)] if lacking else []
    config_changes: dict[str, Any] = head.config | config_for_taken(donor, taken, models)
    if aligned.unties:
        config_changes |= untying(donor.weights.config())
    if donor.weights.quantisation:
        config_changes |= dict.fromkeys(SECTIONS)
    tensors = [*_tensors_of_experts(aligned, experts, head), *taken]
    weights_for, rule_notes = weights_by_tensor(args, weights, [tensor.name for tensor in tensors])
    notes += rule_notes
    head_dim = head_dim_of(donor.weights.config()) if args.block == "head" else None
    steps = _make_steps(args, tensors, weights_for, head_dim)
    if args.merges_matrices:
        notes.append(matrix_note(args, steps))
    check_groups(steps)
    _refuse_homeless(experts, {step.name for step in steps if step.action == "merge"})
    left_out = aligned.left_out | dict.fromkeys(head.left_out, OTHER_HEAD) | reasons
    return PlannedSteps(steps, notes, left_out, config_changes, aligned.token_rows)


def _tensors_of_experts(aligned: Alignment, experts: Sequence[Expert], head: NewHead) -> list[AlignedTensor]:
    """Return the tensors that models were aligned to, without those of a head that another takes the place of."""
    full = [index for index, expert in enumerate(experts) if expert.checkpoint]
    tensors = [
        replace(tensor, donor=-1 if tensor.donor < 0 else full[tensor.donor])
        for tensor in aligned.tensors
        if tensor.name not in head.left_out
    ]
    tensors += [AlignedTensor(name, info.dtype, info.shape, "merge", -1) for name, info in head.tensors.items()]
    if any(expert.source.kind == "full" for expert in experts):
        return tensors
    # With adapters only, a tensor that none of them changes is copied from the base.
    changed = {name for e in experts if e.adapter for name in (*e.adapter.deltas, *e.adapter.dense)}
    folded = (expert.checkpoint.tensors.items() for expert in experts if expert.checkpoint)
    changed |= {name for tensors_of_one in folded for name, info in tensors_of_one if folded_within(info)}
    return [tensor if tensor.name in changed else replace(tensor, action="copy") for tensor in tensors]


def _make_steps(
    args: MergingArguments,
    tensors: Sequence[AlignedTensor],
    weights_for: dict[str, tuple[float, ...]],
    head_dim: int | None,
) -> list[TensorStep]:
    scale_of = scales_by_tensor(args, [tensor.name for tensor in tensors])
    steps = []
    for tensor in tensors:
        is_merged = tensor.action == "merge"
        n_blocks, block_len = block_shape(tensor.name, tensor.shape, args.block if is_merged else "tensor", head_dim)
        steps.append(
            TensorStep(
                name=tensor.name,
                dtype=DTYPE_CODES.get(args.dtype, tensor.dtype) if tensor.dtype in FLOAT_DTYPES else tensor.dtype,
                shape=tensor.shape,
                action=tensor.action,
                donor=tensor.donor,
                weights=weights_for[tensor.name] if is_merged else (),
                group=group_of(tensor.name, args.block),
                n_blocks=n_blocks,
                block_len=block_len,
                is_matrix=is_merged and args.merges_matrices and is_inner_matrix(tensor.name, tensor.shape),
                scale=scale_of[tensor.name] if is_merged else 1.0,
            )
        )
    return steps


def _adapter_notes(experts: Sequence[Expert], base: Expert | None, strict: bool) -> list[str]:
    """Note modules that some adapters lack, and other bases they name, if adapters are merged into a full model."""
    adapters = [expert.adapter for expert in experts if expert.adapter]
    if not adapters or base is None:
        return []
    from hf_frmerge.checkpoints.adapters.rows import align_adapters, missing_notes

    notes = missing_notes(adapters, align_adapters(adapters), strict, is_matched=True)
    return notes + base_notes(adapters, base.source)


def _refuse_homeless(experts: Sequence[Expert], merged: set[str]) -> None:
    """Raise if an adapter changes a tensor that is copied or left out: its delta would be lost without a word."""
    for expert in experts:
        adapter = expert.adapter
        lost = [name for name in (*adapter.deltas, *adapter.dense) if name not in merged] if adapter else []
        if lost:
            raise CheckpointError(
                f"Adapter {expert.spec!r} changes {some(lost)}, which cannot be merged here: the models store it as "
                "whole numbers, or twice. Merge the adapter into its base with PEFT's `merge_and_unload` and merge "
                "the full checkpoints."
            )
