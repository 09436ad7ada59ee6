"""Text into tokens, and tokens into the blocks that models read."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from hf_frmerge.errors import ArgumentError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED_LABEL = -100  # what transformers and torch's cross entropy leave out

Rows = Iterable[str | Mapping[str, Any]]


@dataclass(frozen=True, eq=False)
class TokenBlocks:
    """
    A stream of tokens, cut into blocks that overlap by one token.

    Every token but the very first is predicted exactly once, with at most `block_size - 1` tokens of context.
    Prediction `t` is the one of token `t + 1`; block `i` makes the predictions `start(i), start(i) + 1, ...`.

    Attributes:
        tokens: `(M,)`, int64.
        block_size: tokens a block; the last may be shorter.
    """

    tokens: torch.Tensor
    block_size: int

    @property
    def n_predictions(self) -> int:
        """Tokens that are predicted: all but the first."""
        return len(self.tokens) - 1

    def start(self, index: int) -> int:
        """Return the first prediction of a block."""
        return index * (self.block_size - 1)

    def __len__(self) -> int:
        """Return the number of blocks."""
        return math.ceil(self.n_predictions / (self.block_size - 1))

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor]:
        """Return the number of a block and its tokens."""
        start = self.start(index)
        return index, self.tokens[start : start + self.block_size]


def token_stream(
    processing_class: PreTrainedTokenizerBase | None, rows: Rows, max_length: int | None = None
) -> torch.Tensor:
    """
    Join the tokens of all rows, in order and without a separator, as transformers' `run_clm` does.

    Args:
        processing_class (`PreTrainedTokenizerBase`, *optional*):
            Tokenizer. Only needed for rows of text.
        rows (`Iterable`):
            Rows with `input_ids` or else `text`, or plain strings.
        max_length (`int`, *optional*):
            Cut every row to this many tokens.

    Returns:
        `torch.Tensor`: `(M,)`, int64.

    Raises:
        ArgumentError: If the rows hold neither text nor tokens, or fewer than two tokens in all.
    """
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


def cut(tokens: torch.Tensor, block_size: int, vocab_size: int, max_positions: int | None) -> TokenBlocks:
    """
    Cut a stream into blocks that a model can read.

    Args:
        tokens (`torch.Tensor`): `(M,)`, int64.
        block_size (`int`): Tokens a block, at least 2.
        vocab_size (`int`): Entries of the model's vocabulary.
        max_positions (`int`, *optional*): Positions the model has, if they are limited; blocks are no longer.

    Raises:
        ArgumentError: If `block_size` is below 2, or a token is not in the vocabulary.
    """
    if block_size < 2:
        raise ArgumentError(f"`block_size` must be at least 2 (one token predicts the next), got {block_size}.")
    largest = int(tokens.max())
    if largest >= vocab_size:
        raise ArgumentError(
            f"The data holds token id {largest}, but the model's vocabulary has {vocab_size} entries: the tokenizer "
            "belongs to another model."
        )
    return TokenBlocks(tokens, min(block_size, max_positions or block_size))


def collate(items: list[tuple[int, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Pad on the right. Only the last block of a stream can be short, and causal attention never looks there."""
    blocks = [block for _, block in items]
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "index": torch.tensor([index for index, _ in items]),
        "input_ids": pad(blocks, batch_first=True, padding_value=0),
        "labels": pad(blocks, batch_first=True, padding_value=IGNORED_LABEL),
        "attention_mask": pad([torch.ones_like(block) for block in blocks], batch_first=True),
    }


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
