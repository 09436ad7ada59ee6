"""Run causal language models over blocks of tokens, and compute loss, perplexity and token accuracy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from hf_frmerge.evaluation.models.loading import predicts_next_token
from hf_frmerge.evaluation.models.predictions import predictions
from hf_frmerge.evaluation.text.pair_blocks import decoder_of, pair_blocks
from hf_frmerge.evaluation.text.token_blocks import (
    IGNORED_LABEL,
    Rows,
    TokenBlocks,
    collate,
    cut,
    separate_rows,
    token_stream,
)


@dataclass(frozen=True)
class LanguageModelMetrics:
    """Loss, perplexity and token accuracy of a causal language model on a text."""

    loss: float  # mean negative log-likelihood, in nats a token
    perplexity: float  # exp(loss)
    token_accuracy: float  # share of tokens with the highest logit
    n_tokens: int  # tokens scored

    def by_name(self) -> dict[str, float]:
        """Return the metrics by name, as `Score.metrics` stores them."""
        return {"loss": self.loss, "perplexity": self.perplexity, "token_accuracy": self.token_accuracy}


def evaluate_causal_lm(
    model: torch.nn.Module,
    processing_class: PreTrainedTokenizerBase | None,
    dataset: Rows,
    *,
    batch_size: int = 8,
    max_length: int | None = None,
    block_size: int = 256,
    accelerator: Accelerator | None = None,
    on_prediction_step: Callable[[DataLoader], None] | None = None,
) -> LanguageModelMetrics:
    r"""
    Compute loss, perplexity and token accuracy of a causal language model on a text.

    The rows are joined in order, without a separator, into one stream of `M` tokens, as in transformers' `run_clm`,
    and cut into blocks that overlap by one token: every token but the very first is scored exactly once, with at most
    `block_size - 1` tokens of context. The log-softmax is taken in float32, whatever the model's dtype, and sums are
    float64 in the order of the text, so neither the batch size nor the number of processes changes the result beyond
    the rounding of the model itself. Only the logits of one batch are in memory at a time.

    Args:
        model (`torch.nn.Module`):
            Causal language model whose output has `logits` of shape `(B, T, V)`, such as a `PreTrainedModel` or a
            `PeftModel`. It is moved to the accelerator's device unless it was dispatched over several devices.
        processing_class (`PreTrainedTokenizerBase`, *optional*):
            Tokenizer. Only needed for rows of text.
        dataset (`datasets.Dataset` or any iterable of rows):
            Rows with `input_ids` or else `text`, or plain strings.
        batch_size (`int`, *optional*, defaults to `8`):
            Blocks a forward pass, on each process.
        max_length (`int`, *optional*):
            Cut every row to this many tokens.
        block_size (`int`, *optional*, defaults to `256`):
            Tokens a block, capped at the model's `max_position_embeddings`.
        accelerator (`accelerate.Accelerator`, *optional*):
            Defaults to a new one. In a distributed run every process must call this function; all get the result.
        on_prediction_step (`Callable[[DataLoader], None]`, *optional*):
            Called after every batch with the dataloader, whose `len` is the number of batches on this process.

    Returns:
        `LanguageModelMetrics`: loss in nats a token, perplexity, token accuracy, and the number of tokens scored.

    Raises:
        ArgumentError: If the rows hold neither text nor tokens, fewer than two tokens in all, or token ids beyond the
            model's vocabulary.
    """
    blocks = blocks_for(model, processing_class, dataset, block_size, max_length=max_length)
    accelerator = accelerator or Accelerator()
    log_probs, hits = {}, {}

    def keep(batch: dict[str, torch.Tensor], output: Any) -> None:
        for index, logits, targets in rows_of(batch, output.logits):
            parts = list(predictions(logits, targets))
            log_probs[index] = np.concatenate([part.log_prob for part in parts])
            hits[index] = sum(int((part.first == part.targets).sum()) for part in parts)

    forward_blocks(
        model,
        blocks,
        keep,
        batch_size=batch_size,
        accelerator=accelerator,
        on_prediction_step=on_prediction_step,
    )
    # A list: gather_object iterates over what each process passes, and of a dict only the keys would arrive.
    gathered = {index: (lp, hit) for index, lp, hit in gather_object([(i, log_probs[i], hits[i]) for i in log_probs])}
    ordered = [gathered[index] for index in range(len(blocks))]
    n_tokens = blocks.n_predictions
    return metrics_of(np.concatenate([lp for lp, _ in ordered]), sum(hit for _, hit in ordered) / n_tokens)


def metrics_of(log_probs: np.ndarray, token_accuracy: float) -> LanguageModelMetrics:
    """Return the metrics of a text from the log-probabilities of its tokens, `(T,)` float64."""
    # fsum is exact, so the loss does not depend on how blocks were spread over processes.
    loss = -math.fsum(log_probs) / len(log_probs)
    # np.exp gives inf for a diverged model, where math.exp raises OverflowError.
    return LanguageModelMetrics(loss, float(np.exp(loss)), token_accuracy, len(log_probs))


def forward_blocks(
    model: torch.nn.Module,
    blocks: TokenBlocks,
    on_batch: Callable[[dict[str, torch.Tensor], Any], None],
    *,
    batch_size: int,
    accelerator: Accelerator,
    on_prediction_step: Callable[[DataLoader], None] | None = None,
    output_hidden_states: bool = False,
) -> None:
    """
    Run a model over this process's share of the blocks, in inference mode.

    Batches are formed first, then dealt to the processes in turn. A batch therefore has the same blocks for any number
    of processes, so the model rounds alike, and no block is repeated to even out the shares.

    Args:
        model (`torch.nn.Module`): Moved to the accelerator's device unless it was dispatched over several.
        blocks (`TokenBlocks`): Blocks to read.
        on_batch (`Callable`): Called with every batch (see `collate`) and the model's output for it.
        batch_size (`int`): Blocks a batch.
        accelerator (`accelerate.Accelerator`): Gives the device, and the number of this process.
        on_prediction_step (`Callable[[DataLoader], None]`, *optional*): Called after every batch.
        output_hidden_states (`bool`, *optional*, defaults to `False`): Ask the model for its hidden states.
    """
    batches = [range(start, min(start + batch_size, len(blocks))) for start in range(0, len(blocks), batch_size)]
    process_batches = batches[accelerator.process_index :: accelerator.num_processes]
    loader: Any = DataLoader(blocks, batch_sampler=process_batches, collate_fn=collate)  # type: ignore[arg-type]
    if getattr(model, "hf_device_map", None) is None:
        model.to(accelerator.device)
    was_training = model.training
    model.eval()
    extra = {"output_hidden_states": True} if output_hidden_states else {}
    if predicts_next_token(model) or blocks.sources:
        extra["use_cache"] = False  # the key-value cache is only of use in generation, and takes memory
    with torch.inference_mode():
        for batch in loader:
            inputs = send_to_device(batch, accelerator.device)
            read = {name: values for name, values in inputs.items() if name not in ("index", "labels")}
            on_batch(inputs, model(**read, **extra))
            if on_prediction_step is not None:
                on_prediction_step(loader)
    model.train(was_training)


def rows_of(batch: dict[str, torch.Tensor], logits: torch.Tensor) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Yield, for every block of a batch, its index, the `(n, V)` logits and the `(n,)` tokens they predict."""
    for index, row, labels in zip(batch["index"].tolist(), logits, batch["labels"]):
        targets = labels[1:].to(row.device)
        is_predicted = targets != IGNORED_LABEL
        n = int(is_predicted.sum())
        # Usually only the padding at the end is not predicted; a slice then avoids a copy of the logits.
        keep = slice(n) if bool(is_predicted[:n].all()) else is_predicted
        yield index, row[:-1][keep], targets[keep]


