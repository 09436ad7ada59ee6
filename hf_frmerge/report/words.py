"""Numbers and texts of a report, as a person reads them."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence

NONE = "–"
_MARKS = {"\n": "⏎", "\t": "⇥", "\r": "␍"}


def number(value: float | None, digits: int = 3) -> str:
    """
    Write a number to some significant digits; what is missing or not finite is a dash.

    Example:

    ```python
    >>> number(12345.6), number(0.04567), number(-2.0), number(3.1e-13), number(None)
    ('12,346', '0.0457', '−2.00', '3.1e−13', '–')

    ```
    """
    if value is None or not math.isfinite(value):
        return NONE
    if value and not 1e-4 <= abs(value) < 1e7:
        text = f"{value:.{digits - 1}e}".replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")
        mantissa, _, exponent = text.partition("e")
        text = f"{mantissa.rstrip('0').rstrip('.') if '.' in mantissa else mantissa}e{exponent}"
    elif abs(value) >= 10 ** (digits - 1):
        text = f"{value:,.0f}"
    else:
        text = f"{value:#.{digits}g}" if value else "0"
    return text.replace("-", "−")


def percent(share: float | None) -> str:
    """`0.634` as "63 %"."""
    if share is None or not math.isfinite(share):
        return NONE
    return f"{100 * share:.0f} %".replace("-", "−")


def listed(parts: Sequence[str]) -> str:
    """`["a", "b", "c"]` as "a, b and c"."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def visible(text: str, spaces: bool = False) -> str:
    r"""
    Show what a reader would not see: line ends, tabs, control and direction characters; spaces too if asked.

    Example:

    ```python
    >>> visible("a\n b\u202e"), visible(" four", spaces=True), visible("", spaces=True)
    ('a⏎ b⟨U+202E⟩', '␣four', '(nothing)')

    ```
    """
    if not text and spaces:
        return "(nothing)"
    marks = _MARKS | ({" ": "␣"} if spaces else {})
    return "".join(marks.get(character) or _code_point(character) for character in text)


def _code_point(character: str) -> str:
    hidden = unicodedata.category(character) in ("Cc", "Cf", "Co", "Cs", "Zl", "Zp")
    return f"⟨U+{ord(character):04X}⟩" if hidden else character
