"""Choose what a merge makes and where: an adapter or a full model, of whole weights or of deltas."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_frmerge.errors import ArgumentError
from hf_frmerge.methods.table import METHODS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hf_frmerge.merging.arguments.merging_arguments import MergingArguments
    from hf_frmerge.merging.planning.coefficient_table import CoefficientTable
    from hf_frmerge.merging.planning.plan import Expert


def makes_adapter(args: MergingArguments, experts: Sequence[Expert]) -> bool:
    """Whether the output is an adapter; that takes adapters only, merged in delta space."""
    full = [expert for expert in experts if expert.checkpoint]
    if args.adapter_output == "adapter":
        if not _is_low_rank(args):
            raise ArgumentError(
                f"{args.post_step or args.method} takes single deltas apart, so what it makes has no low rank and no "
                "adapter can express it. Use adapter_output='merged'."
            )
        if full:
            is_adapter = full[0].source.kind == "adapter"
            what = "a full checkpoint"
            if is_adapter:
                what = (
                    "more than low-rank factors of single matrices: of another kind than LoRA, or with biases, single "
                    "tokens, or experts of a mixture in one stack. Use adapter_output='merged'"
                )
            raise ArgumentError(f"adapter_output='adapter' needs adapters only, but {full[0].spec!r} is {what}.")
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
    return args.adapter_output == "auto" and not full and factored and not args.take and _is_low_rank(args)


def choose_space(
    args: MergingArguments,
    experts: Sequence[Expert],
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
    of_base = any(expert.source.kind == "adapter" for expert in experts)
    table_space = table.space if table is not None else None
    space = args.space or table_space or ("deltas" if of_base or needs_deltas else "weights")
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


def _is_low_rank(args: MergingArguments) -> bool:
    """Whether the rank of a merge of adapters is no more than the sum of theirs."""
    method = METHODS[args.method]
    is_sum = method.kind in ("span", "given") or method.fits_adapter
    return (is_sum or method.cores is not None) and args.post_step is None
