"""Pairs of texts for encoder-decoders: the source that the encoder reads, and the target that the decoder predicts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from hf_frmerge.errors import ArgumentError
from hf_frmerge.evaluation.text.token_blocks import (
    IGNORED_LABEL,
    NO_TOKENIZER,
    Rows,
    TokenBlocks,
    check_vocabulary,
    row_tokens,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TARGETS = ("labels", "target")
"""Columns that may hold what is to be predicted: token ids or text."""


@dataclass(frozen=True)
class Decoder:
    """
    What a decoder needs besides tokens.

    Attributes:
        start: token that it begins with.
        padding: token in the place of those that are not predicted, as transformers puts it there.
    """

    start: int
    padding: int


def decoder_of(config: Any, generation: Any = None) -> Decoder:
    """
    Read from the configuration of an encoder-decoder what its decoder begins with.

    Args:
        config: Its `config`.
        generation (*optional*): Its `generation_config`, where newer checkpoints say it.

    Raises:
        ArgumentError: If neither says it.
    """
    stated = [getattr(each, "decoder_start_token_id", None) for each in (config, generation)]
    start = next((token for token in stated if isinstance(token, int)), None)
    if start is None:
        raise ArgumentError(
            f"The config of the encoder-decoder ({config.model_type}) does not say which token its decoder begins "
            "with. Set `decoder_start_token_id` in its config.json, as it was in training."
        )
    padding = getattr(config, "pad_token_id", None)
    return Decoder(start, padding if padding is not None else start)


def pair_blocks(
    processing_class: PreTrainedTokenizerBase | None,
    rows: Rows,
    decoder: Decoder,
    *,
    block_size: int,
    vocab_size: int,
    max_positions: int | None,
) -> TokenBlocks:
    """
    Make one block per pair: the decoder's tokens, each of which is predicted from the source and those before it.

    The target is the column `labels` (-100 where nothing is to be predicted) or `target`, tokens or text. Text without
    one is cut into pieces of `block_size` tokens, and the second half of each is predicted from the first.

    Args:
        processing_class (`PreTrainedTokenizerBase`, *optional*): Tokenizer. Only needed for text.
        rows (`Iterable`): Rows with `input_ids` or else `text`, or plain strings.
        decoder (`Decoder`): What the decoder begins with.
        block_size (`int`): Tokens of a piece of text.
        vocab_size (`int`): Size of the model's vocabulary.
        max_positions (`int`, *optional*): Longest source and target that the model takes; longer ones are cut.

    Raises:
        ArgumentError: If the rows hold neither text nor tokens, nothing to predict, or a token that is not in the
            vocabulary.
    """
    sources, tokens, labels, bounds, end, n_samples = [], [], [], list[tuple[int, int]](), 0, 0
    for number, row in enumerate(rows):
        n_samples += 1
        for whole_source, whole_target in _pairs(processing_class, row, number, block_size):
            source, target = whole_source[:max_positions], whole_target[:max_positions]
            if not len(source) or not bool((target != IGNORED_LABEL).any()):
                continue
            shown = target.masked_fill(target == IGNORED_LABEL, decoder.padding)
            sources.append(source)
            # What follows the last token of the target is not asked for, so that token is never read.
            tokens.append(torch.cat([torch.tensor([decoder.start]), shown]))
            labels.append(torch.cat([torch.tensor([IGNORED_LABEL]), target]))
            bounds.append((end, end + len(target) + 1))
            end += len(target) + 1
    if not sources:
        raise ArgumentError(
            f"The {n_samples} row(s) of the data hold nothing to predict: an encoder-decoder needs a text and a "
            f"column {' or '.join(TARGETS)}, or a text of two tokens or more. Check that the file is not empty."
        )
    blocks = TokenBlocks(
        torch.cat(tokens), torch.cat(labels), bounds, max(stop - start for start, stop in bounds), n_samples, sources
    )
    for each in (blocks.tokens, *sources):
        check_vocabulary(each, vocab_size)
    return blocks


def _pairs(
    processing_class: PreTrainedTokenizerBase | None, row: str | Mapping[str, Any], number: int, block_size: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the sources and targets of a row, int64."""
    tokens = torch.tensor(row_tokens(processing_class, row, number), dtype=torch.int64)
    stated = [row[name] for name in TARGETS if name in row] if isinstance(row, Mapping) else []
    if stated:
        yield tokens, _target_tokens(processing_class, stated[0], number)
        return
    for piece in tokens.split(block_size):
        half = len(piece) // 2
        yield piece[:half], piece[half:]


def _target_tokens(processing_class: PreTrainedTokenizerBase | None, target: Any, number: int) -> torch.Tensor:
    if isinstance(target, str):
        if processing_class is None:
            raise ArgumentError(NO_TOKENIZER)
        target = processing_class(text_target=target, verbose=False)["input_ids"]
    try:
        tokens = torch.as_tensor(target, dtype=torch.int64)
    except (TypeError, ValueError, RuntimeError):
        tokens = torch.zeros(1, 1)
    if tokens.dim() != 1:
        raise ArgumentError(
            f"Row {number} of the data needs text or a list of token ids in the column {' or '.join(TARGETS)}, found "
            f"{target!r:.60}."
        )
    return tokens
