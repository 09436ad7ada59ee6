"""Text and tables in Markdown for the Hub, escaped so that names and texts never become markup."""

from __future__ import annotations

import re
from dataclasses import dataclass

from hf_frmerge.wording.numbers import visible

# Characters that can start emphasis, code, links, HTML, tables, headings, mathematics, mentions or entities.
_SPECIAL = re.compile(r"([\\`*_\[\]<>|~#$&!@:{}])")


@dataclass(frozen=True)
class MarkdownTable:
    """Table of cells that are already Markdown; all columns but the first are right-aligned if `numeric`."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numeric: bool = True

    def __str__(self) -> str:
        rule = ["---", *(["---:" if self.numeric else "---"] * (len(self.header) - 1))]
        return "\n".join(f"| {' | '.join(row)} |" for row in (self.header, rule, *self.rows))


def escape(text: object, limit: int | None = None) -> str:
    """
    Escape arbitrary text so that Markdown shows it unchanged, on one line.

    Args:
        text (`object`):
            Converted by `str`, then made printable by `visible`.
        limit (`int`, *optional*):
            Number of characters to keep; a cut is marked by `…`.
    """
    shown = visible(str(text))
    if limit is not None and len(shown) > limit:
        shown = shown[:limit].rstrip() + "…"
    shown = _SPECIAL.sub(r"\\\1", shown)
    return re.sub(r"\bwww\.", r"www\\.", shown)  # Markdown on the Hub turns bare `www.` addresses into links


def cell(text: object) -> str:
    """Escape text for a table cell. Only pipes and line breaks: other Markdown in it still works."""
    return str(text).replace("|", "\\|").replace("\r", " ").replace("\n", " ")


def bold(text: str) -> str:
    """Make text bold, without surrounding spaces; in HTML, as asterisks in a word or by punctuation are literal."""
    inner = text.strip()
    return text.replace(inner, f"<b>{inner}</b>", 1) if inner else text
