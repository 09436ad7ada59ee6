"""What was made of the vocabularies of a merge whose models do not have the same, as the record keeps it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class ModelTokens:
    """
    Tokens of one model of a merge.

    Attributes:
        spec: the model as the user wrote it; in a record its Hub id, or the name of its folder.
        n_tokens: tokens of its tokenizer.
        n_rows: rows of its embeddings.
        n_filled: tokens of the output that it lacks, whose rows were filled in.
        n_dropped: tokens of it that the output does not have.
        dropped: the first of these.
    """

    spec: str
    n_tokens: int
    n_rows: int
    n_filled: int
    n_dropped: int
    dropped: tuple[str, ...]


@dataclass(frozen=True)
class VocabularyRecord:
    """
    What was made of the vocabularies of a merge whose models do not have the same.

    Attributes:
        source: `"base"`, `"union"`, or the number of an expert, from 1.
        n_tokens: tokens of the output.
        n_rows: rows of its embeddings.
        n_padding: rows that no model has, which hold the mean of the donor's rows.
        tensors: names of the tensors with a row for every token.
        models: the base if there is one, then the experts in order.
    """

    source: str
    n_tokens: int
    n_rows: int
    n_padding: int
    tensors: tuple[str, ...]
    models: tuple[ModelTokens, ...]

    @property
    def donor(self) -> str:
        """The model whose config the output gets."""
        return self.models[0].spec

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> VocabularyRecord:
        """Read it from JSON values."""
        models = tuple(ModelTokens(**{**each, "dropped": tuple(each["dropped"])}) for each in values["models"])
        return cls(**{**values, "tensors": tuple(values["tensors"]), "models": models})

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return asdict(self)
