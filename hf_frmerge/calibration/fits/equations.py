"""Choose what fits the blocks of a merge: the fit to the experts, or the equations of a method that needs prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from hf_frmerge.calibration.fits.block_fit import BlockFit, SweepOptions
from hf_frmerge.calibration.fits.fisher_fit import FisherFit
from hf_frmerge.calibration.fits.regmean import RegMeanFit, RegMeanOptions
from hf_frmerge.checkpoints.tensors.reader import some
from hf_frmerge.errors import ArgumentError
from hf_frmerge.fisher.average import FLOOR
from hf_frmerge.fisher.files import estimate_fisher
from hf_frmerge.methods.table import METHODS

if TYPE_CHECKING:
    from hf_frmerge.calibration.blockwise_model import BlockwiseModel
    from hf_frmerge.calibration.prompts import Prompts
    from hf_frmerge.calibration.sweep import LayerFit
    from hf_frmerge.merging.planning.plan import MergePlan


def check_form(plan: MergePlan) -> None:
    """Raise `ArgumentError` if what the method gives cannot be written in the form that is asked for."""
    if plan.args.method == "fisher" and plan.args.calibration_form == "low_rank":
        raise ArgumentError(
            "method='fisher' averages element by element, and what that gives has no low rank. Leave out "
            "calibration_form='low_rank'."
        )


def check_experts(plan: MergePlan, prompts: Sequence[Prompts]) -> None:
    """Raise `ArgumentError` if the method needs prompts of every expert, and one has none; or if they all weigh 0."""
    known = {own.expert for own in prompts}
    without = [expert.spec for place, expert in enumerate(plan.experts) if place not in known]
    if METHODS[plan.args.method].needs_prompts and without:
        raise ArgumentError(
            f"method={plan.args.method!r} needs prompts of every expert, and {some(without)} has none. Pass some for "
            "it too, or one file for all experts."
        )
    if not any(plan.weights[expert] for expert in known):
        named = some([plan.experts[expert].spec for expert in sorted(known)])
        raise ArgumentError(
            f"There are prompts of {named} alone, of weight 0, so there is nothing to fit the merge to. Give weight "
            "to an expert that has prompts, or pass prompts of one that has weight."
        )


def settings_of(plan: MergePlan, options: SweepOptions) -> dict[str, Any]:
    """Return the settings for the record; those of a method have its name among them."""
    method = plan.args.method
    if not METHODS[method].needs_prompts:
        return asdict(options)
    own = {"floor": FLOOR} if method == "fisher" else asdict(_regmean_options(plan))
    return {"method": method, **own, "rank": options.rank}


def equations_of(
    plan: MergePlan, model: BlockwiseModel, prompts: Sequence[Prompts], *, is_silent: bool | None
) -> Callable[..., LayerFit]:
    """
    Return what fits a block, as `Sweep` takes it; Fisher information is estimated for it.

    Args:
        plan: Plan of the merge.
        model: Modules of its models.
        prompts: Prompts of every expert that take part in the fit.
        is_silent: Whether no progress is shown; `None` shows it on a terminal.

    Raises:
        ArgumentError, NonFiniteError: If an expert's Fisher information cannot be estimated.
    """
    if not METHODS[plan.args.method].needs_prompts:
        return BlockFit
    if plan.args.method != "fisher":
        return partial(RegMeanFit, options=_regmean_options(plan))
    parameters = [f"{block}.{name}" for block in model.blocks for name in model.block_parameters(block)]
    base = plan.base.source if plan.base is not None else None
    files = [
        estimate_fisher(
            plan.experts[own.expert].source,
            base,
            own.token_ids,
            parameters,
            seed=plan.args.seed,
            device=plan.args.device,
            is_silent=is_silent,
        )
        for own in prompts
    ]
    return partial(FisherFit, files=files)


def _regmean_options(plan: MergePlan) -> RegMeanOptions:
    return RegMeanOptions(plan.args.off_diagonal, from_merge=plan.args.method == "regmean++")
