"""Read the tokens of a `tokenizer.json`, and tell whether two tokenizers spell their tokens alike."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from hf_frmerge.checkpoints.folders import open_folder
from hf_frmerge.checkpoints.json_text import parse_json
from hf_frmerge.checkpoints.resolve import Source
from hf_frmerge.checkpoints.tensors.small_files import read_file
from hf_frmerge.errors import CheckpointError

TOKENIZER_FILE = "tokenizer.json"

# Steps that only write spaces as another character; that character is compared by itself.
_SPACES = {"Replace", "Prepend", "Strip", "Metaspace"}


@dataclass(frozen=True)
class TokenizerFile:
    """
    A `tokenizer.json`.

    Attributes:
        source: the model beside which it lies.
        content: its parsed JSON.
        ids: token -> id, added tokens among them.
    """

    source: Source
    content: Mapping[str, Any]
    ids: Mapping[str, int]

    @property
    def spelling(self) -> dict[str, object]:
        """What a token's text stands for: tokens of the same text mean the same in tokenizers of one spelling."""
        model = self.content["model"]
        steps = list(_steps(self.content.get("normalizer"))) + list(_steps(self.content.get("pre_tokenizer")))
        normalisers = list(_steps(self.content.get("normalizer")))
        spaces = [step.get("replacement") or step.get("content") for step in steps if step.get("type") in _SPACES]
        return {
            "kind of model": _kind(model),
            "byte-level": any(step.get("type") == "ByteLevel" for step in steps),
            "character for a space": next((mark for mark in spaces if mark == "▁"), None),
            "mark inside a word": model.get("continuing_subword_prefix"),
            "mark at the end of a word": model.get("end_of_word_suffix"),
            "normaliser": sorted({_name(step) for step in normalisers if step.get("type") not in _SPACES}),
        }


def read_tokenizer(source: Source) -> TokenizerFile | None:
    """
    Read the `tokenizer.json` beside a model; None if there is none.

    Raises:
        CheckpointError: If it is not what the tokenizers library writes.
    """
    folder = open_folder(source.path)
    try:
        if not folder.exists(TOKENIZER_FILE):
            return None
    except OSError as error:
        raise CheckpointError(f"{source.spec!r}: {TOKENIZER_FILE} could not be read: {error}.") from error
    return parse_tokenizer(source, read_file(folder, TOKENIZER_FILE, source.spec))


def parse_tokenizer(source: Source, content: bytes) -> TokenizerFile:
    """Parse a `tokenizer.json`; raise `CheckpointError` if it is not what the tokenizers library writes."""
    try:
        parsed = parse_json(content)
        vocabulary = parsed["model"]["vocab"]
        if isinstance(vocabulary, list):  # Unigram: [token, score], the id is the position
            vocabulary = {entry[0]: index for index, entry in enumerate(vocabulary)}
        ids = {**vocabulary, **{token["content"]: token["id"] for token in parsed.get("added_tokens", [])}}
        if not all(isinstance(place, int) and place >= 0 for place in ids.values()):
            raise ValueError("an id is no whole number")
    except (AttributeError, ValueError, KeyError, TypeError, IndexError) as error:
        raise CheckpointError(f"{source.spec!r}: {TOKENIZER_FILE} makes no sense: {error!r}.") from error
    return TokenizerFile(source, parsed, ids)


def moved_tokens(first: TokenizerFile, other: TokenizerFile) -> list[str]:
    """Return the tokens that both have, under different ids."""
    return [token for token, place in first.ids.items() if other.ids.get(token, place) != place]


def check_ids(tokenizer: TokenizerFile) -> None:
    """Raise `CheckpointError` if two tokens have one id, and so one row."""
    by_id: dict[int, str] = {}
    for token, place in tokenizer.ids.items():
        other = by_id.setdefault(place, token)
        if other != token:
            raise CheckpointError(
                f"{tokenizer.source.spec!r}: {TOKENIZER_FILE} gives the id {place} to {other!r} and to {token!r}. "
                "Take the file of the model that this one was made from."
            )


def check_same_spelling(first: TokenizerFile, other: TokenizerFile) -> None:
    """Raise `CheckpointError` if a text may be two tokens with different meanings in two tokenizers."""
    ours, theirs = first.spelling, other.spelling
    different = [f"{key}: {ours[key]} and {theirs[key]}" for key in ours if ours[key] != theirs[key]]
    if different:
        raise CheckpointError(
            f"The tokenizers of {first.source.spec!r} and {other.source.spec!r} write their tokens differently "
            f"({'; '.join(different)}), so equal texts are not equal tokens and rows cannot be matched. Merge models "
            "whose tokenizers come from one base, or leave one of the two out."
        )


def _kind(model: Mapping[str, Any]) -> str:
    if model.get("type"):
        return str(model["type"])
    return "Unigram" if isinstance(model["vocab"], list) else "BPE" if "merges" in model else "WordLevel"


def _steps(step: Any) -> Iterator[Mapping[str, Any]]:
    """Yield a step of a tokenizer and the steps in it."""
    if not isinstance(step, dict):
        return
    if step.get("type") != "Sequence":
        yield step
    for inner in (*step.get("normalizers", ()), *step.get("pretokenizers", ())):
        yield from _steps(inner)


def _name(step: Mapping[str, Any]) -> str:
    """Name a step with those of its settings that change letters."""
    settings = [key for key in ("lowercase", "strip_accents") if step.get(key)]
    return f"{step.get('type')}({', '.join(settings)})" if settings else str(step.get("type"))
