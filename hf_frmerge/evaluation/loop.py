"""Loss, perplexity and token accuracy of causal language models, run through Accelerate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from hf_frmerge.errors import ArgumentError

IGNORED_LABEL = -100  # what transformers and torch's cross entropy leave out


@dataclass(frozen=True)
class LanguageModelMetrics:
    """How well a causal language model predicts a text."""

    loss: float  # mean negative log-likelihood, in nats a token
    perplexity: float  # exp(loss)
    token_accuracy: float  # share of tokens that were the model's first guess
    n_tokens: int  # tokens scored


@dataclass(frozen=True)
class _BlockScore:
    """What one block contributes. `index` tells the copies apart that distributed sampling adds."""

    index: int
    loss_sum: float
    n_correct: int
    n_tokens: int


def evaluate_causal_lm(
    model: torch.nn.Module,
    processing_class: PreTrainedTokenizerBase | None,
    dataset: Iterable[str | Mapping[str, Any]],
    *,
    batch_size: int = 8,
    max_length: int | None = None,
    block_size: int = 256,
    accelerator: Accelerator | None = None,
    on_prediction_step: Callable[[DataLoader], None] | None = None,
) -> LanguageModelMetrics:
    r"""
    Measure how well a causal language model predicts a text.

    The rows are joined in order, without a separator, into one stream of `M` tokens, as in transformers' `run_clm`,
    and cut into blocks that overlap by one token: every token but the very first is scored exactly once, with at most
    `block_size - 1` tokens of context. The log-softmax is taken in float32, whatever the model's dtype, and sums are
    float64 in the order of the text, so neither the batch size nor the number of processes changes the result beyond
    the rounding of the model itself. Logits live for one batch only.

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
            Tokens a block. A model with fewer positions gets blocks of as many tokens as it has positions.
        accelerator (`accelerate.Accelerator`, *optional*):
            Defaults to a new one. Every process of a distributed run must call this function; all get the result.
        on_prediction_step (`Callable[[DataLoader], None]`, *optional*):
            Called after every batch with the dataloader, whose `len` is the number of batches on this process.

    Returns:
        `LanguageModelMetrics`: loss in nats a token, perplexity, token accuracy, and the number of tokens scored.

    Raises:
        ArgumentError: If the rows hold neither text nor tokens, fewer than two tokens in all, or token ids beyond the
            model's vocabulary.
    """
    stream = _token_stream(processing_class, dataset, max_length)
    block_size = _block_size_that_fits(model, stream, block_size)
    blocks = [stream[start : start + block_size] for start in range(0, len(stream) - 1, block_size - 1)]

    accelerator = accelerator or Accelerator()
    items: Any = list(enumerate(blocks))  # torch takes any sequence for a dataset; its annotations do not
    loader = accelerator.prepare_data_loader(DataLoader(items, batch_size=batch_size, collate_fn=_collate))
    if getattr(model, "hf_device_map", None) is None:
        model.to(accelerator.device)
    was_training = model.training
    model.eval()
    scores: list[_BlockScore] = []
    with torch.inference_mode():
        for batch in loader:
            scores += _score_batch(model, batch)
            if on_prediction_step is not None:
                on_prediction_step(loader)
    model.train(was_training)

    # Processes get equally many batches, for which Accelerate repeats some blocks: keep one of each, in text order.
    unique = {score.index: score for score in gather_object(scores)}
    ordered = [unique[index] for index in range(len(blocks))]
    n_tokens = sum(score.n_tokens for score in ordered)
    loss = math.fsum(score.loss_sum for score in ordered) / n_tokens
    return LanguageModelMetrics(
        loss=loss,
        perplexity=float(np.exp(loss)),  # inf, not OverflowError, for a hopeless model
        token_accuracy=sum(score.n_correct for score in ordered) / n_tokens,
        n_tokens=n_tokens,
    )


def recovery(base_loss: float, expert_loss: float, merged_loss: float) -> float:
    """
    Return the share of an expert's gain over the base that a merged model keeps.

    Args:
        base_loss (`float`): Loss of the base model on the expert's own domain, in nats a token.
        expert_loss (`float`): Loss of the expert there.
        merged_loss (`float`): Loss of the merged model there.

    Returns:
        `float`: 1 if the merged model is as good as the expert, 0 if only as good as the base, negative if worse than
        the base; NaN if the expert is no better than the base, for then there is nothing to keep.
    """
    gain = base_loss - expert_loss
    return (base_loss - merged_loss) / gain if gain > 0 else math.nan


def _token_stream(
    processing_class: PreTrainedTokenizerBase | None, rows: Iterable[str | Mapping[str, Any]], max_length: int | None
) -> torch.Tensor:
    """Join the tokens of all rows, `(M,)` int64."""
    tokens: list[int] = []
    for number, row in enumerate(rows):
        if not isinstance(row, str) and "input_ids" in row:
            row_tokens = [int(token) for token in row["input_ids"]]
        else:
            row_tokens = _tokenize(processing_class, row, number)
        tokens += row_tokens[:max_length]
    if len(tokens) < 2:
        raise ArgumentError(
            f"The evaluation data has {len(tokens)} token(s) in all; at least 2 are needed, for the first is never "
            "scored. Check that the file or the dataset split is not empty."
        )
    return torch.tensor(tokens, dtype=torch.int64)


def _tokenize(
    processing_class: PreTrainedTokenizerBase | None, row: str | Mapping[str, Any], number: int
) -> list[int]:
    text = row if isinstance(row, str) else row.get("text")
    if not isinstance(text, str):
        found = sorted(row) if isinstance(row, Mapping) else type(row).__name__
        raise ArgumentError(
            f"Row {number} of the evaluation data needs a column `text` (a string) or `input_ids`, found {found}. "
            "Rename the column, or tokenize the data first."
        )
    if processing_class is None:
        raise ArgumentError("The evaluation data is text, so a tokenizer is needed: pass `processing_class`.")
    # verbose=False: the warning about texts longer than the model's context does not apply, they are cut below.
    return processing_class(text, verbose=False)["input_ids"]


def _block_size_that_fits(model: torch.nn.Module, stream: torch.Tensor, block_size: int) -> int:
    """Limit the block to the model's positions, and refuse tokens it has no embedding for."""
    if block_size < 2:
        raise ArgumentError(f"`block_size` must be at least 2 (one token predicts the next), got {block_size}.")
    vocab_size = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    largest = int(stream.max())
    if largest >= vocab_size:
        raise ArgumentError(
            f"The data holds token id {largest}, but the model's vocabulary has {vocab_size} entries: the tokenizer "
            "belongs to another model."
        )
    # Models with relative positions, and those that extrapolate without limit, have no such entry.
    return min(block_size, getattr(model.config, "max_position_embeddings", None) or block_size)


