"""Tokenize text, and cut the tokens into blocks for a model to read."""

from __future__ import annotations

import operator
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from hf_frmerge.errors import ArgumentError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED_LABEL = -100  # transformers and torch's cross entropy skip it

Rows = Iterable[str | Mapping[str, Any]]

NO_TOKENIZER = (
    "The data is text, and there is no tokenizer beside the model. Copy the tokenizer of an expert there, pass it as "
    "`processing_class`, or give token ids (a column input_ids)."
)


@dataclass(frozen=True, eq=False)
class Block:
    """Number of a block, its tokens and labels, both `(T,)` int64, and for an encoder its source, `(S,)` int64."""

    index: int
    tokens: torch.Tensor
    labels: torch.Tensor
    source: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class TokenBlocks:
    """
    Tokens of a text in blocks, each of which a model reads independently.

    The first token of a block is context only. Every other token is predicted if its label is not `IGNORED_LABEL`.
    Predictions are numbered consecutively over all blocks.

    Attributes:
        tokens: `(M,)`, int64.
        labels: `(M,)`, int64; `IGNORED_LABEL` where the token is not predicted.
        bounds: range `[start, stop)` of every block in `tokens`; each block has at least one prediction.
        block_size: tokens of the longest block.
        n_samples: rows of the dataset; 0 if they were joined into one stream.
        sources: for an encoder-decoder, what the encoder reads for every block, `(S,)` int64; the tokens are then the
            decoder's.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    bounds: Sequence[tuple[int, int]]
    block_size: int
    n_samples: int = 0
    sources: Sequence[torch.Tensor] = ()

    @cached_property
    def positions(self) -> torch.Tensor:
        """Positions in `tokens` of the predicted tokens, `(n_predictions,)`, int64."""
        is_predicted = self.labels != IGNORED_LABEL
        return torch.cat([start + 1 + is_predicted[start + 1 : stop].nonzero()[:, 0] for start, stop in self.bounds])

    @cached_property
    def _starts(self) -> list[int]:
        first_tokens = torch.tensor([start + 1 for start, _ in self.bounds])
        return torch.searchsorted(self.positions, first_tokens).tolist()

    @property
    def n_predictions(self) -> int:
        """Number of predicted tokens."""
        return len(self.positions)

    @property
    def targets(self) -> torch.Tensor:
        """Predicted tokens, `(n_predictions,)`, int64."""
        return self.tokens[self.positions]

    def start(self, index: int) -> int:
        """Return the number of the first prediction of a block."""
        return self._starts[index]

    def context(self, prediction: int, n_tokens: int) -> torch.Tensor:
        """Return the context of a prediction: the last `n_tokens` tokens before it within its block."""
        position = int(self.positions[prediction])
        first, _ = self.bounds[bisect_right(self._starts, prediction) - 1]
        return self.tokens[max(first, position - n_tokens) : position]

    def __len__(self) -> int:
        """Return the number of blocks."""
        return len(self.bounds)

    def __getitem__(self, index: int) -> Block:
        """Return a block."""
        start, stop = self.bounds[index]
        source = self.sources[index] if self.sources else None
        return Block(index, self.tokens[start:stop], self.labels[start:stop], source)


def token_stream(
    processing_class: PreTrainedTokenizerBase | None, rows: Rows, max_length: int | None = None
) -> torch.Tensor:
    """
    Tokenize all rows and join them in order, without a separator, as transformers' `run_clm` does.

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
            f"The data has {len(tokens)} token(s) in all; at least 2 are needed, for the first is never "
            "scored. Check that the file or the dataset split is not empty."
        )
    return torch.tensor(tokens, dtype=torch.int64)


def cut(tokens: torch.Tensor, block_size: int, vocab_size: int, max_positions: int | None) -> TokenBlocks:
    """
    Cut a stream into blocks that overlap by one token, so that every token but the first is predicted once.

    Args:
        tokens (`torch.Tensor`): `(M,)`, int64.
        block_size (`int`): Tokens a block, at least 2. A token has at most `block_size - 1` tokens of context.
        vocab_size (`int`): Size of the model's vocabulary.
        max_positions (`int`, *optional*): Longest input the model takes, if it has a limit; it caps the block size.

    Raises:
        ArgumentError: If `block_size` is below 2, or a token is not in the vocabulary.
    """
    if block_size < 2:
        raise ArgumentError(f"`block_size` must be at least 2 (one token predicts the next), got {block_size}.")
    check_vocabulary(tokens, vocab_size)
    size = min(block_size, max_positions or block_size)
    # The last token of a block is the context-only first token of the next.
    bounds = [(start, min(start + size, len(tokens))) for start in range(0, len(tokens) - 1, size - 1)]
    return TokenBlocks(tokens, tokens, bounds, size)


