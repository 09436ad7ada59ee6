"""The prompts that a merge is fitted to: unlabelled text, some dozens of short pieces for every expert."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from hf_frmerge.errors import ArgumentError
from hf_frmerge.evaluation.text.datasets import read_texts
from hf_frmerge.evaluation.text.token_blocks import cut, row_tokens, separate_rows, text_of, token_stream
from hf_frmerge.merging.arguments.values import did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_PIECES = 4
_SHORTEST_PIECE = 8

# Text is read until there is this many times what is asked for: enough to choose from, however large a dataset is.
_SURPLUS = 8


@dataclass(frozen=True, eq=False)
class Prompts:
    """
    Prompts of one expert.

    Attributes:
        expert: position of the expert in the merge.
        token_ids: one array per prompt, `(T,)` int64, without padding, of two tokens or more.
        source: `"file"`, `"dataset"` (passed in Python), or `"self"` or `"self:chat"` (written by the expert).
        leading: tokens that stand before every text, which each piece of a text gets as well: what the tokenizer puts
            there, or the chat template.
    """

    expert: int
    token_ids: tuple[NDArray[np.int64], ...]
    source: str
    leading: tuple[int, ...] = ()

    @property
    def digest(self) -> str:
        """XXH3-128 of the prompts, in order, 32 hex digits; it does not depend on where they came from."""
        state = xxhash.xxh3_128()
        for ids in self.token_ids:
            state.update(len(ids).to_bytes(8, "little"))
            state.update(ids.astype("<i8").tobytes())
        return state.hexdigest()


def read_prompts(
    calibration: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    experts: Sequence[str],
    n_samples: int,
    max_length: int,
    seed: int,
    vocab_size: int,
    packing: bool = True,
) -> tuple[Prompts, ...]:
    """
    Read the prompts of every expert from files or datasets.

    Args:
        calibration (`str`, `Path`, `Iterable` or `Mapping`):
            Data for all experts, or data by expert. Data is a file that [`read_texts`] reads, a `datasets.Dataset`,
            or a list of texts or of token ids. A table has a column `input_ids` (with `attention_mask`, if it is
            padded), `text`, or a conversation: `messages`, or `prompt` with or without `completion`. The chat template
            is applied to conversations. Labels are not used.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): Only needed for rows of text.
        experts (`Sequence[str]`): The experts as the user wrote them, which are the keys of a mapping.
        n_samples (`int`): Prompts an expert. Fewer are used, and said, if the data has fewer.
        max_length (`int`): Tokens a prompt, at least 2.
        seed (`int`): Chooses the prompts, differently for each expert.
        vocab_size (`int`): Size of the experts' vocabulary.
        packing (`bool`, *optional*, defaults to `True`):
            Join the rows and cut them into prompts of `max_length` tokens, as for a language model. Otherwise each
            row, and each line of a text file, is one prompt, truncated.

    Returns:
        `tuple[Prompts, ...]`: In the order of the experts, without those for which there is no data.

    Raises:
        ArgumentError: If an expert is unknown, there is no data for any, a file or a row cannot be read, all text has
            fewer than two tokens, or a token is not in the vocabulary.
    """
    by_expert = _by_expert(calibration, experts)
    reader = _Reader(tokenizer, n_samples, max_length, seed, vocab_size, packing)
    pieces: dict[int, list[NDArray[np.int64]]] = {}
    prompts = []
    for number, name in enumerate(experts):
        if name not in by_expert:
            logger.warning("The expert %r has no prompts: it counts through its weights alone.", name)
            continue
        data = by_expert[name]
        if id(data) not in pieces:  # all experts may share one dataset
            try:
                pieces[id(data)] = reader.pieces(data)
            except ArgumentError as error:
                raise ArgumentError(f"The prompts of the expert {name!r} cannot be used. {error}") from error
        blocks = pieces[id(data)]
        if len(blocks) < n_samples:
            logger.warning(
                "The expert %r has %d prompt%s of up to %d tokens, fewer than the %d asked for.",
                name, len(blocks), "" if len(blocks) == 1 else "s", max_length, n_samples,
            )  # fmt: skip
        chosen = _spread(len(blocks), n_samples, np.random.default_rng([seed, number]))
        source = "file" if isinstance(data, (str, Path)) else "dataset"
        prompts.append(Prompts(number, tuple(blocks[place] for place in chosen), source, reader.leading))
    return tuple(prompts)


def leading_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the tokens that a tokenizer puts before every text, such as Llama's `<s>`; most have none."""
    word = tokenizer("a", add_special_tokens=False)["input_ids"]
    text = tokenizer("a")["input_ids"]
    starts = [place for place in range(len(text)) if text[place : place + len(word)] == word]
    return tuple(text[: starts[0]]) if starts else ()


