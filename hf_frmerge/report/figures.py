"""Draw all figures of a merge, and save them as PNG files."""

from __future__ import annotations

from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from hf_frmerge.checkpoints.disk import make_folder, write_file
from hf_frmerge.errors import MergeError
from hf_frmerge.report.facts import MergeFacts, read_facts
from hf_frmerge.report.function_figures import distances_figure, recovery_figure
from hf_frmerge.report.geometry_figures import angles_figure, coefficients_figure
from hf_frmerge.report.representation_figures import layers_figure
from hf_frmerge.report.style import WIDE, styled

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from matplotlib.figure import Figure

Data = TypeVar("Data")

FIGURES = {
    "recovery": recovery_figure,
    "distances": distances_figure,
    "layers": layers_figure,
    "angles": angles_figure,
    "coefficients": coefficients_figure,
}
"""Name -> function of the facts and the width in inches, which returns `None` if there is no data to draw."""

_DPI = 200


def draw_figures(facts: MergeFacts, width: float = WIDE) -> dict[str, Figure]:
    """
    Draw every figure there is data for.

    Raises:
        MergeError: If matplotlib is not installed.
    """
    return draw_all(FIGURES, facts, width)


def draw_all(
    figures: Mapping[str, Callable[[Data, float], Figure | None]], data: Data, width: float
) -> dict[str, Figure]:
    """Draw those of the figures that there is data for; errors are those of `draw_figures`."""
    check_can_draw()
    drawn = {name: draw(data, width) for name, draw in figures.items()}
    return {name: figure for name, figure in drawn.items() if figure is not None}


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def check_can_draw() -> None:
    """Raise `MergeError` if matplotlib is not installed."""
    if not can_draw():
        raise MergeError("Figures are drawn by matplotlib, which is not installed: pip install 'hf_frmerge[report]'")


def figure_drawer() -> Callable[[Path, Path], dict[str, Path]] | None:
    """Return `save_figures`; `None` if matplotlib is not installed, and a model card then has no figures."""
    return save_figures if can_draw() else None


@styled
def save_figures(folder: Path | str, into: Path | str) -> dict[str, Path]:
    """
    Save the figures of the merge in `folder` as PNG files with a white background, 200 dots per inch.

    Args:
        folder (`Path` or `str`):
            Folder of a merge, with or without the record of an evaluation.
        into (`Path` or `str`):
            Folder for the files; created if it does not exist.

    Returns:
        `dict[str, Path]`: Name of a figure -> its file. Figures without data are left out: `recovery`, `distances`
        and `layers` need an evaluation.

    Raises:
        CheckpointError: If `folder` holds no finished merge.
        MergeError: If matplotlib is not installed.
    """
    return save_pngs(draw_figures(read_facts(folder)), Path(into))


@styled
def save_pngs(figures: Mapping[str, Figure], into: Path) -> dict[str, Path]:
    """Save figures as PNG files in a folder, which is created if it does not exist; return them by name."""
    make_folder(into)
    files = {}
    for name, figure in figures.items():
        files[name] = into / f"{name}.png"
        # Without matplotlib's version in the metadata, the same record always gives the same file.
        image = BytesIO()
        figure.savefig(image, format="png", dpi=_DPI, metadata={"Software": None})
        write_file(files[name], image.getvalue())
    return files
