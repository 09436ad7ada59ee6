"""The terminal to print on, units for people, and verdicts in colour."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.text import Text

from hf_frmerge.visible import visible_lines
from hf_frmerge.wording.verdicts import Verdict

_STYLES = {"good": "", "fact": "", "watch": "yellow", "bad": "yellow"}


class _VisibleConsole(Console):
    """Console that shows control characters in what it is given as `str`: lines, and cells of tables."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(visible_lines(text), **options)


def console() -> Console:
    """
    Return a console on stdout; pipes are 120 wide.

    Markup is off, since names and paths may contain brackets, and control characters in them are shown.
    """
    # Rich assumes 80 columns for a pipe, in which tables would be folded.
    width = None if sys.stdout.isatty() else 120
    return _VisibleConsole(markup=False, emoji=False, highlight=False, soft_wrap=False, width=width)


def human_bytes(count: float) -> str:
    """Format bytes with powers of 1000: `269_000_000` as "269 MB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:  # larger counts would be rounded to 1e+03
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"


def human_count(count: float) -> str:
    """Format a count with powers of 1000: `134_515_008` as "135 M"."""
    for unit in ("", " k", " M"):
        if count < 999.5:
            return f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:.3g} B"


def human_seconds(seconds: float) -> str:
    """Format a duration: `75` as "1 min 15 s"."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds:.2f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s"


def print_verdicts(out: Console, verdicts: Iterable[Verdict]) -> None:
    """Print verdicts, one per line; those that need attention in yellow."""
    for verdict in verdicts:
        out.print(verdict.text, style=_STYLES[verdict.level])
