"""Text and tables for Markdown that is rendered on the Hub: what came from data or people never becomes markup."""

from __future__ import annotations

import re
from dataclasses import dataclass

from hf_frmerge.wording.numbers import visible

# What starts emphasis, code, links, HTML, tables, headings, mathematics, mentions or entities somewhere in a line.
_SPECIAL = re.compile(r"([\\`*_\[\]<>|~#$&!@:{}])")


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
            Made a string, and shown by `visible`.
        limit (`int`, *optional*):
            Characters kept; what is cut off is marked by `…`.
    """
    shown = visible(str(text))
    if limit is not None and len(shown) > limit:
        shown = shown[:limit].rstrip() + "…"
    shown = _SPECIAL.sub(r"\\\1", shown)
    return re.sub(r"\bwww\.", r"www\\.", shown)  # else a link


def cell(text: object) -> str:
    """Text of ours, or a name, as the cell of a table."""
    return str(text).replace("|", "\\|").replace("\r", " ").replace("\n", " ")


def bold(text: str) -> str:
    """Bold text, spaces outside. Asterisks beside punctuation or in the middle of a word would show as asterisks."""
    inner = text.strip()
    return text.replace(inner, f"<b>{inner}</b>", 1) if inner else text