def blocks_for(
    model: torch.nn.Module,
    processing_class: PreTrainedTokenizerBase | None,
    rows: Rows,
    block_size: int,
    *,
    max_length: int | None = None,
    packing: bool = True,
) -> TokenBlocks:
    """
    Cut a text into blocks that fit the vocabulary and the positions of a model.

    Args:
        model (`torch.nn.Module`):
            Model whose embedding and `config.max_position_embeddings` are the limits.
        processing_class (`PreTrainedTokenizerBase`, *optional*):
            Tokenizer. Only needed for rows of text.
        rows (`Iterable`):
            Rows with `input_ids` or else `text`, or plain strings.
        block_size (`int`):
            Tokens a block.
        max_length (`int`, *optional*):
            Cut every row to this many tokens; used with `packing` only.
        packing (`bool`, *optional*, defaults to `True`):
            Join the rows into one stream; else each row is a block. An encoder-decoder reads pairs in any case.

    Raises:
        ArgumentError: If the rows cannot be used; see `cut`, `separate_rows` and `pair_blocks`.
    """
    # From the embedding: after a resize, or with padding to a multiple of 64, it is larger than the tokenizer.
    vocab_size = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    config: Any = model.config
    # Models with relative positions, and some that extrapolate without limit, lack this entry.
    limit = getattr(config, "max_position_embeddings", None)
    if getattr(config, "is_encoder_decoder", False):
        decoder = decoder_of(config, getattr(model, "generation_config", None))
        return pair_blocks(
            processing_class, rows, decoder, block_size=block_size, vocab_size=vocab_size, max_positions=limit
        )
    if not packing:
        return separate_rows(processing_class, rows, vocab_size, limit)
    return cut(token_stream(processing_class, rows, max_length), block_size, vocab_size, limit)


def recovery(base_loss: float, expert_loss: float, merged_loss: float) -> float:
    """
    Return the share of an expert's gain over the base that a merged model keeps.

    Args:
        base_loss (`float`): Loss of the base model on the expert's own domain, in nats a token.
        expert_loss (`float`): Loss of the expert there.
        merged_loss (`float`): Loss of the merged model there.

    Returns:
        `float`: 1 if the merged model is as good as the expert, 0 if only as good as the base, negative if worse than
        the base; NaN if the expert is no better than the base, because there is no gain to keep.
    """
    gain = base_loss - expert_loss
    return (base_loss - merged_loss) / gain if gain > 0 else math.nan
