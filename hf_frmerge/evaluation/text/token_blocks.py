"""Text into tokens, and tokens into the blocks that models read."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
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
    Tokens, in blocks that a model reads each by itself.

    The first token of a block is only read; of the others those are predicted whose label is not `IGNORED_LABEL`.
    Predictions are numbered through all blocks, in order.

    Attributes:
        tokens: `(M,)`, int64.
        labels: `(M,)`, int64.
        bounds: first token of every block, and the one after its last; each block predicts something.
        block_size: tokens of the longest block.
        n_samples: rows of the dataset.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    bounds: Sequence[tuple[int, int]]
    block_size: int
    n_samples: int = 0

    @cached_property
    def positions(self) -> torch.Tensor:
        """Where in `tokens` the token of every prediction is, `(n_predictions,)`."""
        is_predicted = self.labels != IGNORED_LABEL
        return torch.cat([start + 1 + is_predicted[start + 1 : stop].nonzero()[:, 0] for start, stop in self.bounds])

    @cached_property
    def _starts(self) -> list[int]:
        first_tokens = torch.tensor([start + 1 for start, _ in self.bounds])
        return torch.searchsorted(self.positions, first_tokens).tolist()

    @property
    def n_predictions(self) -> int:
        """Tokens that are predicted."""
        return len(self.positions)

    @property
    def targets(self) -> torch.Tensor:
        """Tokens that are predicted, `(n_predictions,)`."""
        return self.tokens[self.positions]

    def start(self, index: int) -> int:
        """Return the first prediction of a block."""
        return self._starts[index]

    def context(self, prediction: int, n_tokens: int) -> torch.Tensor:
        """Return what a prediction was made from: the last `n_tokens` before it that are in its block."""
        position = int(self.positions[prediction])
        first, _ = self.bounds[bisect_right(self._starts, prediction) - 1]
        return self.tokens[max(first, position - n_tokens) : position]

    def __len__(self) -> int:
        """Return the number of blocks."""
        return len(self.bounds)

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor, torch.Tensor]:
        """Return the number of a block, its tokens and its labels."""
        start, stop = self.bounds[index]
        return index, self.tokens[start:stop], self.labels[start:stop]


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
        tokens += row_tokens(processing_class, row, number)[:max_length]
    if len(tokens) < 2:
        raise ArgumentError(
            f"The evaluation data has {len(tokens)} token(s) in all; at least 2 are needed, for the first is never "
            "scored. Check that the file or the dataset split is not empty."
        )
    return torch.tensor(tokens, dtype=torch.int64)


def cut(tokens: torch.Tensor, block_size: int, vocab_size: int, max_positions: int | None) -> TokenBlocks:
    """
    Cut a stream into blocks that a model can read, overlapping by one: every token but the first is predicted once.

    Args:
        tokens (`torch.Tensor`): `(M,)`, int64.
        block_size (`int`): Tokens a block, at least 2; each is predicted from at most `block_size - 1` before it.
        vocab_size (`int`): Entries of the model's vocabulary.
        max_positions (`int`, *optional*): Positions the model has, if they are limited; blocks are no longer.

    Raises:
        ArgumentError: If `block_size` is below 2, or a token is not in the vocabulary.
    """
    if block_size < 2:
        raise ArgumentError(f"`block_size` must be at least 2 (one token predicts the next), got {block_size}.")
    _check_vocabulary(tokens, vocab_size)
    size = min(block_size, max_positions or block_size)
    bounds = [(start, min(start + size, len(tokens))) for start in range(0, len(tokens) - 1, size - 1)]
    return TokenBlocks(tokens, tokens, bounds, size)


def separate_rows(
    processing_class: PreTrainedTokenizerBase | None, rows: Rows, vocab_size: int, max_positions: int | None
) -> TokenBlocks:
    """
    Make a block of every row: nothing is predicted from another row.

    What is to be predicted are the tokens themselves, or the column `labels` where there is one (-100 where nothing
    is); what the column `attention_mask` hides is not. Rows in which nothing is predicted are left out.

    Args:
        processing_class (`PreTrainedTokenizerBase`, *optional*): Tokenizer. Only needed for rows of text.
        rows (`Iterable`): Rows with `input_ids` or else `text`, or plain strings.
        vocab_size (`int`): Entries of the model's vocabulary.
        max_positions (`int`, *optional*): Positions the model has, if they are limited; rows are cut there.

    Raises:
        ArgumentError: If the rows hold neither text nor tokens, nothing to predict, or a token that is not in the
            vocabulary.
    """
    parts, bounds, end, n_samples = [], [], 0, 0
    for number, row in enumerate(rows):
        n_samples += 1
        tokens, labels = labelled_row(processing_class, row, number)
        tokens, labels = tokens[:max_positions], labels[:max_positions]
        if bool((labels[1:] != IGNORED_LABEL).any()):
            parts.append((tokens, labels))
            bounds.append((end, end + len(tokens)))
            end += len(tokens)
    if not parts:
        raise ArgumentError(
            f"The {n_samples} row(s) of the evaluation data hold nothing to predict: each needs at least 2 tokens, "
            "and a label other than -100 after the first. Check that the file or the dataset split is not empty."
        )
    tokens, labels = (torch.cat(column) for column in zip(*parts))
    _check_vocabulary(tokens, vocab_size)
    return TokenBlocks(tokens, labels, bounds, max(stop - start for start, stop in bounds), n_samples)


def labelled_row(
    processing_class: PreTrainedTokenizerBase | None, row: str | Mapping[str, Any], number: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tokens and labels of a row, `(T,)` int64 each, and check that they fit; `number` is for messages."""
    tokens = torch.tensor(row_tokens(processing_class, row, number), dtype=torch.int64)
    given = {} if isinstance(row, str) else row
    labels = torch.as_tensor(given["labels"], dtype=torch.int64) if "labels" in given else tokens
    if labels.shape != tokens.shape:
        raise ArgumentError(
            f"Row {number} of the evaluation data has labels of shape {tuple(labels.shape)} for {len(tokens)} tokens: "
            "a language model needs one a token."
        )
    if "attention_mask" in given:
        labels = labels.masked_fill(torch.as_tensor(given["attention_mask"]) == 0, IGNORED_LABEL)
    return tokens, labels


