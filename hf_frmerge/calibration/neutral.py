"""Measure what a merge makes of text that belongs to no expert: how far is it from the base there?"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from hf_frmerge.calibration.blocks.forward import run_forward
from hf_frmerge.calibration.blocks.outputs import squared_distance
from hf_frmerge.calibration.blocks.streams import in_batches
from hf_frmerge.calibration.blocks.weights import WeightReader
from hf_frmerge.calibration.prompts.read_prompts import leading_tokens
from hf_frmerge.calibration.prompts.self_written import document_prefix, self_written_prompts
from hf_frmerge.calibration.refinement.losses import row_losses
from hf_frmerge.errors import MergeError
from hf_frmerge.evaluation.models.loading import predicts_next_token
from hf_frmerge.kernels.load import load_kernels
from hf_frmerge.merging.planning.corrections import NeutralRecord

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from hf_frmerge.calibration.blocks.blockwise_model import BlockwiseModel
    from hf_frmerge.calibration.prompts.read_prompts import Prompts
    from hf_frmerge.merging.planning.plan import MergePlan

logger = logging.getLogger(__name__)

N_NEUTRAL = 8
"""Prompts of the base: enough to see a merge that forgot how to write, and cheap beside a fit."""


def measure_neutral(
    whole: MergePlan, model: BlockwiseModel, tokenizer: PreTrainedTokenizerBase | None, staging: Path
) -> NeutralRecord | None:
    """
    Let the base write prompts, and measure how far the predictions of a fitted merge are from its own there.

    The prompts are cached; the whole base is in memory while it writes them, and one block of a model thereafter.

    Args:
        whole: Plan of the merge into a whole model.
        model: Modules of its models.
        tokenizer: Says how a text begins.
        staging: Folder with what the fit found.

    Returns:
        `None` if there is no base that writes text, or no tokenizer.
    """
    if whole.base is None or tokenizer is None or not predicts_next_token(model.model):
        return None
    args = whole.args
    try:
        [prompts] = self_written_prompts(
            [whole.base.source],
            None,
            prefix=document_prefix(tokenizer),
            leading=leading_tokens(tokenizer),
            n_samples=N_NEUTRAL,
            max_length=args.max_calibration_length,
            seed=args.seed,
            device=args.device,
        )
    except (MergeError, ImportError, OSError, RuntimeError, ValueError) as error:
        # The last four are what transformers raises of a model that it cannot load whole. The merge does without.
        logger.info("What the merge does to text of no expert is not measured, since the base writes none: %s", error)
        return None
    fitted = replace(whole)
    fitted.take_fit(staging)
    try:
        reader = WeightReader(fitted, load_kernels(args.device), model)
        return _compare(reader, model, prompts, args.calibration_batch_size)
    finally:
        if fitted.corrections is not None:
            fitted.corrections.checkpoint.close()


def _compare(reader: WeightReader, model: BlockwiseModel, prompts: Prompts, batch_size: int) -> NeutralRecord:
    batches = list(in_batches(prompts.token_ids, 0, batch_size, 0, is_held_out=True, device=model.device))

    def of_base(parameter: str) -> Tensor:
        values = reader.base(parameter)
        return values if values is not None else reader.start(parameter)  # what the base lacks is no difference

    base, merged = run_forward(model, of_base, batches), run_forward(model, reader.start, batches)
    distances, nats = [], []
    for theirs, ours in zip(base.outputs(), merged.outputs()):
        distances.append(squared_distance(ours, theirs))
        nats.append(row_losses(ours, theirs, "kl"))
    return NeutralRecord(
        prompts=len(prompts.token_ids),
        tokens=sum(map(len, prompts.token_ids)),
        distance=float(torch.cat(distances).mean()),
        nats=float(torch.cat(nats).mean()),
    )
