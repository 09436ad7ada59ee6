"""Fit a planned merge to its experts on prompts, and write coefficients or corrections for the engine to use."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from hf_frmerge.calibration.blocks.block_files import BlockFiles
from hf_frmerge.calibration.blocks.blockwise_model import BlockwiseModel
from hf_frmerge.calibration.blocks.dealing import own_batches
from hf_frmerge.calibration.blocks.layers import routed_experts
from hf_frmerge.calibration.blocks.matrices import is_linear, n_in
from hf_frmerge.calibration.blocks.weights import WeightReader
from hf_frmerge.calibration.choose_start import start_distances
from hf_frmerge.calibration.fits.block_fit import FEWEST_TOKENS
from hf_frmerge.calibration.fits.equations import check_form, equations_of, settings_of, why_no_table
from hf_frmerge.calibration.fits.least_squares import FitOptions
from hf_frmerge.calibration.fits.sweep_state import SweepOptions
from hf_frmerge.calibration.held_out import choose_form, distances, form_of_method, forms_of
from hf_frmerge.calibration.inputs import (
    are_self_written,
    batches_of,
    counts_of,
    digest_of,
    fitted_and_held_out,
    is_silent,
    open_runnable,
    prompts_of,
    tokenizer_of,
    written_batches,
)
from hf_frmerge.calibration.into_adapter import correction_rank, transposed_tensors
from hf_frmerge.calibration.kept_files import RECORD_FILE, read_record, write_record
from hf_frmerge.calibration.neutral import measure_neutral
from hf_frmerge.calibration.prompts.read_prompts import Prompts
from hf_frmerge.calibration.refinement.expert_updates import write_table
from hf_frmerge.calibration.refinement.refine_fit import PROGRESS_FILE, refine_fit
from hf_frmerge.calibration.refinement.rollouts import check_writes
from hf_frmerge.calibration.sweep import FittedBlock, Sweep, by_parameter
from hf_frmerge.calibration.whitening import whiten
from hf_frmerge.checkpoints.disk import remove_file
from hf_frmerge.checkpoints.tensors.reader import some
from hf_frmerge.fisher.scores import check_scores
from hf_frmerge.kernels.load import load_kernels
from hf_frmerge.merging.arguments.values import as_shares
from hf_frmerge.merging.engine.journal import fingerprint
from hf_frmerge.merging.engine.processes import Processes
from hf_frmerge.merging.planning.choose_method import with_start
from hf_frmerge.merging.planning.corrections import CalibrationRecord, Form, RefinementRecord, nearest_start
from hf_frmerge.methods.table import METHODS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hf_frmerge.kernels.interface import Kernels
    from hf_frmerge.merging.planning.plan import MergePlan
    from hf_frmerge.merging.run import Calibrate

logger = logging.getLogger(__name__)

_UPDATE_PRIOR = 5.0  # kappa for full fine-tunes; 3 to 10 gave the same
_ADAPTER_PRIOR = 1.0  # for adapters; 5 gave the same, 0.1 two thirds of the gain


def prepare(
    plan: MergePlan, calibration: Any, processing_class: Any = None, *, measures_base_text: bool = True
) -> Calibrate:
    """
    Check that a merge can be calibrated, read the prompts, and return the function that does it.

    Args:
        plan: Plan of the merge.
        calibration: What the user passed: data for all experts, data by expert, or `"self"`, `"self:chat"`.
        processing_class: Tokenizer; by default the one beside the base, or the first full expert.
        measures_base_text: Whether the record is to say how far the merge goes from the base on text of the base.

    Raises:
        ArgumentError: If its models cannot be run block by block or do not give what is asked of them (text, or
            probabilities), an adapter is to be made that cannot hold the corrections, or the prompts cannot be used.
    """
    whole, model = open_runnable(plan)
    check_form(plan)
    if plan.args.fisher is not None or "fisher_labels" in METHODS[plan.args.method].options:
        check_scores(model.model, plan.args.fisher_labels)
    for option, writer in (("refine_lmbda", "the merge"), ("refine_written_samples", "the experts")):
        if plan.args.refine_steps and getattr(plan.args, option):
            check_writes(model, option, writer)
    tokenizer = tokenizer_of(plan, whole, processing_class)
    read = prompts_of(plan, model, calibration, tokenizer)
    if not are_self_written(calibration):
        fitted_and_held_out(plan, read(Processes(alone=True)))  # refuses too few before anything is written
    if plan.args.fisher is not None:
        return lambda staging, processes: whiten(plan, whole, model, read(processes), staging, processes)
    by_base = tokenizer if measures_base_text else None
    return lambda staging, processes: calibrate(plan, whole, model, read(processes), staging, processes, by_base)


def calibrate(
    plan: MergePlan,
    whole: MergePlan,
    model: BlockwiseModel,
    prompts: Sequence[Prompts],
    staging: Path,
    processes: Processes,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> CalibrationRecord | None:
    """
    Fit a merge to its experts, refine it if that is asked for, and write what is best: coefficients or corrections.

    Best is what is closest to the experts on prompts held out from the fit.

    Nothing is written if no form of the fit is closer to the experts than the merge without data; but what a
    method gives that was asked for by name is written as it is. An interrupted call goes on where it was when it is
    made again with the same arguments and folder.

    Several processes share the prompts, and by them the experts: each carries hidden states of its own, what is summed
    over tokens or experts is added up, and all solve the same equations. A refinement, which has all weights in
    memory, is left to the main process, and so is the fit before it.

    Args:
        plan: Plan of the merge without data, which is the start. If its method is to be chosen, it gets the one that
            is nearest to the experts on the held-out prompts.
        whole: The same merge into a whole model: another plan if the output is an adapter.
        model: Modules of its models.
        prompts: Prompts of the experts; one that has none counts by its weights alone.
        staging: Folder of unfinished files; the main process writes them, and all read them.
        processes: Processes that share the work.
        tokenizer: Says how a text begins, for prompts of the base; without it these are left out.

    Returns:
        How the merge was fitted and what that gains; `None` in all processes but the main one.

    Raises:
        ArgumentError: If the model cannot be run block by block, or there are too few prompts to judge by, or fewer
            batches than processes.
        NonFiniteError: If activations are not finite.
        ResumeError: If the folder holds a calibration with other arguments.
    """
    started = time.process_time()
    fitted, held_out = fitted_and_held_out(plan, prompts)
    starts = _choose_start(plan, whole, model, held_out, processes) if plan.chooses_method else None
    if plan.args.refine_steps:  # after the choice of a start, by which all processes merge
        if not processes.is_main:
            return None
        processes = Processes(alone=True)
    if processes.is_main and not METHODS[plan.args.method].needs_prompts:
        _warn_of_few_tokens(model, fitted)
        _warn_of_what_stays(model)
    kernels = load_kernels(plan.args.device)
    reader = WeightReader(whole, kernels, model)
    with processes.main_first():
        files = BlockFiles(staging, _key(plan, kernels, model, prompts))
    done = staging / RECORD_FILE
    if done.exists():  # the merge died after the fit
        return replace(read_record(done), starts=starts) if processes.is_main else None
    sweep = _open_sweep(plan, model, reader, fitted, held_out, processes)
    _fit_blocks(sweep, files, is_main=processes.is_main, is_silent=is_silent(plan, is_main=processes.is_main))
    if processes.is_main:
        _warn_of_unreached(sweep)
    by_form = distances(sweep, forms_of(sweep))
    seconds_of_others = processes.gather([] if processes.is_main else [time.process_time() - started])
    if not processes.is_main:
        return None
    form, refinement = _write_best(plan, whole, sweep, files, by_form, staging, fitted)
    # Of what an adapter stores the other way round, the file for it cannot be added to the whole model.
    is_readable = plan is whole or not transposed_tensors(whole)
    neutral = measure_neutral(whole, model, tokenizer, staging) if is_readable else None
    record = CalibrationRecord(
        prompts=counts_of(plan, fitted),
        held_out=counts_of(plan, held_out),
        tokens=sum(len(ids) for p in prompts for ids in p.token_ids),
        source=prompts[0].source,
        digest=digest_of(prompts),
        options={
            **settings_of(plan, sweep.state.options),
            "dtype": str(model.dtype).removeprefix("torch."),
            "judged_by": "predictions" if sweep.gives_logits else "hidden_states",
        },
        form=form,
        distances=by_form,
        seconds=round(time.process_time() - started + sum(seconds_of_others), 1),
        refinement=refinement,
        starts=starts,
        neutral=neutral,
    )
    write_record(done, record)
    return record


def _key(plan: MergePlan, kernels: Kernels, model: BlockwiseModel, prompts: Sequence[Prompts]) -> dict[str, Any]:
    """Return all that a fit depends on: one that goes on must have begun with the same."""
    return {
        **fingerprint(plan, kernels.name),
        "prompts": [p.digest for p in prompts],
        "fit": settings_of(plan, fit_settings(plan)[0]),
        "dtype": str(model.dtype),
    }


def _open_sweep(
    plan: MergePlan,
    model: BlockwiseModel,
    reader: WeightReader,
    fitted: Sequence[Prompts],
    held_out: Sequence[Prompts],
    processes: Processes,
) -> Sweep:
    """Return the sweep over this process's share of the prompts, before its first block."""
    options, is_full = fit_settings(plan)
    batches = own_batches(batches_of(plan, model, fitted, held_out), processes)
    with processes.main_first():  # what it estimates is kept for the others
        fit_of = equations_of(plan, model, fitted, is_silent=is_silent(plan, is_main=processes.is_main))
    return Sweep(
        model,
        reader,
        batches,
        as_shares(plan.weights),
        options,
        is_full=is_full,
        offers_table=plan.args.calibration_form in ("auto", "table") and why_no_table(plan) is None,
        fit_of=fit_of,
        processes=processes,
    )


