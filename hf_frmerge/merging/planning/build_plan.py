"""Build the plan of a merge from headers alone, and refuse what cannot be merged before any weight is read."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import TYPE_CHECKING

from hf_frmerge.checkpoints.beside.look_beside import look_beside
from hf_frmerge.checkpoints.resolve import fetch_all, resolve_all
from hf_frmerge.checkpoints.source import is_on_hub
from hf_frmerge.checkpoints.tensors.layout import ShardLayout
from hf_frmerge.checkpoints.tensors.quantised import refuse_quantised
from hf_frmerge.checkpoints.tensors.reader import some
from hf_frmerge.errors import ArgumentError
from hf_frmerge.merging.arguments.tensor_rules import TensorRules, with_numbers
from hf_frmerge.merging.arguments.values import validate_weights
from hf_frmerge.merging.planning.account import account
from hf_frmerge.merging.planning.choose_method import BY_MATRICES, choose_method
from hf_frmerge.merging.planning.coefficient_table import cut_as_given, read_coefficients
from hf_frmerge.merging.planning.open_models import match_adapters, open_models
from hf_frmerge.merging.planning.output_form import choose_space, makes_adapter
from hf_frmerge.merging.planning.plan import Expert, MergePlan
from hf_frmerge.merging.planning.steps.adapter import adapter_steps
from hf_frmerge.merging.planning.steps.full_model import full_model_steps
from hf_frmerge.merging.planning.steps.matrices import refuse_without_factors
from hf_frmerge.merging.planning.steps.set_apart import check_rules_match
from hf_frmerge.merging.planning.unused_options import unused_options
from hf_frmerge.merging.planning.vocabulary.choose_tokens import (
    choose_tokens,
    full_models,
    record_vocabulary,
    refuse_comparison,
    vocabulary_notes,
    with_model_numbers,
)
from hf_frmerge.methods.entries.auto import AUTO
from hf_frmerge.methods.table import METHODS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from hf_frmerge.checkpoints.resolve import Source
    from hf_frmerge.merging.arguments.merging_arguments import MergingArguments
    from hf_frmerge.merging.planning.tensor_step import TensorStep


def build_plan(
    experts: Sequence[str],
    args: MergingArguments,
    weights: Sequence[float] | None = None,
    base_model: str | None = None,
    *,
    download: bool = True,
    check: Callable[[MergePlan], None] | None = None,
    has_prompts: bool = False,
) -> MergePlan:
    """
    Resolve, open and align the models, and decide what happens to every tensor. Reads headers only.

    Models on the Hub that are not in the cache are planned from their headers on the Hub first, and then downloaded,
    so that models which do not fit together are refused before the download.

    Args:
        experts: Two or more folders or Hub ids, full checkpoints or adapters; or one adapter, to be folded into its
            base.
        args: Options.
        weights: One number per expert; equal by default. See `validate_weights`.
        base_model: Folder or Hub id of the base model; needed for deltas and adapters.
        download: Download models from the Hub, unless `args.stream_from_hub`. Not needed to only show a plan.
        check: Called with the plan before anything is downloaded; may raise.
        has_prompts: Whether there are prompts of the experts: to choose the method by if it is left to choose, and
            without which options of a fit change nothing.

    Raises:
        ArgumentError: If options contradict each other or the models.
        CheckpointError: If a model is missing, broken, or does not fit the others.
    """
    if len(experts) < 1:
        raise ArgumentError("A merge needs at least two experts, got 0. Name two or more models.")
    alphas = validate_weights(weights, len(experts), args.method)
    args = replace(args, take=with_numbers(args.take, experts, base_model is not None))
    look_up = functools.partial(resolve_all, token=args.hub_token, download=False, allow_pickle=args.allow_pickle)
    sources = look_up(experts, pairs=True) + look_up([base_model] if base_model else [])
    plan_by = functools.partial(_plan, weights=alphas, with_base=base_model is not None, has_prompts=has_prompts)
    is_chosen = args.method == AUTO.name
    if is_chosen:
        choose = functools.partial(
            choose_method, args, sources[: len(experts)], has_base=base_model is not None, has_prompts=has_prompts
        )
        plan, why = _plan_by_choice(choose, functools.partial(plan_by, sources))
        plan.notes.append(why)
    else:
        plan = plan_by(sources, args)
    if too_large := _too_large(plan):
        plan.close()
        what = f"post_step={args.post_step!r}" if args.post_step is not None else f"method={args.method!r}"
        raise ArgumentError(f"{what} {too_large}")
    plan.chooses_method = is_chosen
    try:
        if check is not None:
            check(plan)
        missing = [part for source in sources for part in source.parts if download and is_downloaded(part, args)]
        fetched = dict(zip(missing, fetch_all(missing, token=args.hub_token)))
    except BaseException:
        plan.close()
        raise
    if not fetched:
        return plan
    plan.close()
    # Keep these notes: they are about all files of the repositories, and the download left some of these out.
    notes = plan.notes
    plan = plan_by([_fetched(source, fetched) for source in sources], plan.args)
    plan.notes, plan.chooses_method = notes, is_chosen
    return plan


def _plan_by_choice(
    choose: Callable[..., tuple[MergingArguments, str]], plan_by: Callable[[MergingArguments], MergePlan]
) -> tuple[MergePlan, str]:
    """Plan by the method that is chosen, or by another one if its matrices are too large; and say which it is."""
    args, why = choose()
    plan = plan_by(args)
    if args.method != BY_MATRICES.method or not (too_large := _too_large(plan)):
        return plan, why
    plan.close()
    args, why = choose(too_large=too_large)
    return plan_by(args), why


def _fetched(source: Source, fetched: Mapping[Source, Source]) -> Source:
    model, *adapter = [fetched.get(part, part) for part in source.parts]
    return replace(model, adapter=adapter[0]) if adapter else model


def is_downloaded(source: Source, args: MergingArguments) -> bool:
    """Whether a source is downloaded before the merge. Adapters always are: they are small and read whole."""
    return is_on_hub(source) and (source.kind == "adapter" or not args.stream_from_hub)


def _plan(
    sources: Sequence[Source], args: MergingArguments, weights: list[float], *, with_base: bool, has_prompts: bool
) -> MergePlan:
    rules = TensorRules.parse(args.leave_out, args.take)
    experts, notes_of_inputs = open_models(sources, rules, with_base)
    check_rules_match(rules, experts)
    base = experts.pop() if with_base else None
    _refuse_number(experts, base, args)
    _refuse_measured_pairs(experts, args)
    args = with_model_numbers(args, [expert.source for expert in experts], base.source if base else None)
    table = read_coefficients(args.coefficients) if args.coefficients is not None else None
    to_adapter = makes_adapter(args, experts)
    space = choose_space(args, experts, base, to_adapter, table)
    if base is not None and base.checkpoint is not None and not to_adapter:
        # Checked before adapters are matched: the message is clearer than that their weights are not in the base.
        refuse_quantised(base.checkpoint)
    choice = choose_tokens(args, experts, base)
    experts = match_adapters(experts, base, to_adapter, rules)
    if to_adapter:
        planned = adapter_steps(args, experts, base, weights, rules)
    else:
        planned = full_model_steps(args, experts, base, weights, rules, choice)
    refuse_without_factors(args, experts, planned.steps)
    notes = [*planned.notes, *notes_of_inputs, *_method_notes(planned.steps, args)]
    notes += unused_options(args, has_prompts=has_prompts, makes_adapter=to_adapter)
    steps = cut_as_given(planned.steps, table, len(experts)) if table is not None else planned.steps
    layout = None
    if not to_adapter:
        layout = ShardLayout.plan([(step.name, step.dtype, step.shape) for step in steps], args.max_shard_bytes)
    vocabulary, rows = None, planned.token_rows
    if choice is not None and rows is not None:
        refuse_comparison(args)
        vocabulary = record_vocabulary(choice, rows, full_models(experts, base), args)
        notes += vocabulary_notes(vocabulary, choice)
    beside = look_beside(
        [part for expert in experts for part in expert.source.parts],
        base.source if base else None,
        makes_adapter=to_adapter,
        choice=choice,
        n_rows=rows.n_rows if rows is not None else None,
    )
    plan = MergePlan(
        args, experts, base, weights, space, steps, layout,
        notes=[*notes, *beside.notes],
        carried=beside.files,
        coefficients=table,
        config_changes={**planned.config_changes, **beside.config},
        left_out=planned.left_out,
        vocabulary=vocabulary,
        generated=beside.generated,
        read_beside=beside.read,
    )  # fmt: skip
    account(plan)  # refuses what would be lost
    for model in plan.models:
        for source, checkpoint in model.recorded:
            checkpoint.watch([file.name for file in (*beside.files, *beside.read) if file.source == source])
    return plan


def _refuse_number(experts: list[Expert], base: Expert | None, args: MergingArguments) -> None:
    """Raise if there is one expert and nothing to do with it, or if the method joins another number of experts."""
    method, only = METHODS[args.method], experts[0]
    # One adapter can be folded into its base, or written anew.
    is_adapter = only.source.kind == "adapter" and (base is not None or args.adapter_output == "adapter")
    if len(experts) == 1 and not (is_adapter or only.source.adapter is not None):
        expected = f"A merge needs at least two experts, got 1: {only.spec!r}"
        if only.checkpoint:
            raise ArgumentError(
                f"{expected}, a full model, of which a merge would be a copy. Name two or more models."
            )
        raise ArgumentError(
            f"{expected}. Name two or more, or pass base_model (--base-model), the model that this adapter is to be "
            "folded into."
        )
    if method.n_experts is not None and len(experts) != method.n_experts:
        raise ArgumentError(
            f"{method.name} joins exactly {method.n_experts} experts, got {len(experts)}. Use "
            f"method={method.extension!r}, its extension."
        )


def _refuse_measured_pairs(experts: list[Expert], args: MergingArguments) -> None:
    """Raise if a model with an adapter on it is to be run: what loads models takes one folder each."""
    pairs = [expert.spec for expert in experts if expert.source.adapter is not None]
    if pairs and args.evaluate_experts and (args.do_eval or args.eval_on_start):
        raise ArgumentError(
            f"`evaluate_experts` runs the experts, and {some(pairs)} is two: a model and an adapter. Set "
            "evaluate_experts=False, or fold the adapter in first (`frmerge merge ADAPTER --base-model BASE "
            "--output-dir folded`), and pass 'folded'."
        )


def _method_notes(steps: list[TensorStep], args: MergingArguments) -> list[str]:
    """Note tensors for which the method does something else than it usually does."""
    notes, method = [], METHODS[args.method]
    numbers = [step.name for step in steps if step.action == "merge" and step.block_len == 1]
    if numbers and method.is_directional:
        notes.append(f"A single number has no direction: of {some(numbers)} the plain weighted mean is taken.")
    return notes


def _too_large(plan: MergePlan) -> str | None:
    """Say which matrix that is merged as one does not fit into the memory budget; None if all do."""
    largest = max(plan.steps, key=plan.matrix_memory, default=None)
    needed = plan.matrix_memory(largest) if largest is not None else 0
    if largest is None or needed <= plan.args.memory_budget_bytes:
        return None
    mib = f"{-(-needed // 2**20)}MiB"
    return (
        f"merges {largest.name!r}, {list(largest.shape)}, as one matrix, which takes {mib} for {len(plan.experts)} "
        f"experts; memory_budget is {plan.args.memory_budget}. Set memory_budget={mib} or more: that much for every "
        "thread that is to work on one."
    )