def _collate(items: list[tuple[int, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Pad on the right. Only the last block of a stream can be short, and causal attention never looks there."""
    blocks = [block for _, block in items]
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "index": torch.tensor([index for index, _ in items]),
        "input_ids": pad(blocks, batch_first=True, padding_value=0),
        "labels": pad(blocks, batch_first=True, padding_value=IGNORED_LABEL),
        "attention_mask": pad([torch.ones_like(block) for block in blocks], batch_first=True),
    }


def _score_batch(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> list[_BlockScore]:
    """Run one batch and reduce its logits, `(B, T, V)`, to one score a block."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    scores = []
    # Row by row: the float32 copy of all logits would take more memory than a small model itself.
    for index, row, labels in zip(batch["index"].tolist(), logits, batch["labels"].to(logits.device)):
        targets = labels[1:]
        row_logits = row[:-1].float()
        losses = cross_entropy(row_logits, targets, reduction="none", ignore_index=IGNORED_LABEL)
        scores.append(
            _BlockScore(
                index=index,
                # To the CPU first: not every device knows float64.
                loss_sum=float(losses.cpu().double().sum()),
                n_correct=int((row_logits.argmax(dim=-1) == targets).sum()),  # an ignored label equals no guess
                n_tokens=int((targets != IGNORED_LABEL).sum()),
            )
        )
    return scores
