"""Verdict: a finding, worded once for terminal, model card and report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["good", "watch", "bad", "fact"]


@dataclass(frozen=True)
class Verdict:
    """
    One finding.

    Attributes:
        level: severity; `fact` is neutral.
        title: short heading, for places that have room for one.
        text: sentences, complete without the title.
    """

    level: Level
    title: str
    text: str


def graded(value: float, good: float, poor: float) -> Level:
    """Grade a value of which more is better: at least `good`, at least `poor`, or bad; NaN is bad."""
    return "good" if value >= good else "watch" if value >= poor else "bad"