def with_more_beginnings(prompts: Prompts) -> Prompts:
    """
    Cut every second prompt into four pieces.

    A merge has to find out from its text whose it is, and the fit must show it how, but a prompt has one beginning
    only. With as many tokens in all, prompts cut like this leave a fifth to a quarter less of the distance to experts.
    """
    pieces: list[NDArray[np.int64]] = []
    for place, ids in enumerate(prompts.token_ids):
        body = ids[len(prompts.leading) :]
        if place % 2 == 0 or len(body) < _PIECES * _SHORTEST_PIECE:
            pieces.append(ids)
            continue
        begin = np.array(prompts.leading, ids.dtype)
        pieces += [np.concatenate([begin, part]) for part in np.array_split(body, _PIECES)]
    return replace(prompts, token_ids=tuple(pieces))


def split_prompts(
    prompts: Sequence[Prompts], fraction: float, seed: int
) -> tuple[tuple[Prompts, ...], tuple[Prompts, ...]]:
    """
    Split the prompts of every expert into those to fit and those to judge by.

    Args:
        prompts (`Sequence[Prompts]`): Prompts of the experts.
        fraction (`float`): Share to judge by, in `[0, 1)`; at least one of four prompts or more, none of fewer.
        seed (`int`): Chooses them.

    Returns:
        Prompts to fit and prompts to judge by, both in the order given. An expert with fewer than four prompts has
        none to judge by.
    """
    fitted: list[Prompts] = []
    held_out: list[Prompts] = []
    for own in prompts:
        n_prompts = len(own.token_ids)
        n_held_out = max(1, round(fraction * n_prompts)) if n_prompts >= 4 else 0
        rng = np.random.default_rng([seed, own.expert])
        is_held_out = np.isin(np.arange(n_prompts), rng.permutation(n_prompts)[:n_held_out])
        for part, keep in ((fitted, ~is_held_out), (held_out, is_held_out)):
            if keep.any():
                part.append(replace(own, token_ids=tuple(own.token_ids[place] for place in keep.nonzero()[0])))
    return tuple(fitted), tuple(held_out)


def _by_expert(calibration: Any, experts: Sequence[str]) -> dict[str, Any]:
    """Return the data of every expert that has any."""
    by_expert = dict(calibration) if isinstance(calibration, Mapping) else dict.fromkeys(experts, calibration)
    for name in by_expert:
        if name not in experts:
            raise ArgumentError(
                f"There are prompts for {name!r}, which is none of the experts {', '.join(map(repr, experts))}. Name "
                f"an expert exactly as in the list of experts.{did_you_mean(str(name), experts)}"
            )
    if not by_expert:
        raise ArgumentError("There are no prompts for any expert: name a file or a dataset for at least one.")
    return by_expert


def _spread(n_pieces: int, n_samples: int, rng: np.random.Generator) -> Iterable[int]:
    """Choose one piece at random from each of `n_samples` equal parts of the text."""
    if n_pieces <= n_samples:
        return range(n_pieces)
    edges = np.linspace(0, n_pieces, n_samples + 1).astype(int)
    return rng.integers(edges[:-1], edges[1:])