def _choose_start(
    plan: MergePlan, whole: MergePlan, model: BlockwiseModel, held_out: Sequence[Prompts], processes: Processes
) -> dict[str, tuple[float | None, ...]]:
    """Give both plans the method that is nearest to the experts on held-out prompts; return the distances of all."""
    batches = batches_of(plan, model, (), held_out)
    # Told by one process: where distances are close, another machine might choose another one.
    (starts,) = processes.gather([start_distances(whole, model, batches)] if processes.is_main else [])
    plan.args, whole.args = (with_start(each.args, nearest_start(starts)) for each in (plan, whole))
    return starts


def _fit_blocks(sweep: Sweep, files: BlockFiles, *, is_main: bool, is_silent: bool | None) -> None:
    """Fit all parts in turn, those that are kept already from their files; the main process keeps the others."""
    sweep.begin()
    blocks = range(len(sweep.state.model.blocks))
    parts: list[tuple[int, Callable[[FittedBlock | None], FittedBlock]]]
    parts = [(index, partial(sweep.fit_block, index)) for index in blocks]
    if sweep.head is not None:
        parts.insert(0, (len(blocks), sweep.fit_head))
    elif sweep.state.options.fits_outer:
        parts.append((len(blocks), sweep.fit_last_layers))
    for index, fit in tqdm(parts, "Calibrating", unit="block", disable=is_silent):
        known = files.read(index, sweep.tensors(index))
        found = fit(known)
        if known is None and is_main:
            files.write(index, sweep.tensors(index), found)


