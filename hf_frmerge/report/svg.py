"""A figure as SVG to be put into a page: coloured and lettered by the style sheet of that page, light or dark."""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING

from hf_frmerge.report.style import PALETTE, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@styled
def inline_svg(figure: Figure, name: str) -> str:
    """
    Return the `<svg>` element of a figure.

    Colours of the palette become `var(--ROLE)`, and the font is left to the page. The element has no size of its own
    and says nothing to a screen reader: what stands around it does.

    Args:
        figure (`Figure`): Made by a function of this room.
        name (`str`): Put before every id: those of all figures of a page must be different.
    """
    text = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(text, format="svg", facecolor="none", metadata=nothing)
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"\s*<metadata>.*?</metadata>|\s*<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = (
        re.sub(r' (?:xmlns(?::xlink)?|width|height|version)="[^"]*"', "", svg[: svg.index(">")])
        + svg[svg.index(">") :]
    )
    # matplotlib's ids differ between runs; only what is referred to needs one.
    used = {
        found: f"{name}-{i}" for i, found in enumerate(dict.fromkeys(re.findall(r'(?:url\(|href=")#([^)"]+)', svg)))
    }
    svg = re.sub(r' id="([^"]+)"', lambda match: f' id="{used[match[1]]}"' if match[1] in used else "", svg)
    svg = re.sub(r'(url\(|href=")#([^)"]+)', lambda match: f"{match[1]}#{used[match[2]]}", svg)
    for role, (light, _) in PALETTE.items():
        svg = re.sub(light, f"var(--{role})", svg, flags=re.IGNORECASE)
    svg = re.sub(r"font-family: [^;\"]*; ?", "", svg)
    return svg.replace("<svg", '<svg aria-hidden="true"', 1)
