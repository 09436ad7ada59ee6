"""Convert a figure to inline SVG, with colours and font from the style sheet of the page."""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from hf_frmerge.report.style import PALETTE, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FONT = re.compile(r"font-family: [^;]*;? ?")
_URL = re.compile(r"url\(#([^)]+)\)")


@styled
def inline_svg(figure: Figure, name: str) -> str:
    """
    Return the `<svg>` element of a figure.

    Colours of the palette become `var(--ROLE)`, so that the page's dark mode applies, and the font is the page's. The
    element has no fixed size and is hidden from screen readers, which read the caption.

    Args:
        figure (`Figure`): Figure in the light colours of `style.PALETTE`.
        name (`str`): Prefix of every id: ids must be unique in a page.
    """
    file = io.BytesIO()
    # No date and version, so that the same record gives the same page.
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(file, format="svg", facecolor="none", metadata=nothing)
    svg = ElementTree.fromstring(file.getvalue())
    for parent in list(svg.iter()):
        parent.tag = _bare(parent.tag)
        parent.attrib = {_bare(key): value for key, value in parent.attrib.items()}
        # Metadata names external vocabularies, and a style element would apply to the whole page.
        for child in [child for child in parent if _bare(child.tag) in ("metadata", "style")]:
            parent.remove(child)
    svg.attrib = {"aria-hidden": "true", "viewBox": svg.attrib["viewBox"]}
    _rename_ids(svg, name)
    for element in svg.iter():
        element.attrib = {key: _themed(value) for key, value in element.attrib.items()}
    return ElementTree.tostring(svg, encoding="unicode")


def _bare(name: str) -> str:
    """Strip the namespace from a name: inline SVG in HTML does not need it."""
    return name.rpartition("}")[2]


def _rename_ids(svg: ElementTree.Element, name: str) -> None:
    """Number the ids that are referenced, and drop the others: matplotlib's differ between runs."""
    new: dict[str, str] = {}

    def renamed(old: str) -> str:
        return new.setdefault(old, f"{name}-{len(new)}")

    for element in svg.iter():
        for key, value in element.attrib.items():
            if key == "href" and value.startswith("#"):
                element.set(key, f"#{renamed(value[1:])}")
            else:
                element.set(key, _URL.sub(lambda match: f"url(#{renamed(match[1])})", value))
    for element in svg.iter():
        old = element.attrib.pop("id", None)
        if old in new:
            element.set("id", new[old])


def _themed(value: str) -> str:
    """Replace colours of the palette by CSS variables, and drop the font."""
    for role, (light, _) in PALETTE.items():
        value = value.replace(light, f"var(--{role})")
    return _FONT.sub("", value)
