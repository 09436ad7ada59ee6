"""Facts about a model that its tensors do not show: tied tensors, and square weights that are stored transposed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ModelStructure:
    """
    Facts about the class of a base model. To learn them, the model must be built (without weights).

    Attributes:
        tied: names in memory of the tensors that share their values with another; None if unknown.
        conv1d: paths in memory of the modules that store their weight as `(n_in, n_out)`; None if unknown.
    """

    tied: frozenset[str] | None
    conv1d: frozenset[str] | None

    def ties(self, name: str) -> bool:
        """Whether a tensor may be tied; compares the last two parts of its name, since prefixes differ by class."""
        return self.tied is None or leaf(name) in {leaf(each) for each in self.tied}

    def is_conv1d(self, module: str) -> bool | None:
        """Whether a module stores its weight as `(n_in, n_out)`; None if unknown."""
        if self.conv1d is None:
            return None
        return any(f".{each}".endswith(f".{module}") or f".{module}".endswith(f".{each}") for each in self.conv1d)


UNKNOWN = ModelStructure(None, None)


def leaf(name: str) -> str:
    """Return the last two parts of a tensor's name, such as `"q_proj.weight"`."""
    return ".".join(name.split(".")[-2:])


def may_be_tied(name: str) -> bool:
    """Whether a tensor can be an embedding or an output layer: these do not belong to a numbered layer."""
    return not any(part.isdigit() for part in name.split("."))


def may_be_conv1d(target: str, shapes: Mapping[str, Sequence[int]]) -> bool:
    """
    Whether the weight of a square linear layer may be stored as `(n_in, n_out)`, judged by the model's tensors.

    Layers that store it so (transformers' `Conv1D`) always have a bias. A class with such layers also has some that
    are not square, and their bias is as long as a row of their weight.
    """
    return _bias_of(target) in shapes and any(
        len(shape) == 2 and shape[0] != shape[1] and tuple(shapes.get(_bias_of(name), ())) == (shape[1],)
        for name, shape in shapes.items()
    )


def stated_ties(config: Mapping[str, Any]) -> list[bool]:
    """Return what a `config.json` says of tying word embeddings, on the levels that say something."""
    own = [bool(config["tie_word_embeddings"])] if "tie_word_embeddings" in config else []
    return own + [stated for value in config.values() if isinstance(value, dict) for stated in stated_ties(value)]


def untying(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries that make a `config.json` tie no word embeddings, on any level that says something of it."""
    nested = {name: {**value, **untying(value)} for name, value in config.items()
              if isinstance(value, dict) and stated_ties(value)}  # fmt: skip
    return {**nested, "tie_word_embeddings": False}


def _bias_of(weight: str) -> str:
    return weight.removesuffix("weight") + "bias"
