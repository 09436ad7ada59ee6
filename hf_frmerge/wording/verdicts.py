"""What a verdict is: a finding that terminal, card and page give in the same words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["good", "watch", "bad", "fact"]


@dataclass(frozen=True)
class Verdict:
    """
    One finding.

    Attributes:
        level: how it is to be taken.
        title: a few words, for where there is room for a heading.
        text: the sentence, complete without the title.
    """

    level: Level
    title: str
    text: str


def graded(value: float, good: float, poor: float) -> Level:
    """Grade a value of which more is better; what is no number is bad."""
    return "good" if value >= good else "watch" if value >= poor else "bad"
