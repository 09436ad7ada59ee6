"""Build the plan of a merge from headers alone, and refuse what cannot be merged before any weight is read."""

from __future__ import annotations

import functools
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from hf_frmerge.checkpoints.adapters.base import base_notes, common_base
from hf_frmerge.checkpoints.beside.look_beside import look_beside
from hf_frmerge.checkpoints.model_structure import may_be_tied
from hf_frmerge.checkpoints.names.model_names import read_names
from hf_frmerge.checkpoints.quantised.dequantise import dequantise
from hf_frmerge.checkpoints.resolve import fetch_all, resolve_all
from hf_frmerge.checkpoints.source import is_on_hub
from hf_frmerge.checkpoints.tensors.alignment import AlignedTensor, align
from hf_frmerge.checkpoints.tensors.floats import DTYPE_CODES
from hf_frmerge.checkpoints.tensors.layout import ShardLayout
from hf_frmerge.checkpoints.tensors.quantised import SECTIONS, refuse_quantised
from hf_frmerge.checkpoints.tensors.reader import FLOAT_DTYPES, open_checkpoint, some
from hf_frmerge.errors import ArgumentError, CheckpointError
from hf_frmerge.merging.arguments.merging_arguments import validate_weights
from hf_frmerge.merging.arguments.tensor_rules import TensorRules, with_numbers
from hf_frmerge.merging.planning.account import account
from hf_frmerge.merging.planning.blocks import block_shape, group_of, head_dim_of
from hf_frmerge.merging.planning.coefficient_table import CoefficientTable, cut_as_given, read_coefficients
from hf_frmerge.merging.planning.model_class import read_structure
from hf_frmerge.merging.planning.new_heads import OTHER_HEAD, NewHead, find_new_head
from hf_frmerge.merging.planning.plan import Expert, MergePlan
from hf_frmerge.merging.planning.set_apart import (
    check_rules_match,
    config_for_taken,
    left_out_note,
    reasons_of,
    taken_tensors,
    without_ruled,
)
from hf_frmerge.merging.planning.tensor_step import TensorStep
from hf_frmerge.merging.planning.tensor_weights import scales_by_tensor, weights_by_tensor
from hf_frmerge.merging.planning.vocabulary import (
    choose_tokens,
    full_models,
    record_vocabulary,
    refuse_comparison,
    refuse_taken_rows,
    token_table,
    vocabulary_notes,
    with_model_numbers,
)
from hf_frmerge.methods.table import METHODS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from hf_frmerge.checkpoints.adapters.adapter import Adapter
    from hf_frmerge.checkpoints.resolve import Source
    from hf_frmerge.checkpoints.tensors.token_rows import TokenRows
    from hf_frmerge.checkpoints.vocabularies.choice import TokenChoice
    from hf_frmerge.merging.arguments.merging_arguments import MergingArguments
    from hf_frmerge.methods.method import Method


def build_plan(
    experts: Sequence[str],
    args: MergingArguments,
    weights: Sequence[float] | None = None,
    base_model: str | None = None,
    *,
    download: bool = True,
    check: Callable[[MergePlan], None] | None = None,
) -> MergePlan:
    """
    Resolve, open and align the models, and decide what happens to every tensor. Reads headers only.

    Models on the Hub that are not in the cache are planned from their headers on the Hub first, and then downloaded,
    so that models which do not fit together are refused before the download.

    Args:
        experts: Two or more folders or Hub ids, full checkpoints or adapters; or one adapter, to be folded into its
            base.
        args: Options.
        weights: One number per expert; equal by default. Negative ones are for methods that subtract.
        base_model: Folder or Hub id of the base model; needed for deltas and adapters.
        download: Download models from the Hub, unless `args.stream_from_hub`. Not needed to only show a plan.
        check: Called with the plan before anything is downloaded; may raise.

    Raises:
        ArgumentError: If options contradict each other or the models.
        CheckpointError: If a model is missing, broken, or does not fit the others.
    """
    if len(experts) < 1:
        raise ArgumentError("A merge needs at least two experts, got 0. Name two or more models.")
    alphas = validate_weights(weights, len(experts), args.method)
    args = replace(args, take=with_numbers(args.take, experts, base_model is not None))
    sources = resolve_all([*experts, *([base_model] if base_model else [])], token=args.hub_token, download=False)
    plan = _plan(sources, args, alphas, base_model is not None)
    try:
        if check is not None:
            check(plan)
        missing = [source for source in sources if download and is_downloaded(source, args)]
        fetched = dict(zip(missing, fetch_all(missing, token=args.hub_token)))
    except BaseException:
        plan.close()
        raise
    if not fetched:
        return plan
    plan.close()
    # Keep these notes: they are about all files of the repositories, and the download left some of these out.
    notes = plan.notes
    plan = _plan([fetched.get(source, source) for source in sources], args, alphas, base_model is not None)
    plan.notes = notes
    return plan