@dataclass(frozen=True)
class _Reader:
    """Read pieces of text of one kind; the fields are arguments of `read_prompts`."""

    tokenizer: PreTrainedTokenizerBase | None
    n_samples: int
    max_length: int
    seed: int
    vocab_size: int
    packing: bool

    def pieces(self, data: Any) -> list[NDArray[np.int64]]:
        """
        Return more prompts than are needed, if there are more, from rows all over the data.

        Raises:
            ArgumentError: If the data cannot be read, or used.
        """
        rows = [{"input_ids": ids} for ids in self._token_rows(self._rows(data))]
        if self.packing:
            length = max(self.max_length - len(self.leading), 2)
            blocks = cut(token_stream(None, rows), length, self.vocab_size, None)
        else:
            blocks = separate_rows(None, rows, self.vocab_size, self.max_length)
            if len(blocks) < len(rows):
                n_short = len(rows) - len(blocks)
                logger.warning("%d of %d texts have fewer than two tokens: they are left out.", n_short, len(rows))
        pieces = [blocks[place].tokens.numpy() for place in range(len(blocks))]
        return [self._led(ids) for ids in pieces] if self.packing else pieces

    @cached_property
    def leading(self) -> tuple[int, ...]:
        """Tokens that come before every text."""
        return leading_tokens(self.tokenizer) if self.tokenizer is not None else ()

    def _led(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return a block with the leading tokens, which one from the middle of a text lacks."""
        n_leading = len(self.leading)
        return ids if tuple(ids[:n_leading]) == self.leading else np.concatenate([np.array(self.leading), ids])

    def _rows(self, data: Any) -> Iterable[tuple[int, Any]]:
        """Yield number and row in random order; those of a stream, whose length is not known, in its own."""
        if isinstance(data, (str, Path)):
            data = read_texts(data)
            if not self.packing and isinstance(data, list):
                data = data[0].splitlines()
        if not isinstance(data, Iterable) or isinstance(data, Iterator):
            raise ArgumentError(
                f"Expected a file, a dataset or a list of texts, which can be read more than once, but got "
                f"{type(data).__name__}."
            )
        if not isinstance(data, Sized) or not hasattr(data, "__getitem__"):
            return enumerate(data)
        order = np.random.default_rng(self.seed).permutation(len(data)).tolist()
        return ((place, data[place]) for place in order)

    def _token_rows(self, rows: Iterable[tuple[int, Any]]) -> Iterator[list[int]]:
        """Yield the tokens of rows until there are enough."""
        missing = _SURPLUS * self.n_samples * (self.max_length if self.packing else 1)
        for number, row in rows:
            ids = self._tokens(row, number)
            yield ids
            missing -= len(ids) if self.packing else 1
            if missing <= 0:
                return

    def _tokens(self, row: Any, number: int) -> list[int]:
        """Return the tokens of a row, without padding; none if it has no text. `number` is for error messages."""
        if isinstance(row, Iterable) and not isinstance(row, (str, Mapping)):
            row = {"input_ids": row}
        if isinstance(row, Mapping) and "input_ids" in row:
            ids = row_tokens(None, row, number)
            mask = row.get("attention_mask")
            return ids if mask is None else [token for token, is_real in zip(ids, mask) if is_real]
        if self.tokenizer is None:
            raise ArgumentError("They are text, and there is no tokenizer: give one, or token ids.")
        text, is_complete = self._text(row, number)
        if not text.strip():
            return []  # a tokenizer that adds special tokens would make a prompt of it
        encoded = self.tokenizer(
            text,
            add_special_tokens=not is_complete,
            truncation=not self.packing,
            max_length=None if self.packing else self.max_length,
            verbose=False,  # no warning about texts longer than the model's context: they are cut into pieces
        )
        return list(encoded["input_ids"])

    def _text(self, row: Any, number: int) -> tuple[str, bool]:
        """Return the text of a row, and whether it has its special tokens: the chat template puts them in."""
        if not isinstance(row, Mapping) or "text" in row or not row.keys() & {"messages", "prompt"}:
            return text_of(row, number), False
        columns = ("messages",) if "messages" in row else ("prompt", "completion")
        parts = [row[column] for column in columns if row.get(column) is not None]
        if parts and all(isinstance(part, str) for part in parts):
            return "".join(parts), False
        assert self.tokenizer is not None  # `_tokens` looks
        try:
            messages = [message for part in parts for message in part]
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=messages[-1]["role"] == "user"
            )
        except Exception as error:  # templates are programs, which may raise anything
            raise ArgumentError(
                f"The chat template cannot be applied to row {number}, {', '.join(columns)} ({error}). A conversation "
                "is a list of messages, each with a `role` and a `content`, and the tokenizer needs a chat template. "
                "Otherwise give a column `text`."
            ) from error
        return str(text), True
