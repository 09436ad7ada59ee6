"""What of a model only its class tells: which tensors share their values, and which square weights lie transposed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class ModelStructure:
    """
    Facts about the class of a base model, for which it must be built (without weights).

    Attributes:
        tied: names in memory of the tensors that share their values with another; None if nothing tells.
        conv1d: paths in memory of the modules that keep their weight as `(n_in, n_out)`; None if nothing tells.
    """

    tied: frozenset[str] | None
    conv1d: frozenset[str] | None

    def ties(self, name: str) -> bool:
        """Whether a tensor is a tied one. Only the last two parts are compared: prefixes differ between classes."""
        return self.tied is None or leaf(name) in {leaf(each) for each in self.tied}

    def is_conv1d(self, module: str) -> bool | None:
        """Whether a module keeps its weight as `(n_in, n_out)`; None if nothing tells."""
        if self.conv1d is None:
            return None
        return any(f".{each}".endswith(f".{module}") or f".{module}".endswith(f".{each}") for each in self.conv1d)


UNKNOWN = ModelStructure(None, None)


def leaf(name: str) -> str:
    """Last two parts of a tensor's name, such as `"q_proj.weight"`."""
    return ".".join(name.split(".")[-2:])


def may_be_tied(name: str) -> bool:
    """Whether a tensor can be an embedding or an output layer: those are not in numbered layers."""
    return not any(part.isdigit() for part in name.split("."))


def may_be_conv1d(target: str, shapes: Mapping[str, Sequence[int]]) -> bool:
    """
    Whether the weight of a square linear layer can lie as `(n_in, n_out)`, as far as the tensors of the model tell.

    Such layers (transformers' `Conv1D`) always have a bias, and a class that has them has some that are not square,
    whose bias is as long as their rows.
    """
    return _bias_of(target) in shapes and any(
        len(shape) == 2 and shape[0] != shape[1] and tuple(shapes.get(_bias_of(name), ())) == (shape[1],)
        for name, shape in shapes.items()
    )


def _bias_of(weight: str) -> str:
    return weight.removesuffix("weight") + "bias"