def collate(items: list[tuple[int, torch.Tensor, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Pad on the right, where causal attention never looks."""
    blocks, labels = [block for _, block, _ in items], [of_block for _, _, of_block in items]
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "index": torch.tensor([index for index, _, _ in items]),
        "input_ids": pad(blocks, batch_first=True, padding_value=0),
        "labels": pad(labels, batch_first=True, padding_value=IGNORED_LABEL),
        "attention_mask": pad([torch.ones_like(block) for block in blocks], batch_first=True),
    }


def row_tokens(
    processing_class: PreTrainedTokenizerBase | None, row: str | Mapping[str, Any], number: int
) -> list[int]:
    """Return the tokens of a row: its `input_ids`, or its text tokenised; `number` is for messages."""
    if not isinstance(row, str) and "input_ids" in row:
        return [int(token) for token in row["input_ids"]]
    text = text_of(row, number)
    if processing_class is None:
        raise ArgumentError("The evaluation data is text, so a tokenizer is needed: pass `processing_class`.")
    # verbose=False: the warning about texts longer than the model's context does not apply, they are cut.
    return processing_class(text, verbose=False)["input_ids"]


def text_of(row: str | Mapping[str, Any], number: int) -> str:
    """Return the text of a row; `number` is for messages."""
    text = row if isinstance(row, str) else row.get("text")
    if not isinstance(text, str):
        found = sorted(row) if isinstance(row, Mapping) else type(row).__name__
        raise ArgumentError(
            f"Row {number} of the evaluation data needs a column `text` (a string) or `input_ids`, found {found}. "
            "Rename the column, or tokenize the data first."
        )
    return text


def _check_vocabulary(tokens: torch.Tensor, vocab_size: int) -> None:
    largest = int(tokens.max())
    if largest >= vocab_size:
        raise ArgumentError(
            f"The data holds token id {largest}, but the model's vocabulary has {vocab_size} entries: the tokenizer "
            "belongs to another model."
        )
