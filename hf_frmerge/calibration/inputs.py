"""What a calibration is made of: models that can be run block by block, their tokenizer, and the experts' prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from xxhash import xxh3_128_hexdigest

from hf_frmerge.calibration.blocks.blockwise_model import BlockwiseModel
from hf_frmerge.calibration.blocks.streams import Batch, in_batches
from hf_frmerge.calibration.blocks.weights import tensors_by_parameter
from hf_frmerge.calibration.fits.equations import check_experts
from hf_frmerge.calibration.into_adapter import as_whole_model
from hf_frmerge.calibration.prompts.continued import continued_prompts
from hf_frmerge.calibration.prompts.read_prompts import (
    Prompts,
    leading_tokens,
    read_prompts,
    split_prompts,
    with_more_beginnings,
)
from hf_frmerge.calibration.prompts.self_written import (
    chat_prefix,
    check_can_write,
    document_prefix,
    self_written_prompts,
)
from hf_frmerge.checkpoints.source import refuse_gguf
from hf_frmerge.checkpoints.tensors.reader import some
from hf_frmerge.errors import ArgumentError
from hf_frmerge.evaluation.models.loading import predicts_next_token
from hf_frmerge.evaluation.suite.inputs import find_tokenizer
from hf_frmerge.merging.arguments.calibration import SELF_CHAT, SELF_WRITTEN
from hf_frmerge.merging.engine.processes import Processes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hf_frmerge.merging.planning.plan import MergePlan

HELD_OUT = 1 / 8
"""Share of the prompts by which a fit is judged, and which take no part in it."""


def open_runnable(plan: MergePlan) -> tuple[MergePlan, BlockwiseModel]:
    """
    Check that the models of a merge can be run, and return its plan into a whole model, and the models' modules.

    Raises:
        ArgumentError: If they cannot be run block by block.
        CheckpointError: If one is a GGUF file.
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
    refuse_gguf([one.source for one in plan.models], "A calibrated merge runs its models")
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
    whole = plan if plan.layout is not None else as_whole_model(plan)
    model = open_model(whole)
    tensors_by_parameter(whole, model)  # refuses what could not be run
    return whole, model


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
    stored = {step.name: step.shape for step in plan.steps}
    return BlockwiseModel(model_class, config, device, _compute_dtype(device), stored)


def _compute_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16 where the device multiplies in it, which takes half the time, else float32."""
    if device.type != "cpu":
        return torch.bfloat16
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    is_native = any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "sve_bf16"))
    return torch.bfloat16 if is_native else torch.float32


def tokenizer_of(plan: MergePlan, whole: MergePlan, processing_class: Any) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer that was passed, or else that beside the base or the first model that has one."""
    return processing_class or find_tokenizer([whole.donor.source, *(model.source for model in plan.models)])


def are_self_written(calibration: Any) -> bool:
    """Whether the experts are to write the prompts, which takes a while."""
    return isinstance(calibration, str) and calibration in SELF_WRITTEN


def prompts_of(
    plan: MergePlan, model: BlockwiseModel, calibration: Any, tokenizer: PreTrainedTokenizerBase | None
) -> Callable[[Processes], Sequence[Prompts]]:
    """Read the prompts and return a function that gives them; of experts that write their own it does the work."""
    args = plan.args
    if are_self_written(calibration):
        check_can_write(model.model)
        prefix, leading = _prefixes(plan, tokenizer, is_chat=calibration == SELF_CHAT)
        return lambda processes: _self_written(plan, calibration, prefix, leading, processes)
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
    return lambda processes: prompts


def _prefixes(
    plan: MergePlan, tokenizer: PreTrainedTokenizerBase | None, *, is_chat: bool
) -> tuple[Sequence[int], Sequence[int]]:
    """Return the tokens behind which experts write, and those with which their prompts begin."""
    if tokenizer is None:
        raise ArgumentError(
            "None of the models has a tokenizer beside it, which says how a text begins, so the experts cannot write "
            "prompts of their own. Put one beside the base, or pass prompts as token ids (a column input_ids)."
        )
    if not is_chat:
        return document_prefix(tokenizer), leading_tokens(tokenizer)
    # A base often has no template where its fine-tunes have learned one.
    others = (find_tokenizer([model.source]) for model in plan.models)
    prefix = chat_prefix(next((t for t in chain([tokenizer], others) if t is not None and t.chat_template), tokenizer))
    return prefix, prefix


def _self_written(
    plan: MergePlan, source: str, prefix: Sequence[int], leading: Sequence[int], processes: Processes
) -> tuple[Prompts, ...]:
    args = plan.args
    own = range(len(plan.experts))[processes.rank :: processes.size]
    written = self_written_prompts(
        [plan.experts[number].source for number in own],
        plan.base.source if plan.base is not None else None,
        prefix=prefix,
        leading=leading,
        n_samples=args.num_calibration_samples,
        max_length=args.max_calibration_length,
        seed=args.seed,
        device=args.device,
    )
    of_all = processes.gather(
        [replace(prompts, expert=number, source=source) for number, prompts in zip(own, written)]
    )
    return tuple(sorted(of_all, key=lambda prompts: prompts.expert))


def fitted_and_held_out(
    plan: MergePlan, prompts: Sequence[Prompts]
) -> tuple[tuple[Prompts, ...], tuple[Prompts, ...]]:
    """Return the prompts that a merge is made by, and those that judge it; raise `ArgumentError` if none can."""
    fitted, held_out = split_prompts(prompts, HELD_OUT, plan.args.seed)
    if not held_out:
        raise ArgumentError(
            "No expert has four prompts or more, so none can be held out to judge the fit. Pass more prompts: 16 an "
            "expert help already, 64 are better. Short texts for a language model are joined; shorter prompts "
            "(max_calibration_length) are more."
        )
    return fitted, held_out


def counts_of(plan: MergePlan, prompts: Sequence[Prompts]) -> tuple[int, ...]:
    """Return the number of prompts of every expert."""
    by_expert = {one.expert: len(one.token_ids) for one in prompts}
    return tuple(by_expert.get(expert, 0) for expert in range(len(plan.experts)))


def digest_of(prompts: Sequence[Prompts]) -> str:
    """Return the XXH3-128 of all token ids."""
    return xxh3_128_hexdigest("".join(one.digest for one in prompts).encode())


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


def written_batches(plan: MergePlan, model: BlockwiseModel, fitted: Sequence[Prompts]) -> list[Batch]:
    """Return the further prompts that experts write for a refinement, with more beginnings, in batches."""
    args = plan.args
    if not args.refine_written_samples:
        return []
    written = continued_prompts(
        fitted,
        [expert.source for expert in plan.experts],
        plan.base.source if plan.base is not None else None,
        n_samples=args.refine_written_samples,
        max_length=args.max_calibration_length,
        seed=args.seed,
        device=args.device,
    )
    return batches_of(plan, model, written, ())


def is_silent(plan: MergePlan, *, is_main: bool = True) -> bool | None:
    """True, also in all processes but the main one; or None, on which tqdm shows a bar only on a terminal."""
    return True if plan.args.disable_tqdm or not is_main else None