def is_downloaded(source: Source, args: MergingArguments) -> bool:
    """Whether a source is downloaded before the merge. Adapters always are: they are small and read whole."""
    return is_on_hub(source) and (source.kind == "adapter" or not args.stream_from_hub)


def _plan(sources: Sequence[Source], args: MergingArguments, alphas: list[float], with_base: bool) -> MergePlan:
    rules = TensorRules.parse(args.leave_out, args.take)
    opened = [_open(source, rules) for source in sources]
    quantised_notes = [note for each in opened if each.checkpoint for note in dequantise(each.checkpoint)]
    check_rules_match(rules, opened)
    base = opened.pop() if with_base else None
    _refuse_alone(opened, base, args)
    args = with_model_numbers(args, [expert.source for expert in opened], base.source if base else None)
    method = METHODS[args.method]
    if method.n_experts is not None and len(opened) != method.n_experts:
        raise ArgumentError(
            f"{method.name} joins exactly {method.n_experts} experts, got {len(opened)}. Use "
            f"method={method.extension!r}, its extension."
        )
    table = read_coefficients(args.coefficients) if args.coefficients is not None else None
    to_adapter = _makes_adapter(args, opened)
    space = _space(args, opened, base, to_adapter, table)
    if base is not None and base.checkpoint is not None and not to_adapter:
        # Checked before adapters are matched: the message is clearer than that their weights are not in the base.
        refuse_quantised(base.checkpoint)
    choice = choose_tokens(args, opened, base)
    opened = _match_adapters(opened, base, to_adapter, rules)
    token_rows: TokenRows | None = None
    if to_adapter:
        steps, notes = _adapter_steps(args, [e.adapter for e in opened if e.adapter], alphas, base)
        config_changes: dict[str, Any] = {}
        left_out = reasons_of(rules, opened, ())
    else:
        head = find_new_head(opened, base.checkpoint if base else None)
        steps, notes, left_out, config_changes, token_rows = _steps(args, opened, base, alphas, head, rules, choice)
    notes += quantised_notes + _unused_options(args, method) + _number_notes(steps, method)
    if table is not None:
        steps = cut_as_given(steps, table, len(opened))
    layout = None
    if not to_adapter:
        layout = ShardLayout.plan([(step.name, step.dtype, step.shape) for step in steps], args.max_shard_bytes)
    vocabulary = None
    if choice is not None and token_rows is not None:
        refuse_comparison(args)
        vocabulary = record_vocabulary(choice, token_rows, full_models(opened, base), args)
        notes += vocabulary_notes(vocabulary, choice)
    beside = look_beside(
        [expert.source for expert in opened],
        base.source if base else None,
        makes_adapter=to_adapter,
        choice=choice,
        n_rows=token_rows.n_rows if token_rows is not None else None,
    )
    notes += beside.notes
    config = {**config_changes, **beside.config}
    plan = MergePlan(args, opened, base, alphas, space, steps, layout, notes, beside.files, table, config, left_out)
    plan.vocabulary, plan.generated, plan.read_beside = vocabulary, beside.generated, beside.read
    _refuse_large_matrices(plan)
    account(plan)  # refuses what would be lost
    for model in plan.models:
        model.weights.watch([file.name for file in (*beside.files, *beside.read) if file.source == model.source])
    return plan


def _refuse_alone(experts: list[Expert], base: Expert | None, args: MergingArguments) -> None:
    """Raise if there is one expert and nothing to do with it: an adapter can be folded in, or written anew."""
    only = experts[0]
    if len(experts) > 1 or (only.adapter and (base is not None or args.adapter_output == "adapter")):
        return
    if only.checkpoint:
        raise ArgumentError(
            f"A merge needs at least two experts, got 1: {only.spec!r}, a full model, of which a merge would be a "
            "copy. Name two or more models."
        )
    raise ArgumentError(
        f"A merge needs at least two experts, got 1: {only.spec!r}. Name two or more, or pass base_model "
        "(--base-model), the model that this adapter is to be folded into."
    )


