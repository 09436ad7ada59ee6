"""Text, code, links and tables in Markdown for the Hub, escaped so that names and texts never become markup."""

from __future__ import annotations

import re
from dataclasses import dataclass

from hf_frmerge.checkpoints.source import is_hub_id
from hf_frmerge.visible import visible, visible_lines

# Characters that can start emphasis, code, links, HTML, tables, headings, mathematics, mentions or entities. A colon
# followed by a space starts nothing.
_SPECIAL = re.compile(r"([\\`*_\[\]<>|~#$&!@{}]|:(?=\S))")

# What makes a list, a rule or a heading at the start of a line, and there only.
_START_OF_A_BLOCK = re.compile(r"^\s*\d+(?=[.)](\s|$))|^\s*(?=[-+=])")


class Markdown(str):
    """Text that is Markdown already; the template of the card writes it as it is, and escapes all other."""


@dataclass(frozen=True)
class MarkdownTable:
    """Table of cells that are already Markdown; all columns but the first are right-aligned if `numeric`."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numeric: bool = True

    def __str__(self) -> str:
        rule = ["---", *(["---:" if self.numeric else "---"] * (len(self.header) - 1))]
        return "\n".join(f"| {' | '.join(row)} |" for row in (self.header, rule, *self.rows))


def as_markdown(value: object) -> str:
    """Return Markdown as it is, and any other value as a sentence; every value in the card's template passes here."""
    return str(value) if isinstance(value, Markdown | MarkdownTable) else sentence(str(value))


def escape(text: object, limit: int | None = None) -> Markdown:
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
    shown = _START_OF_A_BLOCK.sub(r"\g<0>\\", _SPECIAL.sub(r"\\\1", shown))
    # Markdown on the Hub turns bare `www.` addresses into links.
    return Markdown(re.sub(r"\bwww\.", r"www\\.", shown))


def sentence(text: str) -> Markdown:
    """
    Escape a sentence, on one line: what stands between backticks is code, all else is text.

    Sentences are ours, but they name what strangers named. A backtick in a name only moves what is shown as code.
    """
    pieces = visible(text).split("`")
    if len(pieces) % 2 == 0:  # the last backtick has no partner
        pieces[-2:] = ["`".join(pieces[-2:])]
    return Markdown("".join(code(piece) if index % 2 else escape(piece) for index, piece in enumerate(pieces)))


def code(text: object) -> Markdown:
    """Show arbitrary text as code, on one line, whatever backticks are in it; in a table, `cell` must follow."""
    shown = visible(str(text))
    marks = _longer_than_any("`", shown)
    pad = " " if shown.startswith("`") or shown.endswith("`") or not shown.strip() else ""
    return Markdown(f"{marks}{pad}{shown}{pad}{marks}")


def fence(text: str, language: str, indent: int = 0) -> Markdown:
    """Show lines as a block of code; nothing in them ends it, and none can be taken for a mark of the card."""
    marks = max("```", _longer_than_any("`", text), key=len)
    # An HTML comment at the start of a line could be read as the beginning or end of the user's section.
    lines = re.sub("^<!--", " <!--", visible_lines(text), flags=re.MULTILINE)
    return Markdown("\n".join(" " * indent + line for line in f"{marks}{language}\n{lines}\n{marks}".split("\n")))


def hub_link(repo_id: str) -> Markdown:
    """Link to a repository of the Hub; a name that can be none is shown as code."""
    return Markdown(f"[{escape(repo_id)}](https://huggingface.co/{repo_id})") if is_hub_id(repo_id) else code(repo_id)


def cell(text: object) -> Markdown:
    """Make a value a table cell: the pipes in code are escaped, too."""
    return Markdown(re.sub(r"(?<!\\)\|", r"\|", as_markdown(text)))


def bold(text: str) -> str:
    """Make text bold, without surrounding spaces; in HTML, as asterisks in a word or by punctuation are literal."""
    inner = text.strip()
    return text.replace(inner, f"<b>{inner}</b>", 1) if inner else text


def _longer_than_any(mark: str, text: str) -> str:
    return mark * (1 + max((len(run) for run in re.findall(f"{mark}+", text)), default=0))
