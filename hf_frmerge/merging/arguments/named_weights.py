"""Names that stand for weights: they are computed from the experts when a merge is planned."""

from __future__ import annotations

from dataclasses import dataclass

from hf_frmerge.errors import ArgumentError
from hf_frmerge.merging.arguments.values import did_you_mean

SHAPES = ("uniform", "linear", "1-sqrt", "ema")
"""Weights of checkpoints of one training run, by step; see `weighting.checkpoint_soup`."""

NAN = "nan"
"""Weights by inverse norms of what the experts learned; see `weighting.norm_aware`."""

CONTINUAL = "continual"
"""The first expert is a merge, and counts as often as it has experts; see `weighting.continual`."""


@dataclass(frozen=True)
class NamedWeights:
    """
    Name of weights.

    Attributes:
        name: one of `SHAPES`, `NAN` or `CONTINUAL`.
        decay: number behind `ema:`, in (0, 1); 0 for the others.
    """

    name: str
    decay: float = 0.0


def is_name(weights: object) -> bool:
    """Whether what a user gave as weights is a name, and not a list of numbers or its text."""
    if not isinstance(weights, str) or "," in weights:
        return False
    try:
        return float(weights) != float(weights)  # "nan" reads as a number, too
    except ValueError:
        return True


def parse_name(text: str) -> NamedWeights:
    """
    Parse the name of weights: `uniform`, `linear`, `1-sqrt`, `ema:0.9`, `nan` or `continual`.

    Raises:
        ArgumentError: If it is none of these, or the number behind `ema:` is not between 0 and 1.
    """
    name, colon, number = text.strip().lower().partition(":")
    if name == "ema":
        try:
            decay = float(number)
        except ValueError:
            decay = 0.0
        if not 0 < decay < 1:
            raise ArgumentError(
                f"`weights` expects a number between 0 and 1 behind ema:, such as ema:0.9; got {text!r}."
            )
        return NamedWeights(name, decay)
    if colon or name not in (*SHAPES, NAN, CONTINUAL):
        raise ArgumentError(
            f"`weights` expects numbers, one per expert, or one of {', '.join(SHAPES[:3])}, ema:DECAY, {NAN}, "
            f"{CONTINUAL}; got {text!r}.{did_you_mean(name, (*SHAPES, NAN, CONTINUAL))}"
        )
    return NamedWeights(name)