def _unused_options(args: MergingArguments, method: Method) -> list[str]:
    """Note options that were changed from their defaults but that this method does not use; calibration has a seed."""
    of_methods = dict.fromkeys(name for other in METHODS.values() for name in other.options if name != "seed")
    options = args.to_dict()
    defaults = {field.name: field.default for field in fields(args)}
    used = (*method.options, *(("svc_floor",) if args.post_step is not None else ()))
    changed = [name for name in (*of_methods, "svc_floor") if name not in used and options[name] != defaults[name]]
    return [f"`{name}` changes nothing with method={method.name!r}." for name in changed]


def _number_notes(steps: list[TensorStep], method: Method) -> list[str]:
    """Note tensors whose blocks are single numbers: a method that merges directions takes their plain mean."""
    numbers = [step.name for step in steps if step.action == "merge" and step.block_len == 1]
    if not numbers or not method.is_directional:
        return []
    return [f"A single number has no direction: of {some(numbers)} the plain weighted mean is taken."]


def _open(source: Source, rules: TensorRules) -> Expert:
    if source.kind == "adapter":
        from hf_frmerge.checkpoints.adapters.adapter import open_adapter

        return Expert(source, adapter=without_ruled(open_adapter(source), rules))
    return Expert(source, checkpoint=open_checkpoint(source))


def _makes_adapter(args: MergingArguments, experts: list[Expert]) -> bool:
    """Whether the output is an adapter; that takes adapters only, merged in delta space."""
    full = [expert.spec for expert in experts if expert.checkpoint]
    if args.adapter_output == "adapter":
        if not _is_sum(args):
            raise ArgumentError(
                f"{args.post_step or args.method} takes single deltas apart, so what it makes is no sum of them and "
                "no adapter can express it. Use adapter_output='merged'."
            )
        if full:
            raise ArgumentError(f"adapter_output='adapter' needs adapters only, but {full[0]!r} is a full checkpoint.")
        if args.take:
            raise ArgumentError(
                "`take` copies tensors of full models, which no adapter can hold. Give the expert all of the weight "
                "of these tensors with weight_rules ('REGEX=0,1'), or use adapter_output='merged'."
            )
        if args.space == "weights":
            raise ArgumentError(
                "A mean in weight space rescales the base model itself, which no adapter can express. Use "
                "space='deltas', or adapter_output='merged'."
            )
        return True
    # Full tensors (`modules_to_save`) and DoRA modules have no low-rank factors; and a pair of factors can only be
    # scaled as a whole, not by rows or heads.
    kept_dense = any(e.adapter.dense or e.adapter.uses_dora for e in experts if e.adapter)
    # What else could be done with a single adapter but to fold it into its base?
    factored = args.space != "weights" and args.block in ("tensor", "layer", "model") and len(experts) > 1
    factored = factored and not kept_dense
    return args.adapter_output == "auto" and not full and factored and not args.take and _is_sum(args)


def _is_sum(args: MergingArguments) -> bool:
    return METHODS[args.method].kind in ("span", "given") and args.post_step is None


def _match_adapters(experts: list[Expert], base: Expert | None, to_adapter: bool, rules: TensorRules) -> list[Expert]:
    """Match the modules of adapters with the tensors of the base."""
    if base is None or base.checkpoint is None:
        return experts
    checkpoint = base.checkpoint
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    # Once for all adapters, and only if one asks.
    structure = functools.cache(lambda: read_structure(checkpoint))
    names = functools.cache(lambda: read_names(checkpoint.config(), checkpoint.source.spec))

    def match(expert: Expert) -> Expert:
        if expert.adapter is None:
            return expert
        adapter = expert.adapter.match(shapes, structure, names, into_adapter=to_adapter)
        adapter.check_base_layers(checkpoint)
        return Expert(expert.source, adapter=without_ruled(adapter, rules))  # by the base's names, too

    return [match(expert) for expert in experts]


