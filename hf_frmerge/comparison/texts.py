"""The texts or images of a comparison: passages drawn by chance, some to choose scales on, others to report."""

# Shape suffixes: T = texts, M = predictions.

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_128

from hf_frmerge.errors import ArgumentError
from hf_frmerge.evaluation.text.images import content_of_image
from hf_frmerge.evaluation.text.token_blocks import Rows, row_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Split = Literal["validation", "test"]
SPLITS: tuple[Split, ...] = ("validation", "test")

VALIDATION_SHARE = 0.25
_PASSAGE = 400  # characters of a passage, about 100 tokens; longer texts are cut where a word ends
_LEAST = 4  # passages of a text that can be split

Reads = Literal["text", "labelled text", "images"]
"""What the models read: text of which they predict every token, or rows of which they predict the label."""

Row = str | Mapping[str, Any]


@dataclass(frozen=True)
class TextLosses:
    """
    Loss of one model on each text of one split of a domain.

    Attributes:
        sums: `(T,)`, float64, in nats.
        counts: `(T,)`, int64: tokens that were predicted, or 1 for a row with a label.
    """

    sums: NDArray[np.float64]
    counts: NDArray[np.int64]

    @property
    def mean(self) -> float:
        """Loss in nats a token, or a row."""
        return float(self.sums.sum() / self.counts.sum())


@dataclass(frozen=True)
class SplitTexts:
    """
    Texts of one split of a domain.

    Attributes:
        rows: the texts, in the order of the data.
        lengths: `(T,)`, tokens of each; all 1 for rows with a label, each of which is one prediction.
    """

    rows: tuple[Row, ...]
    lengths: NDArray[np.int64]
    reads: Reads

    @property
    def is_labelled(self) -> bool:
        """Whether every row is one prediction, of its label."""
        return self.reads != "text"

    @property
    def n_predictions(self) -> int:
        """Number of predictions: tokens but the very first, or rows."""
        return int(self.lengths.sum()) - (not self.is_labelled)

    def losses(self, log_probs_M: NDArray[np.float64]) -> TextLosses:
        """Sum the losses of predictions by text. Tokens follow each other text by text; the very first has no loss."""
        owners = np.repeat(np.arange(len(self.rows)), self.lengths)[0 if self.is_labelled else 1 :]
        sums = np.bincount(owners, weights=-log_probs_M, minlength=len(self.rows))
        return TextLosses(sums.astype(np.float64), np.bincount(owners, minlength=len(self.rows)))


def split_texts(
    name: str, data: Rows, tokenizer: PreTrainedTokenizerBase | None, *, max_tokens: int, seed: int, reads: Reads
) -> dict[Split, SplitTexts]:
    """
    Draw the texts of both splits of a domain.

    Texts longer than a passage are cut into passages. These are shuffled; the first quarter is for validation and the
    others for the test, until each has its share of `max_tokens`. No passage is in both.

    Args:
        name: Name of the domain, for the error.
        data: Rows with `text` or `input_ids`, or plain strings; with a label for classifiers; rows of images.
        tokenizer: Only needed for rows of text.
        max_tokens: Tokens of both splits together; 0 for all. An image counts as one.
        seed: Of the draw.
        reads: What the models read.

    Raises:
        ArgumentError: If there are too few passages to have both splits, or a row cannot be read.
    """
    rows = [part for row in data for part in _passages(row)] if reads == "text" else list(data)
    if len(rows) < _LEAST:
        found = "images" if reads == "images" else f"passages of about {_PASSAGE} characters"
        raise ArgumentError(
            f"The data {name!r} has {len(rows)} {found}, too few to choose scales on some and report the others. Give "
            f"{_LEAST} or more; differences of 2 % take some thousand tokens, or images."
        )
    order = np.random.default_rng(seed).permutation(len(rows))
    n_validation = max(1, round(VALIDATION_SHARE * len(rows)))
    parts = {"validation": order[:n_validation], "test": order[n_validation:]}
    shares = {"validation": VALIDATION_SHARE, "test": 1.0 - VALIDATION_SHARE}
    splits: dict[Split, SplitTexts] = {}
    for split in SPLITS:
        limit = shares[split] * max_tokens or np.inf
        lengths: dict[int, int] = {}
        for number in parts[split].tolist():
            if sum(lengths.values()) >= limit:
                break
            lengths[number] = 1 if reads == "images" else len(row_tokens(tokenizer, rows[number], number))
        chosen = sorted(number for number, length in lengths.items() if length)
        sizes = [lengths[number] if reads == "text" else 1 for number in chosen]
        splits[split] = SplitTexts(tuple(rows[number] for number in chosen), np.array(sizes), reads)
        if splits[split].n_predictions < 1:
            raise ArgumentError(f"The data {name!r} has hardly any token to predict in its {split} part: give more.")
    return splits


def digest_of(texts: Mapping[str, SplitTexts]) -> str:
    """Return a digest of the texts of one split, 32 hex digits."""
    state = xxh3_128()
    for name, split in texts.items():
        contents = [name.encode()]
        for number, row in enumerate(split.rows):
            contents.append(content_of_image(row, number) if split.reads == "images" else str(row).encode())
        for content in contents:
            state.update(f"{len(content)} ".encode() + content)
    return state.hexdigest()


def _passages(row: Row) -> Iterator[Row]:
    """Cut a long text into passages, which together are the text; rows of tokens stay whole."""
    text = row if isinstance(row, str) else row.get("text")
    if not isinstance(text, str) or len(text) <= 2 * _PASSAGE:
        yield row
        return
    start = 0
    while start < len(text):
        stop = start + _PASSAGE
        # A space belongs to the word after it, as tokenizers have it.
        stop = _next_space(text, stop) if len(text) - stop > _PASSAGE else len(text)
        yield text[start:stop]
        start = stop


def _next_space(text: str, start: int) -> int:
    """Return the place of the first white space from `start` on, or the end of the text."""
    places: Sequence[int] = [place for place in (text.find(space, start) for space in " \n") if place >= 0]
    return min(places, default=len(text))