def separate_rows(
    processing_class: PreTrainedTokenizerBase | None, rows: Rows, vocab_size: int, max_positions: int | None
) -> TokenBlocks:
    """
    Make one block per row, so that no token is predicted from another row.

    Labels are the column `labels` if there is one (-100 where nothing is to be predicted), else the tokens. Tokens
    masked by the column `attention_mask` are not predicted. Rows without any prediction are skipped.

    Args:
        processing_class (`PreTrainedTokenizerBase`, *optional*): Tokenizer. Only needed for rows of text.
        rows (`Iterable`): Rows with `input_ids` or else `text`, or plain strings.
        vocab_size (`int`): Size of the model's vocabulary.
        max_positions (`int`, *optional*): Longest input the model takes, if it has a limit; longer rows are truncated.

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
            f"The {n_samples} row(s) of the data hold nothing to predict: each needs at least 2 tokens, "
            "and a label other than -100 after the first. Check that the file or the dataset split is not empty."
        )
    tokens, labels = (torch.cat(column) for column in zip(*parts))
    check_vocabulary(tokens, vocab_size)
    return TokenBlocks(tokens, labels, bounds, max(stop - start for start, stop in bounds), n_samples)


def labelled_row(
    processing_class: PreTrainedTokenizerBase | None, row: str | Mapping[str, Any], number: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Return tokens and labels of a row, `(T,)` int64 each.

    Args:
        processing_class (`PreTrainedTokenizerBase`, *optional*): Tokenizer. Only needed for text.
        row (`str` or `Mapping`): Text, or columns `input_ids` or `text`, and optionally `labels`, `attention_mask`.
        number (`int`): Number of the row, for error messages.

    Raises:
        ArgumentError: If there is neither text nor tokens, or not one label per token.
    """
    tokens = torch.tensor(row_tokens(processing_class, row, number), dtype=torch.int64)
    fields = {} if isinstance(row, str) else row
    labels = torch.as_tensor(fields["labels"], dtype=torch.int64) if "labels" in fields else tokens
    if labels.shape != tokens.shape:
        raise ArgumentError(
            f"Row {number} of the data has labels of shape {tuple(labels.shape)} for {len(tokens)} tokens: "
            "a language model needs one a token."
        )
    if "attention_mask" in fields:
        labels = labels.masked_fill(torch.as_tensor(fields["attention_mask"]) == 0, IGNORED_LABEL)
    return tokens, labels


def collate(items: list[Block]) -> dict[str, torch.Tensor]:
    """
    Stack blocks into a batch, padded on the right, where causal attention never looks.

    Returns:
        `index` `(B,)`; `input_ids`, `labels` and `attention_mask`, `(B, T)` each; int64. With sources, these are
        `input_ids` and `attention_mask`, and the tokens `decoder_input_ids` and `decoder_attention_mask`.
    """
    batch = {
        "index": torch.tensor([item.index for item in items]),
        "labels": _stacked([item.labels for item in items], IGNORED_LABEL),
    }
    read = [("", [item.tokens for item in items])]
    sources = [item.source for item in items if item.source is not None]
    if sources:
        read = [("", sources), ("decoder_", read[0][1])]
    for prefix, blocks in read:
        # Any valid id will do for the padding: mask and labels exclude it.
        batch[f"{prefix}input_ids"] = _stacked(blocks, 0)
        batch[f"{prefix}attention_mask"] = _stacked([torch.ones_like(block) for block in blocks], 0)
    return batch


def _stacked(rows: list[torch.Tensor], padding: int) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=padding)


def row_tokens(
    processing_class: PreTrainedTokenizerBase | None, row: str | Mapping[str, Any], number: int
) -> list[int]:
    """Return the tokens of a row, from `input_ids` or by tokenizing its text; `number` is for error messages."""
    if not isinstance(row, str) and "input_ids" in row:
        try:
            return [operator.index(token) for token in row["input_ids"]]
        except TypeError as error:  # for example a table of text, such as .csv, which has lists as text
            raise ArgumentError(
                f"Row {number} of the data needs a list of token ids in the column `input_ids`, found "
                f"{row['input_ids']!r:.60}. Keep tokens in .jsonl, .json or .parquet, one list a row."
            ) from error
    text = text_of(row, number)
    if processing_class is None:
        raise ArgumentError(NO_TOKENIZER)
    # verbose=False: no warning about texts longer than the model's context, because they are cut into blocks.
    return processing_class(text, verbose=False)["input_ids"]


def text_of(row: str | Mapping[str, Any], number: int) -> str:
    """Return the text of a row; `number` is for error messages."""
    text = row if isinstance(row, str) else row.get("text")
    if not isinstance(text, str):
        columns = sorted(row) if isinstance(row, Mapping) else type(row).__name__
        raise ArgumentError(
            f"Row {number} of the data needs a column `text` (a string) or `input_ids`, found {columns}. "
            "Rename the column, or tokenize the data first."
        )
    return text


def check_vocabulary(tokens: torch.Tensor, vocab_size: int) -> None:
    """Raise `ArgumentError` if a token is not in the vocabulary."""
    # Here, because an index out of range is a device-side assert on a GPU, after which no call succeeds any more.
    for token in (int(tokens.min()), int(tokens.max())):
        if not 0 <= token < vocab_size:
            raise ArgumentError(
                f"The data holds token id {token}, but the model's vocabulary has {vocab_size} entries: the tokenizer "
                "belongs to another model."
            )
