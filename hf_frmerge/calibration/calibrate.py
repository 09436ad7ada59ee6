"""Fit a planned merge to its experts on prompts, and write the corrections for the engine to add."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm
from xxhash import xxh3_128_hexdigest

from hf_frmerge.calibration.block_files import BlockFiles, read_kept
from hf_frmerge.calibration.blockwise_model import BlockwiseModel
from hf_frmerge.calibration.choose_start import start_distances
from hf_frmerge.calibration.fits.block_fit import SweepOptions
from hf_frmerge.calibration.fits.equations import check_experts, check_form, equations_of, settings_of
from hf_frmerge.calibration.fits.least_squares import FitOptions
from hf_frmerge.calibration.held_out import choose_form, distances, form_of_method, forms_of
from hf_frmerge.calibration.into_adapter import as_whole_model, correction_rank, transposed_tensors
from hf_frmerge.calibration.layers import is_linear, n_in
from hf_frmerge.calibration.neutral import measure_neutral
from hf_frmerge.calibration.prompts import (
    Prompts,
    leading_tokens,
    read_prompts,
    split_prompts,
    with_more_beginnings,
)
from hf_frmerge.calibration.refinement.refine_fit import PROGRESS_FILE, refine_fit
from hf_frmerge.calibration.self_written import document_prefix, self_written_prompts
from hf_frmerge.calibration.streams import Batch, in_batches
from hf_frmerge.calibration.sweep import Sweep
from hf_frmerge.calibration.weights import WeightReader
from hf_frmerge.checkpoints.disk import remove_file, write_file
from hf_frmerge.checkpoints.tensors.reader import some
from hf_frmerge.errors import ArgumentError, ResumeError
from hf_frmerge.evaluation.models.loading import predicts_next_token
from hf_frmerge.evaluation.suite.inputs import find_tokenizer
from hf_frmerge.kernels.load import load_kernels
from hf_frmerge.merging.engine.journal import fingerprint
from hf_frmerge.merging.planning.choose_method import with_start
from hf_frmerge.merging.planning.corrections import CalibrationRecord, Form, RefinementRecord, nearest_start
from hf_frmerge.merging.record.check_types import check_types
from hf_frmerge.methods.table import METHODS

if TYPE_CHECKING:
    from hf_frmerge.merging.planning.plan import MergePlan

logger = logging.getLogger(__name__)

_RECORD_FILE = "calibration.json"
HELD_OUT = 1 / 8
_UPDATE_PRIOR = 5.0  # kappa for full fine-tunes; 3 to 10 gave the same


def prepare(plan: MergePlan, calibration: Any, processing_class: Any = None) -> Callable[[Path], CalibrationRecord]:
    """
    Check that a merge can be calibrated, read the prompts, and return the function that does it, given a folder.

    Args:
        plan: Plan of the merge.
        calibration: What the user passed: data for all experts, data by expert, or `"self"`.
        processing_class: Tokenizer; by default the one beside the base, or the first full expert.

    Raises:
        ArgumentError: If its models cannot be run block by block, an adapter is to be made that cannot hold the
            corrections, or the prompts cannot be used.
    """
    if plan.vocabulary is not None:
        raise ArgumentError(
            "A calibrated merge compares its models over one vocabulary, and these have different ones. Merge without "
            "calibration."
        )
    remote = [one.spec for one in plan.models if "://" in one.source.path]
    if remote:
        raise ArgumentError(
            f"A calibrated merge runs its models, so they must be on this machine, but {some(remote)} is read from "
            "elsewhere. Leave out --stream-from-hub (stream_from_hub), or copy the files here."
        )
    pairs = [one.spec for one in plan.models if one.source.adapter is not None]
    if pairs:
        raise ArgumentError(
            f"A calibrated merge runs its models, and {some(pairs)} is two: a model and an adapter. Fold the adapter "
            "in first (`frmerge merge ADAPTER --base-model BASE --output-dir folded`), and pass 'folded'."
        )
    subtracted = [expert.spec for expert, weight in zip(plan.experts, plan.weights) if weight < 0]
    if subtracted:
        raise ArgumentError(
            f"A calibrated merge computes what its experts compute, but {some(subtracted)} has a negative weight, to "
            "be subtracted. Leave out the calibration, or give no negative weights."
        )
    check_form(plan)
    whole = plan if plan.layout is not None else as_whole_model(plan)
    model, args = open_model(whole), plan.args
    tokenizer = processing_class or find_tokenizer([whole.donor.source, *(model.source for model in plan.models)])
    if calibration == "self":
        return lambda staging: calibrate(plan, whole, model, _self_written(plan, tokenizer), staging, tokenizer)
    prompts = read_prompts(
        calibration,
        tokenizer,
        experts=[expert.spec for expert in plan.experts],
        n_samples=args.num_calibration_samples,
        max_length=args.max_calibration_length,
        seed=args.seed,
        vocab_size=model.model.config.get_text_config().vocab_size,
        packing=predicts_next_token(model.model),
    )
    check_experts(plan, prompts)
    return lambda staging: calibrate(plan, whole, model, prompts, staging, tokenizer)


def calibrate(
    plan: MergePlan,
    whole: MergePlan,
    model: BlockwiseModel,
    prompts: Sequence[Prompts],
    staging: Path,
    tokenizer: Any = None,
) -> CalibrationRecord:
    """
    Fit a merge to its experts, refine it if that is asked for, and write the corrections that are best.

    Best is what is closest to the experts on prompts held out from the fit.

    Nothing is written if no form of the corrections is closer to the experts than the merge without data; but what a
    method gives that was asked for by name is written as it is. An interrupted call goes on where it was when it is
    made again with the same arguments and folder.

    Args:
        plan: Plan of the merge without data, which is the start. If its method is to be chosen, it gets the one that
            is nearest to the experts on the held-out prompts.
        whole: The same merge into a whole model: another plan if the output is an adapter.
        model: Modules of its models.
        prompts: Prompts of the experts; one that has none counts by its weights alone.
        staging: Folder of unfinished files.
        tokenizer: Says how a text begins, for prompts of the base; without it these are left out.

    Returns:
        How the corrections were found and what they gain.

    Raises:
        ArgumentError: If the model cannot be run block by block, or there are too few prompts to judge by.
        NonFiniteError: If activations are not finite.
        ResumeError: If the folder holds a calibration with other arguments.
    """
    started = time.process_time()
    fitted, held_out = split_prompts(prompts, HELD_OUT, plan.args.seed)
    if not held_out:
        raise ArgumentError(
            "No expert has four prompts or more, so none can be held out to judge the fit. Pass more prompts: 16 an "
            "expert help already, 64 are better."
        )
    if not METHODS[plan.args.method].needs_prompts:
        _warn_of_few_tokens(model, fitted)
    starts = None
    if plan.chooses_method:
        starts = start_distances(whole, model, batches_of(plan, model, (), held_out))
        plan.args, whole.args = (with_start(each.args, nearest_start(starts)) for each in (plan, whole))
    is_full = plan.base is not None and all(expert.checkpoint is not None for expert in plan.experts)
    options = SweepOptions(FitOptions(update_prior=_UPDATE_PRIOR if is_full else 0.0), rank=correction_rank(plan))
    settings = settings_of(plan, options)
    kernels = load_kernels(plan.args.device)
    reader = WeightReader(whole, kernels, model.model)
    key = {
        **fingerprint(plan, kernels.name),
        "prompts": [p.digest for p in prompts],
        "fit": settings,
        "dtype": str(model.dtype),
    }
    files = BlockFiles(staging, key)
    done = staging / _RECORD_FILE
    if done.exists():  # the merge died after the fit
        return replace(_read_record(done), starts=starts)
    batches = batches_of(plan, model, fitted, held_out)
    fit_of = equations_of(plan, model, fitted, is_silent=_is_silent(plan))
    sweep = Sweep(model, reader, batches, plan.weights, options, is_full=is_full, fit_of=fit_of)
    sweep.begin()
    for index in tqdm(range(len(model.blocks)), "Calibrating", unit="block", disable=_is_silent(plan)):
        known = files.read(index, sweep.tensors(index))
        fitted_block = sweep.fit_block(index, known)
        if known is None:
            files.write(index, sweep.tensors(index), fitted_block)
    by_form = distances(sweep, forms_of(sweep))
    form, refinement = _write_best(plan, whole, sweep, files, by_form, staging)
    # Of what an adapter stores the other way round, the file for it cannot be added to the whole model.
    is_readable = plan is whole or not transposed_tensors(whole)
    neutral = measure_neutral(whole, model, tokenizer, staging) if is_readable else None
    record = CalibrationRecord(
        prompts=_counts(plan, fitted),
        held_out=_counts(plan, held_out),
        tokens=sum(len(ids) for p in prompts for ids in p.token_ids),
        source=prompts[0].source,
        digest=_digest(prompts),
        options={
            **settings,
            "dtype": str(model.dtype).removeprefix("torch."),
            "judged_by": "predictions" if sweep.gives_logits else "hidden_states",
        },
        form=form,
        distances=by_form,
        seconds=round(time.process_time() - started, 1),
        refinement=refinement,
        starts=starts,
        neutral=neutral,
    )
    write_file(done, json.dumps(record.to_dict()))
    return record


def _write_best(
    plan: MergePlan,
    whole: MergePlan,
    sweep: Sweep,
    files: BlockFiles,
    by_form: dict[str, tuple[float | None, ...]],
    staging: Path,
) -> tuple[Form, RefinementRecord | None]:
    """Write the form that is best, or its refinement, and add the distances of that; remove what is unfinished."""
    wanted = plan.args.calibration_form if plan is whole else "low_rank"
    is_of_method = METHODS[plan.args.method].needs_prompts
    form = form_of_method(wanted) if is_of_method else choose_form(by_form, wanted)
    transposed = transposed_tensors(whole) if plan is not whole else None
    n_blocks, refinement = len(sweep.state.model.blocks), None
    if plan.args.refine_steps:
        blocks = [files.read(index, sweep.tensors(index)) for index in range(n_blocks)]
        found = [block for block in blocks if block is not None]
        form, refinement = refine_fit(plan.args, sweep, found, by_form, form, staging, transposed)
    if refinement is None or not refinement.best_step:
        if transposed is None or form == "start":
            files.join(n_blocks, form)
        else:
            files.join_for_adapter(n_blocks, transposed)
    files.remove(n_blocks)
    remove_file(staging / PROGRESS_FILE)
    return form, refinement


def _read_record(path: Path) -> CalibrationRecord:
    """Read the record of a fit that an interrupted merge had ended. Raises `ResumeError` if it is damaged."""
    values = read_kept(path)
    try:
        record = CalibrationRecord.from_dict(values)
        check_types(record)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ResumeError(
            f"{path} is not what a calibration writes ({type(error).__name__}: {error}). Pass --overwrite to start "
            "anew."
        ) from error
    return record


def open_model(plan: MergePlan) -> BlockwiseModel:
    """Return the modules of the models' class, without weights."""
    import transformers

    path = plan.donor.source.path
    config = transformers.AutoConfig.from_pretrained(path)
    name = (config.architectures or [""])[0]
    model_class = getattr(transformers, name, None)
    if model_class is None:
        raise ArgumentError(
            f"The configuration of {plan.donor.spec!r} names the class {name!r}, which transformers does not have, so "
            "its blocks cannot be run. Merge without calibration."
        )
    device = torch.device(plan.args.device)
    return BlockwiseModel(model_class, config, device, _compute_dtype(device))


