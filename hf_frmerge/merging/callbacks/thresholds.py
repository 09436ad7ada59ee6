"""Bounds on metrics, such as `effective_rank<0.9`, for the collapse guard and for `frmerge evaluate --fail-on`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from hf_frmerge.errors import ArgumentError

_FORM = re.compile(r"\s*([^\s<>=]+)\s*([<>])\s*(\S+)\s*")
# Metrics whose name ends in that of another metric: a bound on `accuracy` must not apply to `token_accuracy`.
_WHOLE_NAMES = ("token_accuracy",)


@dataclass(frozen=True)
class Trip:
    """One value out of bounds: `where` (a tensor, a layer, a dataset), its name, the value and the bound."""

    where: str
    name: str
    value: float
    bound: str

    def __str__(self) -> str:
        return f"{self.where}: {self.name} is {self.value:.4g} (guard: {self.bound})"


@dataclass(frozen=True)
class Threshold:
    """Bound on a metric: a value is out of bounds if it is `sign` (`"<"` or `">"`) `bound`, or NaN."""

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
        Return the metrics this bound applies to.

        That is the metric of exactly this name; else the one with the prefix `eval_`; else the metric of every
        dataset: `perplexity` applies to `eval_math_perplexity` and `eval_code_perplexity`.
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
        """Return the values out of bounds, each with its place from `places`, else `"evaluation"`."""
        return [
            Trip(places.get(name, "evaluation"), name, float(value), str(self))
            for name, value in self.find(metrics).items()
            if self.is_crossed_by(float(value))
        ]


def parse_threshold(text: str) -> Threshold:
    """
    Parse a threshold.

    Args:
        text (`str`):
            `NAME<VALUE` or `NAME>VALUE`: the values that are *not* accepted.

    Raises:
        ArgumentError: If it has another form, or the value is not a number.
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
