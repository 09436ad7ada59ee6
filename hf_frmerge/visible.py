"""Show text that strangers wrote (names of tensors, folders, keys of files) so that it cannot act on who reads it."""

from __future__ import annotations

import unicodedata

_MARKS = {"\n": "⏎", "\t": "⇥", "\r": "␍"}
_JOINERS = "\u200c\u200d"  # needed in Persian and in emoji; other format characters may reverse the direction of text


def visible(text: str, spaces: bool = False) -> str:
    r"""
    Make line ends, tabs, control and direction characters visible; with `spaces`, spaces too.

    Example:

    ```python
    >>> visible("a\n b\u202e"), visible(" four", spaces=True), visible("", spaces=True)
    ('a⏎ b⟨U+202E⟩', '␣four', '(nothing)')

    ```
    """
    if not text and spaces:
        return "(nothing)"
    marks = _MARKS | ({" ": "␣"} if spaces else {})
    return "".join(marks.get(character) or _shown(character) for character in text)


def visible_lines(text: str) -> str:
    r"""
    Make all that `visible` does visible but line ends, which sentences with lines of code have.

    Example:

    ```python
    >>> visible_lines("Run this:\n    convert \x1b[2J")
    'Run this:\n    convert ⟨U+001B⟩[2J'

    ```
    """
    return text if text.isprintable() else "\n".join(map(visible, text.split("\n")))


def _shown(character: str) -> str:
    if character.isprintable() or character in _JOINERS:
        return character
    return " " if unicodedata.category(character) == "Zs" else f"⟨U+{ord(character):04X}⟩"
