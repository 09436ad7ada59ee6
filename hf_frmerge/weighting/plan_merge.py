"""Plan a merge whose weights may be a name, which is turned into numbers here."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from hf_frmerge.errors import ArgumentError
from hf_frmerge.merging.arguments.named_weights import CONTINUAL, NAN, parse_name
from hf_frmerge.merging.planning.build_plan import build_plan
from hf_frmerge.methods.table import CHOICES

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from hf_frmerge.merging.arguments.merging_arguments import MergingArguments
    from hf_frmerge.merging.arguments.named_weights import NamedWeights
    from hf_frmerge.merging.planning.plan import MergePlan


def plan_merge(
    experts: Sequence[str],
    args: MergingArguments,
    weights: Sequence[float] | str | None = None,
    base_model: str | None = None,
    *,
    download: bool = True,
    check: Callable[[MergePlan], None] | None = None,
    has_prompts: bool = False,
) -> MergePlan:
    """
    Plan a merge as `build_plan` does, with `weights` numbers or a name. A note of the plan says which these are.

    `nan` reads the experts once, after they were downloaded; without `download` the plan has equal weights instead.

    Raises:
        ArgumentError: If the name is unknown, or the experts do not fit it; and as `build_plan`.
        CheckpointError: As `build_plan`.
    """
    named = parse_name(weights) if isinstance(weights, str) else None
    build = partial(build_plan, base_model=base_model, check=check, has_prompts=has_prompts)
    if CHOICES[args.method].is_continual or (named is not None and named.name == CONTINUAL):
        return _plan_next(build, experts, args, weights, download=download)
    if named is None:
        return build(experts, args, weights, download=download)  # type: ignore[arg-type]
    measured = named.name == NAN
    numbers = None if measured else _weights_from(_shares_of_run(named, experts), args)
    plan = build(experts, args, numbers, download=download)
    if measured and not download:
        plan.notes.append(f"Weights by {weights!r} are measured when the merge begins; here they are equal.")
        return plan
    if measured:
        # Both are imported on use, for the sake of merges that need neither: they bring along threads and BLAS.
        from hf_frmerge.weighting.norm_aware import delta_norms, norm_aware_weights

        with closing(plan):
            norms, notes = delta_norms(plan), plan.notes
        plan = build(experts, args, _weights_from(norm_aware_weights(norms), args))
        plan.notes = notes  # complete only the first time, before what a download leaves out
    plan.notes.append(f"Weights by {weights!r}: {_listed(plan)}.")
    return plan


def _plan_next(
    build: Callable[..., MergePlan],
    experts: Sequence[str],
    args: MergingArguments,
    weights: Sequence[float] | str | None,
    *,
    download: bool,
) -> MergePlan:
    """Plan a merge of a merge with new experts."""
    from hf_frmerge.weighting.continual import continual_weights, opcm_numbers, read_before

    is_measured = CHOICES[args.method].is_continual
    if is_measured and (args.scale != 1.0 or weights not in (None, CONTINUAL)):
        raise ArgumentError(
            f"method={args.method!r} finds weights and scale itself, from the record of the first expert. Leave both "
            "out."
        )
    before = read_before(experts[0], args.hub_token)
    args = replace(args, merged_before=before.n_experts)
    numbers = _weights_from(continual_weights(before, len(experts)), args)
    plan = build(experts, args, numbers, download=download)
    if is_measured and download:
        with closing(plan):
            (numbers, scale), notes = opcm_numbers(plan, before), plan.notes
        plan = build(experts, replace(args, scale=scale), numbers)
        plan.notes = notes
    is_merge = f"is a merge of {before.n_experts} experts" if before.method is not None else "is no merge"
    plan.notes.append(f"{experts[0]!r} {is_merge}; the weights are {_listed(plan)}.")
    return plan


def _weights_from(shares: Sequence[float], args: MergingArguments) -> list[float]:
    """Return weights for a method from shares: methods that add count an expert once if all are alike."""
    return [share * len(shares) for share in shares] if CHOICES[args.method].adds else list(shares)


def _shares_of_run(named: NamedWeights, experts: Sequence[str]) -> list[float]:
    from hf_frmerge.weighting.checkpoint_soup import soup_weights  # most merges have no weights by name

    return soup_weights(named, experts)


def _listed(plan: MergePlan) -> str:
    return ", ".join(f"{expert.spec} {weight:.4g}" for expert, weight in zip(plan.experts, plan.weights))