def _compute_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16 where the device multiplies in it, which takes half the time, else float32."""
    if device.type != "cpu":
        return torch.bfloat16
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    is_native = any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "sve_bf16"))
    return torch.bfloat16 if is_native else torch.float32


def batches_of(
    plan: MergePlan, model: BlockwiseModel, fitted: Sequence[Prompts], held_out: Sequence[Prompts]
) -> list[Batch]:
    """Return the prompts to fit, of a language model with more beginnings, and then those to judge by, in batches."""
    if predicts_next_token(model.model):
        fitted = [with_more_beginnings(p) for p in fitted]
    pad = getattr(model.model.config, "pad_token_id", None) or 0  # masked, so any token will do
    size = plan.args.calibration_batch_size
    return [
        batch
        for prompts, is_held_out in ((fitted, False), (held_out, True))
        for one in prompts
        for batch in in_batches(one.token_ids, one.expert, size, pad, is_held_out=is_held_out, device=model.device)
    ]


def _warn_of_few_tokens(model: BlockwiseModel, prompts: Sequence[Prompts]) -> None:
    widest = max((n_in(module) for module in model.block(model.blocks[0]).modules() if is_linear(module)), default=0)
    n_tokens = sum(len(ids) for one in prompts for ids in one.token_ids)
    if n_tokens < widest:
        logger.warning(
            "The prompts have %d tokens, fewer than the widest layer has inputs (%d). Give %d more, or what the fit "
            "changes will stay small.",
            n_tokens, widest, widest - n_tokens,
        )  # fmt: skip


def _counts(plan: MergePlan, prompts: Sequence[Prompts]) -> tuple[int, ...]:
    by_expert = {one.expert: len(one.token_ids) for one in prompts}
    return tuple(by_expert.get(expert, 0) for expert in range(len(plan.experts)))


def _digest(prompts: Sequence[Prompts]) -> str:
    return xxh3_128_hexdigest("".join(one.digest for one in prompts).encode())


def _is_silent(plan: MergePlan) -> bool | None:
    """None, on which tqdm shows a bar only on a terminal."""
    return True if plan.args.disable_tqdm else None


def _self_written(plan: MergePlan, tokenizer: Any) -> tuple[Prompts, ...]:
    args = plan.args
    if tokenizer is None:
        raise ArgumentError(
            "None of the models has a tokenizer beside it, which says how a text begins, so the experts cannot write "
            "prompts of their own. Put one beside the base, or pass prompts as token ids (a column input_ids)."
        )
    return self_written_prompts(
        [expert.source for expert in plan.experts],
        plan.base.source if plan.base is not None else None,
        prefix=document_prefix(tokenizer),
        leading=leading_tokens(tokenizer),
        n_samples=args.num_calibration_samples,
        max_length=args.max_calibration_length,
        seed=args.seed,
        device=args.device,
    )
