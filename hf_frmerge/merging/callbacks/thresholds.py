"""Bounds on metrics, such as `effective_rank<0.9`: what a collapse guard and `frmerge evaluate --fail-on` share."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from hf_frmerge.errors import ArgumentError

_FORM = re.compile(r"\s*([^\s<>=]+)\s*([<>])\s*(\S+)\s*")
# Names that end like another metric's name, which a bound on that other one does not mean.
_WHOLE_NAMES = ("token_accuracy",)


@dataclass(frozen=True)
class Trip:
    """One value out of bounds: `where` (a tensor, a layer, a dataset), which value, and the bound it broke."""

    where: str
    name: str
    value: float
    bound: str

    def __str__(self) -> str:
        return f"{self.where}: {self.name} is {self.value:.4g} (guard: {self.bound})"


@dataclass(frozen=True)
class Threshold:
    """A metric is out of bounds `sign` (`"<"` or `">"`) of `bound`, or when it is not a number."""

    name: str
    sign: str
    bound: float

    def __str__(self) -> str:
        return f"{self.name}{self.sign}{self.bound:g}"

    def is_crossed_by(self, value: float) -> bool:
        """Whether `value` is out of bounds."""
        return math.isnan(value) or (value < self.bound if self.sign == "<" else value > self.bound)

    def find(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """
        Return the metrics this bound is about.

        The exact name comes first, then the name after the prefix `eval_`, then the same metric of every dataset:
        `perplexity` means `eval_math_perplexity` and `eval_code_perplexity` where several datasets were evaluated.
        """
        for name in (self.name, f"eval_{self.name}"):
            if name in metrics:
                return {name: metrics[name]}
        others = [whole for whole in _WHOLE_NAMES if whole != self.name and whole.endswith(f"_{self.name}")]
        return {
            name: value
            for name, value in metrics.items()
            if name.endswith(f"_{self.name}") and not any(name.endswith(whole) for whole in others)
        }

    def trips(self, metrics: Mapping[str, float], places: Mapping[str, str]) -> list[Trip]:
        """Return what is out of bounds, with the place that `places` knows for it or else `"evaluation"`."""
        return [
            Trip(places.get(name, "evaluation"), name, float(value), str(self))
            for name, value in self.find(metrics).items()
            if self.is_crossed_by(float(value))
        ]


def parse_threshold(text: str) -> Threshold:
    """
    Read a threshold.

    Args:
        text (`str`):
            `NAME<VALUE` or `NAME>VALUE`: the values that are *not* accepted.

    Raises:
        ArgumentError: If it has another form, or the value is no number.
    """
    match = _FORM.fullmatch(text)
    if match is not None:
        name, sign, number = match.groups()
        try:
            bound = float(number)
        except ValueError:
            bound = math.nan
        if not math.isnan(bound):
            return Threshold(name, sign, bound)
    raise ArgumentError(f"A threshold reads NAME<VALUE or NAME>VALUE, such as 'effective_rank<0.9', but got {text!r}.")
