"""Formatting of numbers and lists for terminal, model card and report."""

from __future__ import annotations

import math
from collections.abc import Sequence

NONE = "–"


def number(value: float | None, digits: int = 3) -> str:
    """
    Format a number with `digits` significant digits; a missing or non-finite one is a dash.

    Example:

    ```python
    >>> number(12345.6), number(0.04567), number(-2.0), number(3.1e-13), number(None)
    ('12,346', '0.0457', '−2.00', '3.1e−13', '–')

    ```
    """
    if value is None or not math.isfinite(value):
        return NONE
    # Zeros before or after the digits are hard to count, so such numbers get an exponent.
    if value and not 1e-4 <= abs(value) < 1e7:
        text = f"{value:.{digits - 1}e}".replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")
        mantissa, _, exponent = text.partition("e")
        text = f"{mantissa.rstrip('0').rstrip('.') if '.' in mantissa else mantissa}e{exponent}"
    elif abs(value) >= 10 ** (digits - 1):
        text = f"{value:,.0f}"
    else:
        text = f"{value:#.{digits}g}" if value else "0"
    return text.replace("-", "−")  # the minus sign, as wide as a digit; a hyphen may be broken at the end of a line


def decimals(value: float | None, digits: int) -> str:
    """
    Format a number with a fixed number of decimals, so that columns of a table align.

    Example:

    ```python
    >>> decimals(1234.5, 2), decimals(-0.5, 1), decimals(float("nan"), 2)
    ('1,234.50', '−0.5', '–')

    ```
    """
    if value is None or not math.isfinite(value):
        return NONE
    return f"{value:,.{digits}f}".replace("-", "−")


def percent(share: float | None, digits: int = 0) -> str:
    """Format a share: `0.634` as "63%"."""
    if share is None or not math.isfinite(share):
        return NONE
    return f"{share:.{digits}%}".replace("-", "−")


def angle(radians: float | None) -> str:
    """
    Format an angle given in radians as radians and degrees.

    Example:

    ```python
    >>> angle(0.0123), angle(0.0)
    ('0.0123 rad (0.705°)', '0')

    ```
    """
    if radians is None or not math.isfinite(radians):
        return NONE
    return f"{number(radians)} rad ({number(math.degrees(radians))}°)" if radians else "0"


def listed(parts: Sequence[str]) -> str:
    """Join parts into a list: `["a", "b", "c"]` as "a, b and c"; at least one is needed."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def counted(count: int, what: str) -> str:
    """Format a count with its noun: `1, "block"` as "1 block", `2_000, "block"` as "2,000 blocks"."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"