def _space(
    args: MergingArguments,
    experts: list[Expert],
    base: Expert | None,
    to_adapter: bool,
    table: CoefficientTable | None,
) -> str:
    """Choose the space: the option, else that of a table, else deltas for adapters and for methods that need them."""
    adapters = [expert for expert in experts if expert.adapter]
    if base is not None and base.checkpoint is None:
        raise ArgumentError(f"The base model {base.spec!r} is an adapter; a full checkpoint is needed.")
    if adapters and base is None and not to_adapter:
        raise ArgumentError(
            f"{adapters[0].spec!r} is an adapter: pass the model it was trained from as base_model "
            f"(its config names {adapters[0].adapter.config.base_model!r})."  # type: ignore[union-attr]
        )
    of_deltas = [name for name in ("post_step", "layer_scales") if args.to_dict()[name] is not None]
    needs_deltas = METHODS[args.method].needs_deltas or bool(of_deltas)
    table_space = table.space if table is not None else None
    space = args.space or table_space or ("deltas" if adapters or needs_deltas else "weights")
    if needs_deltas and space != "deltas":
        name = f"{args.method} is" if not of_deltas else f"What {of_deltas[0]} changes is"
        raise ArgumentError(f'{name} made of deltas: it needs space="deltas" and a base_model.')
    if table_space is not None and space != table_space:
        raise ArgumentError(
            f"{args.coefficients} holds coefficients of {table_space}, but space={space!r} was asked for."
        )
    if space == "weights" and args.scale != 1.0 and "scale" in METHODS[args.method].options:
        raise ArgumentError(
            f"scale={args.scale:g} is a factor of what the experts learned, their deltas, but here whole weights are "
            "merged. Add space='deltas' (--space deltas) and a base_model, or leave scale out."
        )
    if space == "deltas" and base is None and not to_adapter:
        raise ArgumentError('space="deltas" needs base_model: deltas are the differences to it.')
    return space


def _adapter_steps(
    args: MergingArguments, adapters: list[Adapter], weights: list[float], base: Expert | None
) -> tuple[list[TensorStep], list[str]]:
    """Return one step for each module, with the shape of its delta, and notes."""
    from hf_frmerge.checkpoints.adapters.rows import align_adapters, missing_notes

    _check_expressible(args, adapters)
    common_base(adapters, base.source if base else None)
    rows = align_adapters(adapters)
    if not rows:
        raise ArgumentError("`leave_out` leaves no module to merge. Give expressions of fewer.")
    names = [row.first.target for row in rows]
    weights_for, notes = weights_by_tensor(args, weights, names)
    scale_of = scales_by_tensor(args, names)
    dtype = DTYPE_CODES.get(args.dtype, rows[0].first.up.dtype if rows else "F32")
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
            scale=scale_of[row.first.target],
        )
        for row in rows
    ]
    _check_groups(steps)
    notes += missing_notes(adapters, rows, args.strict, is_matched=base is not None)
    return steps, notes + (base_notes(adapters, base.source) if base else [])


def _check_expressible(args: MergingArguments, adapters: list[Adapter]) -> None:
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


def _adapter_notes(experts: list[Expert], base: Expert | None, strict: bool) -> list[str]:
    """Note modules that some adapters lack, and other bases they name, if adapters are merged into a full model."""
    adapters = [expert.adapter for expert in experts if expert.adapter]
    if not adapters or base is None:
        return []
    from hf_frmerge.checkpoints.adapters.rows import align_adapters, missing_notes

    notes = missing_notes(adapters, align_adapters(adapters), strict, is_matched=True)
    return notes + base_notes(adapters, base.source)


