"""What the user chose: whose tokens the output has, and whose settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from hf_frmerge.checkpoints.resolve import Source
from hf_frmerge.checkpoints.vocabularies.tokenizer_file import TokenizerFile


@dataclass(frozen=True)
class TokenChoice:
    """
    Tokens and settings of the output.

    Attributes:
        holder: model whose tokenizer files the output gets, or at least starts from.
        settings: model whose chat template, special tokens and generation settings it gets.
        tokenizers: `tokenizer.json` of every model that has one and takes part.
        output: token -> id in the output.
        tokenizer_json: text of a tokenizer that no model has, joined from several.
        is_aligned: whether rows of embeddings are matched by token.
    """

    holder: Source
    settings: Source
    tokenizers: Mapping[Source, TokenizerFile] = field(default_factory=dict)
    output: Mapping[str, int] = field(default_factory=dict)
    tokenizer_json: str | None = None
    is_aligned: bool = False
