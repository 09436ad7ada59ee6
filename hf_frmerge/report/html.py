"""Fill the templates of pages: what all pages have in common."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable, Mapping
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

from hf_frmerge.evaluation.record import MERGED
from hf_frmerge.report.style import NARROW, PALETTE, WIDE
from hf_frmerge.report.svg import inline_svg
from hf_frmerge.visible import visible
from hf_frmerge.wording.numbers import number, percent

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LONG = 16  # names with more characters may be broken in a cell


def render(template: str, **context: Any) -> str:
    """
    Render a page in a single file that needs no network, fonts or images. The same context gives the same text.

    Args:
        template: Name of a template that extends `layout.html.jinja`.
        context: What it and the layout use.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_template),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "percent": percent, "visible": visible, "breakable": _breakable}
    script = _template("page.js")
    return environment.get_template(template).render(
        **context,
        merged=MERGED,
        style=_colours() + _template("page.css"),
        script=script,
        # The page's content security policy allows only the script with this hash, so nothing from data can run.
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def inline_figures(draw: Callable[[float], Mapping[str, Figure]]) -> dict[str, tuple[str, str]]:
    """
    Draw every figure twice, for a wide page and for a phone: scaled down, the text would be too small to read.

    Args:
        draw: Returns the figures by name, given their width in inches.
    """
    wide, narrow = draw(WIDE), draw(NARROW)
    return {
        name: (inline_svg(figure, name), inline_svg(narrow[name], f"{name}-narrow")) for name, figure in wide.items()
    }


def _breakable(text: str) -> Markup:
    """Escape a name, and allow line breaks after `.`, `_` and `/` if it is long."""
    return Markup(re.sub(r"([._/])(?=\w)", r"\1<wbr>", str(escape(text)))) if len(text) > _LONG else escape(text)


def _template(name: str) -> str:
    return files("hf_frmerge.report").joinpath("templates").joinpath(name).read_text(encoding="utf-8")


def _colours() -> str:
    """Return the palette as CSS variables, with the dark colours for readers whose system is in dark mode."""
    light, dark = ("".join(f"--{role}:{both[paper]};" for role, both in PALETTE.items()) for paper in (0, 1))
    return f":root{{{light}}}\n@media (prefers-color-scheme: dark){{:root{{{dark}}}}}\n"
