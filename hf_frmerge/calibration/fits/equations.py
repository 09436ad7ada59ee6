"""Choose what fits the blocks of a merge: the fit to the experts, or the equations of a method that needs prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from hf_frmerge.calibration.baselines.fisher_fit import FisherFit
from hf_frmerge.calibration.baselines.mats import MatsFit
from hf_frmerge.calibration.baselines.regmean import RegMeanFit, RegMeanOptions
from hf_frmerge.calibration.blocks.matrices import is_linear
from hf_frmerge.calibration.fits.block_fit import BlockFit
from hf_frmerge.calibration.fits.sweep_state import SweepOptions
from hf_frmerge.checkpoints.tensors.reader import some
from hf_frmerge.errors import ArgumentError
from hf_frmerge.fisher.average import FLOOR
from hf_frmerge.fisher.files import EstimateOptions, estimate_diagonal, estimate_kronecker
from hf_frmerge.methods.table import METHODS

if TYPE_CHECKING:
    from hf_frmerge.calibration.blocks.blockwise_model import BlockwiseModel
    from hf_frmerge.calibration.prompts.read_prompts import Prompts
    from hf_frmerge.calibration.sweep import LayerFit
    from hf_frmerge.checkpoints.source import Source
    from hf_frmerge.fisher.files import DiagonalFile, KroneckerFile
    from hf_frmerge.merging.planning.plan import MergePlan


def check_form(plan: MergePlan) -> None:
    """Raise `ArgumentError` if what the method gives cannot be written in the form that is asked for."""
    method = METHODS[plan.args.method]
    if method.needs_prompts and not method.fits_adapter and plan.args.calibration_form == "low_rank":
        raise ArgumentError(
            f"What method={method.name!r} gives has no low rank. Leave out calibration_form='low_rank'."
        )
    why = why_no_table(plan)
    if plan.args.calibration_form == "table" and why is not None:
        raise ArgumentError(f"calibration_form='table' writes coefficients of the experts, but {why}.")


def why_no_table(plan: MergePlan) -> str | None:
    """Say why what is found for a merge cannot be written as coefficients of the experts; `None` if it can."""
    args, method = plan.args, METHODS[plan.args.method]
    elsewise = "Use calibration_form='auto'"
    if plan.layout is None:
        return f"those of single rows are for full models. {elsewise}, or adapter_output='merged'"
    if method.needs_prompts or method.kind != "span":
        return f"method={method.name!r} gives no sum of them to begin with. {elsewise}, or method='karcher'"
    if plan.space != "deltas":
        return f"those of whole weights cannot scale what was learned. {elsewise}, or space='deltas' and a base_model"
    if args.post_step is not None:
        return f"post_step={args.post_step!r} changes their sum afterwards. {elsewise}, or leave out post_step"
    return None


def check_experts(plan: MergePlan, prompts: Sequence[Prompts]) -> None:
    """Raise `ArgumentError` if the method needs prompts of every expert, and one has none; or if they all weigh 0."""
    known = {own.expert for own in prompts}
    without = [expert.spec for place, expert in enumerate(plan.experts) if place not in known]
    args = plan.args
    if (METHODS[args.method].needs_prompts or args.fisher is not None) and without:
        option = f"fisher={args.fisher!r}" if args.fisher is not None else f"method={args.method!r}"
        raise ArgumentError(
            f"{option} needs prompts of every expert, and {some(without)} has none. Pass some for it too, or one file "
            "for all experts."
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
    if method in ("regmean", "regmean++"):
        return {"method": method, **asdict(_regmean_options(plan)), "rank": options.rank}
    own = {"floor": FLOOR} if method == "fisher" else {"max_iter": plan.args.max_iter}
    return {"method": method, **own, "fisher_labels": plan.args.fisher_labels, "rank": options.rank}


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
    if plan.args.method in ("regmean", "regmean++"):
        return partial(RegMeanFit, options=_regmean_options(plan))
    if plan.args.method == "mats":
        return partial(MatsFit, files=kronecker_files(plan, model, prompts, is_silent), max_iter=plan.args.max_iter)
    return partial(FisherFit, files=diagonal_files(plan, model, prompts, is_silent))


def diagonal_files(
    plan: MergePlan, model: BlockwiseModel, prompts: Sequence[Prompts], is_silent: bool | None
) -> list[DiagonalFile]:
    """Estimate the diagonal Fisher information of the blocks' parameters; arguments as for `equations_of`."""
    parameters = [f"{block}.{name}" for block in model.blocks for name, _ in model.block(block).named_parameters()]
    options, base, rows = _estimate_options(plan, is_silent), _base_of(plan), model.stacks.rows()
    files = (
        estimate_diagonal(plan.experts[own.expert].source, base, own.token_ids, parameters, options) for own in prompts
    )
    return [replace(file, rows=rows) for file in files]


def kronecker_files(
    plan: MergePlan, model: BlockwiseModel, prompts: Sequence[Prompts], is_silent: bool | None
) -> list[KroneckerFile]:
    """Estimate the Kronecker factors of the linear layers in the blocks; arguments as for `equations_of`."""
    layers = [
        f"{block}.{name}"
        for block in model.blocks
        for name, module in model.block(block).named_modules()
        if is_linear(module)
    ]
    options, base = _estimate_options(plan, is_silent), _base_of(plan)
    return [
        estimate_kronecker(plan.experts[own.expert].source, base, own.token_ids, layers, options) for own in prompts
    ]


def _base_of(plan: MergePlan) -> Source | None:
    return plan.base.source if plan.base is not None else None


def _estimate_options(plan: MergePlan, is_silent: bool | None) -> EstimateOptions:
    return EstimateOptions(plan.args.fisher_labels, plan.args.seed, plan.args.device, is_silent)


def _regmean_options(plan: MergePlan) -> RegMeanOptions:
    return RegMeanOptions(plan.args.off_diagonal, from_merge=plan.args.method == "regmean++")