def _steps(
    args: MergingArguments,
    experts: list[Expert],
    base: Expert | None,
    weights: list[float],
    head: NewHead,
    rules: TensorRules,
    choice: TokenChoice | None,
) -> tuple[list[TensorStep], list[str], dict[str, str], dict[str, Any], TokenRows | None]:
    """Return steps for the tensors of a full model, notes, why others are left out, config changes, mapped rows."""
    full = [index for index, expert in enumerate(experts) if expert.checkpoint]
    checkpoints = [experts[index].checkpoint for index in full]
    tokens = token_table(choice, full_models(experts, base), args)
    aligned = align([c for c in checkpoints if c], base.checkpoint if base else None, rules.decides, tokens)
    notes = [*aligned.notes, *head.notes, *_adapter_notes(experts, base, args.strict)]
    tensors = [
        replace(tensor, donor=-1 if tensor.donor < 0 else full[tensor.donor])
        for tensor in aligned.tensors
        if tensor.name not in head.left_out
    ]
    tensors += [AlignedTensor(name, info.dtype, info.shape, "merge", -1) for name, info in head.tensors.items()]
    models = dict(enumerate(experts)) | ({-1: base} if base else {})
    taken = taken_tensors(rules, models)
    refuse_taken_rows(taken, aligned.token_rows)
    tensors += taken
    donor = base or experts[full[0]]
    reasons = reasons_of(rules, [*experts, *([base] if base else [])], {tensor.name for tensor in taken})
    lacking = [name for name in donor.weights.tensors if name in reasons]
    notes += [left_out_note(lacking)] if lacking else []
    config_changes = head.config | config_for_taken(donor, taken, models)
    if donor.weights.quantisation:
        config_changes |= dict.fromkeys(SECTIONS)
    touched = {name for e in experts if e.adapter for name in (*e.adapter.deltas, *e.adapter.dense)}
    weights_for, rule_notes = weights_by_tensor(args, weights, [tensor.name for tensor in tensors])
    notes += rule_notes
    head_dim = None
    if args.block == "head":
        head_dim = head_dim_of(donor.checkpoint.config() if donor.checkpoint else {})

    by_matrix = METHODS[args.method].kind == "spectral" or args.post_step is not None
    scale_of = scales_by_tensor(args, [tensor.name for tensor in tensors])
    steps = []
    for tensor in tensors:
        is_float = tensor.dtype in FLOAT_DTYPES
        # With adapters only, a tensor that none of them changes is copied from the base.
        merge = tensor.action == "merge" and (bool(full) or tensor.name in touched)
        n_blocks, block_len = block_shape(tensor.name, tensor.shape, args.block if merge else "tensor", head_dim)
        steps.append(
            TensorStep(
                name=tensor.name,
                dtype=DTYPE_CODES.get(args.dtype, tensor.dtype) if is_float else tensor.dtype,
                shape=tensor.shape,
                action="merge" if merge else "copy",
                donor=tensor.donor,
                weights=weights_for[tensor.name] if merge else (),
                group=group_of(tensor.name, args.block),
                n_blocks=n_blocks,
                block_len=block_len,
                is_matrix=merge and by_matrix and _is_inner_matrix(tensor.name, tensor.shape),
                scale=scale_of[tensor.name] if merge else 1.0,
            )
        )
    if by_matrix:
        notes.append(_matrix_note(args, steps))
    _check_groups(steps)
    _refuse_homeless(experts, {step.name for step in steps if step.action == "merge"})
    left_out = aligned.left_out | dict.fromkeys(head.left_out, OTHER_HEAD) | reasons
    return steps, notes, left_out, config_changes, aligned.token_rows


def _is_inner_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is the matrix of a layer: not a vector, a stack of matrices, an embedding or a head."""
    return len(shape) == 2 and min(shape) > 1 and not may_be_tied(name)


def _matrix_note(args: MergingArguments, steps: list[TensorStep]) -> str:
    others = [step.name for step in steps if step.action == "merge" and not step.is_matrix]
    n_matrices = sum(step.is_matrix for step in steps)
    if METHODS[args.method].kind != "spectral":
        return (
            f"post_step={args.post_step!r} corrects {n_matrices} matrices of layers. The other {len(others)} tensors "
            f"({some(others)}) stay as method={args.method!r} merges them."
        )
    return (
        f"method={args.method!r} merges {n_matrices} matrices of layers. The experts' deltas of the other "
        f"{len(others)} tensors ({some(others)}) are {'added' if METHODS[args.method].is_continual else 'averaged'}: "
        "embeddings, heads, norms, vectors and stacks of matrices."
    )


def _refuse_large_matrices(plan: MergePlan) -> None:
    """Raise if a matrix that is merged as one does not fit into the memory budget."""
    largest = max(plan.steps, key=plan.matrix_memory, default=None)
    needed = plan.matrix_memory(largest) if largest is not None else 0
    if largest is not None and needed > plan.args.memory_budget_bytes:
        args = plan.args
        what = f"post_step={args.post_step!r}" if args.post_step is not None else f"method={args.method!r}"
        raise ArgumentError(
            f"{what} merges {largest.name!r}, {list(largest.shape)}, as one matrix, which takes "
            f"{-(-needed // 2**20)} MiB for {len(plan.experts)} experts; memory_budget is {plan.args.memory_budget}. "
            f"Set memory_budget={-(-needed // 2**20)}MiB or more: that much for every thread that is to work on one."
        )


def _refuse_homeless(experts: list[Expert], merged: set[str]) -> None:
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


def _check_groups(steps: list[TensorStep]) -> None:
    """Require equal weights within a group."""
    first: dict[str, TensorStep] = {}
    for step in steps:
        other = first.setdefault(step.group, step) if step.action == "merge" else step
        if other.weights != step.weights:
            raise ArgumentError(
                f"weight_rules give {other.name!r} and {step.name!r} different weights, but both lie on one sphere "
                f"(group {step.group or 'model'!r}). Use block='tensor', or rules that do not divide a group."
            )
