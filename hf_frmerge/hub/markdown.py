"""Text and tables for Markdown that is rendered on the Hub: what came from data or people never becomes markup."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

# What starts emphasis, code, links, HTML, tables, headings, mathematics, mentions or entities somewhere in a line.
_SPECIAL = re.compile(r"([\\`*_\[\]<>|~#$&!@:{}])")
_WHITE = {"\n": "⏎", "\r": "⏎", "\t": "⇥"}
_JOINERS = "\u200c\u200d"  # belong to the spelling of Persian and to emoji; other format characters turn text around


@dataclass(frozen=True)
class MarkdownTable:
    """A table whose cells are Markdown already; the first column is text, the others are numbers if `numeric`."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numeric: bool = True

    def __str__(self) -> str:
        rule = ["---", *(["---:" if self.numeric else "---"] * (len(self.header) - 1))]
        return "\n".join(f"| {' | '.join(row)} |" for row in (self.header, rule, *self.rows))


def escape(text: object, limit: int | None = None) -> str:
    """
    Write arbitrary text so that Markdown shows it as it is, on one line.

    Args:
        text (`object`):
            Made a string; line breaks become `⏎`, tabs `⇥`, other characters that do not print `�`.
        limit (`int`, *optional*):
            Characters kept; what is cut off is marked by `…`.
    """
    shown = "".join(_WHITE.get(char) or _printable(char) for char in str(text))
    if limit is not None and len(shown) > limit:
        shown = shown[:limit].rstrip() + "…"
    shown = _SPECIAL.sub(r"\\\1", shown)
    return re.sub(r"\bwww\.", r"www\\.", shown)  # else a link


def _printable(char: str) -> str:
    if char.isprintable() or char in _JOINERS:
        return char
    return " " if unicodedata.category(char) == "Zs" else "�"


def cell(text: object) -> str:
    """Text of ours, or a name, as the cell of a table."""
    return str(text).replace("|", "\\|").replace("\r", " ").replace("\n", " ")


def bold(text: str) -> str:
    """Bold text, spaces outside. Asterisks beside punctuation or in the middle of a word would show as asterisks."""
    inner = text.strip()
    return text.replace(inner, f"<b>{inner}</b>", 1) if inner else text


def listed(names: Sequence[str]) -> str:
    """`["a", "b", "c"]` as "a, b and c"."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def number(value: float, digits: int) -> str:
    """`value` with so many decimals; a dash for what is not finite."""
    return "–" if not math.isfinite(value) else f"{value:,.{digits}f}"


def percent(value: float, digits: int = 1) -> str:
    """`value` in percent, with so many decimals; a dash for what is not finite."""
    return "–" if not math.isfinite(value) else f"{value:.{digits}%}"