def fit_settings(plan: MergePlan) -> tuple[SweepOptions, bool]:
    """Return the settings of the fit of a merge, and whether its experts are full fine-tunes."""
    is_full = plan.base is not None and all(expert.checkpoint is not None for expert in plan.experts)
    options = SweepOptions(
        FitOptions(update_prior=_UPDATE_PRIOR, adapter_prior=_ADAPTER_PRIOR)
        if plan.base is not None
        else FitOptions(),
        rank=correction_rank(plan),
        fits_outer=plan.layout is not None and not METHODS[plan.args.method].needs_prompts,
    )
    return options, is_full


def _write_best(
    plan: MergePlan,
    whole: MergePlan,
    sweep: Sweep,
    files: BlockFiles,
    by_form: dict[str, tuple[float | None, ...]],
    staging: Path,
    fitted: Sequence[Prompts],
) -> tuple[Form, RefinementRecord | None]:
    """Write the form that is best, or its refinement, and add the distances of that; remove what is unfinished."""
    wanted = plan.args.calibration_form if plan is whole else "low_rank"
    is_of_method = METHODS[plan.args.method].needs_prompts
    form = form_of_method(wanted) if is_of_method else choose_form(by_form, wanted)
    transposed = transposed_tensors(whole) if plan is not whole else None
    n_parts, refinement = sweep.n_parts, None
    if plan.args.refine_steps or form == "table":
        blocks = [files.read(index, sweep.tensors(index)) for index in range(n_parts)]
        found = [block for block in blocks if block is not None]
    if plan.args.refine_steps:
        written = written_batches(plan, sweep.state.model, fitted)
        form, refinement = refine_fit(plan.args, sweep, found, by_form, form, staging, transposed, written)
    if refinement is None or not refinement.best_step:
        if form == "table":
            write_table(sweep.state, by_parameter(sweep.state.model, found).coefficients, staging)
        elif transposed is None or form == "start":
            files.join(n_parts, form)
        else:
            files.join_for_adapter(n_parts, transposed)
    files.remove(n_parts)
    remove_file(staging / PROGRESS_FILE)
    return form, refinement


def _warn_of_few_tokens(model: BlockwiseModel, prompts: Sequence[Prompts]) -> None:
    widest = max((n_in(module) for module in model.block(model.blocks[0]).modules() if is_linear(module)), default=0)
    n_tokens = sum(len(ids) for one in prompts for ids in one.token_ids)
    if n_tokens < widest:
        logger.warning(
            "The prompts have %d tokens, fewer than the widest layer has inputs (%d). Give %d more, or what the fit "
            "changes will stay small.",
            n_tokens, widest, widest - n_tokens,
        )  # fmt: skip


def _warn_of_unreached(sweep: Sweep) -> None:
    if sweep.state.n_unreached:
        logger.warning(
            "%d experts of mixtures got fewer than %d tokens of the prompts and stay as merged. More prompts would "
            "reach them.", sweep.state.n_unreached, FEWEST_TOKENS,
        )  # fmt: skip


def _warn_of_what_stays(model: BlockwiseModel) -> None:
    """Name the weights that no layer of a fit has as they are stored: experts in one tensor, or halves of a matrix."""
    stays = [
        f"{block}.{name}"
        for block in model.blocks
        for name, parameter in model.block(block).named_parameters()
        if (parameter.ndim == 3 and "expert" in name and not routed_experts(model, block, name.rpartition(".")[0]))
        or (parameter.ndim == 2 and model.stacks.parts_of(block, name) != [name])
    ]
    if stays:
        logger.warning("A fit solves for stored matrices. What is stored otherwise stays as merged: %s.", some(stays))
