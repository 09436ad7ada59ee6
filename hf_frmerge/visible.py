"""Show text so that it cannot act on who reads it, whatever strangers wrote in it, and tells nobody a secret."""

from __future__ import annotations

import re
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


# Of addresses, the name and password before the host, and the query, in which stores put signatures.
_CREDENTIALS = re.compile(r"(?<!hub)(://)[^/\s]+@|(://[^\s?'\"]+\?)[^\s'\"]+")
_HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{30,}")


def without_secrets(text: str) -> str:
    """
    Leave out of a text what gives access: passwords and signatures in addresses, and tokens of the Hub.

    Example:

    ```python
    >>> without_secrets("s3://me:secret@bucket/model, https://host/model?signature=abc")
    's3://…@bucket/model, https://host/model?…'

    ```
    """
    shown = _CREDENTIALS.sub(lambda match: f"{match[1]}…@" if match[1] else f"{match[2]}…", text)
    return _HUB_TOKEN.sub("hf_…", shown)


def visible_lines(text: str) -> str:
    r"""
    Make all that `visible` does visible but line ends, which sentences with lines of code have; without secrets.

    Example:

    ```python
    >>> visible_lines("Run this:\n    convert \x1b[2J")
    'Run this:\n    convert ⟨U+001B⟩[2J'

    ```
    """
    text = without_secrets(text)
    return text if text.isprintable() else "\n".join(map(visible, text.split("\n")))


def _shown(character: str) -> str:
    if character.isprintable() or character in _JOINERS:
        return character
    return " " if unicodedata.category(character) == "Zs" else f"⟨U+{ord(character):04X}⟩"
