"""Style of the figures: colours, sizes, labels and ticks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

P = ParamSpec("P")
T = TypeVar("T")

# Role -> colour in light mode, in dark mode. The experts' hues are those of Okabe and Ito (2008), distinguishable with
# any kind of colour vision, darkened or lightened to a contrast of at least 3:1 with the background.
PALETTE = {
    "paper": ("#ffffff", "#16181d"),
    "ink": ("#1c2026", "#eceef2"),
    "muted": ("#646c78", "#a0a8b4"),
    "grid": ("#dfe3e8", "#333942"),
    "expert-1": ("#0072b2", "#58b0ea"),
    "expert-2": ("#cf5a02", "#ff9453"),
    "expert-3": ("#008f68", "#3ecb9e"),
    "expert-4": ("#b5548c", "#eba0cb"),
    "expert-5": ("#977000", "#e2b53e"),
    "expert-6": ("#2f8fa8", "#7fdcf0"),
}
INK, MUTED, GRID = (PALETTE[role][0] for role in ("ink", "muted", "grid"))
N_HUES = 6
"""Maximum number of experts with separate colours; more cannot be told apart."""

HEAT_MAP = "cividis"  # even in lightness, and looks the same to the colour-blind
WIDE, NARROW = 7.4, 3.7
"""Widths of a figure in inches, on a wide page and on a phone."""

SIZE = 8.5
_SETTINGS: Any = {  # Any, because matplotlib's stubs accept only literal names of settings
    "font.family": "DejaVu Sans",  # comes with matplotlib, so figures are the same everywhere
    "font.size": SIZE,
    "text.color": INK,
    "text.parse_math": False,  # a name may contain dollar signs
    "text.usetex": False,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.labelsize": SIZE,
    "axes.labelcolor": MUTED,
    "axes.facecolor": "none",
    "axes.unicode_minus": True,
    "figure.dpi": 100,
    "lines.solid_capstyle": "round",
    "svg.fonttype": "none",  # text stays text: the page sets its font, and readers can search it
}


def styled(function: Callable[P, T]) -> Callable[P, T]:
    """Decorate a function to run with the settings of this module; the user's are restored afterwards."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        import matplotlib

        with matplotlib.rc_context(_SETTINGS):
            return function(*args, **kwargs)

    return run


def new_figure(width: float, height: float) -> Figure:
    """Return a figure of `width` x `height` inches. Without pyplot, which keeps figures alive and may open windows."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.06, wspace=0.03, hspace=0.03)
    figure = Figure(figsize=(width, height), layout=layout, facecolor=PALETTE["paper"][0])
    FigureCanvasAgg(figure)
    return figure


def tidy(axes: Axes, x_label: str = "", y_label: str = "", grid: str = "y") -> None:
    """Label the axes, and remove all of the frame but the bottom line."""
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.tick_params(labelsize=8, labelcolor=MUTED, color=GRID, length=0, which="both")
    if grid:
        axes.grid(axis=grid, color=GRID, linewidth=0.6)  # type: ignore[arg-type]
    axes.set_axisbelow(True)


def layer_ticks(axes: Axes) -> None:
    """Put ticks at whole layers only."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))


def expert_colour(index: int, n_experts: int) -> str:
    """Return the colour of an expert; with more than `N_HUES` experts, all have the same."""
    return PALETTE[f"expert-{index + 1}"][0] if n_experts <= N_HUES else PALETTE["expert-1"][0]


def shorten(text: str, length: int = 22) -> str:
    """Cut a name in the middle, since models may differ at either end."""
    if len(text) <= length:
        return text
    tail = (length - 1) // 2
    return f"{text[: length - 1 - tail]}…{text[-tail:]}"


def compact(names: Sequence[str], length: int) -> list[str]:
    """
    Shorten names to `length`; if one is too long, the prefix that all share is dropped first.

    Example:

    ```python
    >>> compact(["Qwen2.5-7B-math", "Qwen2.5-7B-code"], 20), compact(["Qwen2.5-7B-math", "Qwen2.5-7B-code"], 10)
    (['Qwen2.5-7B-math', 'Qwen2.5-7B-code'], ['math', 'code'])

    ```
    """
    if len(names) > 1 and any(len(name) > length for name in names):
        first, last = min(names), max(names)  # in sorted order, a prefix of the first and last is one of all
        common = first[: next((i for i, (a, b) in enumerate(zip(first, last)) if a != b), min(len(first), len(last)))]
        # Cut at a separator, so that no name starts in the middle of a word.
        start = max(common.rfind(separator) for separator in "-_./ ") + 1
        names = [name[start:] for name in names]
    return [shorten(name, length) for name in names]


def end_labels(axes: Axes, labels: Sequence[tuple[float, str, str]], height: float) -> None:
    """
    Write labels at the right ends of lines, moved apart so that none overlap.

    Args:
        labels: `(value, text, colour)` of each line; values that are not finite are skipped.
        height: Approximate height of the axes in inches.
    """
    to_fraction = axes.transScale + axes.transLimits
    wanted = [
        (float(np.clip(to_fraction.transform((0.0, value))[1], 0, 1)), text, colour)
        for value, text, colour in labels
        if np.isfinite(value)
    ]
    wanted.sort(key=lambda label: label[0])
    gap = 1.25 * 8 / 72 / height  # a line of text of 8 points, in fractions of the axes
    places = spread([place for place, _, _ in wanted], gap)
    for index in reversed(range(len(places))):  # so that none runs into the title
        places[index] = min(places[index], 1 - gap * (len(places) - 1 - index))
    for place, (_, text, colour) in zip(places, wanted):
        axes.text(1.03, place, text, color=colour, transform=axes.transAxes, va="center", fontsize=8)


def spread(places: Sequence[float], gap: float) -> list[float]:
    """
    Move ascending places to be at least `gap` apart, with the smallest sum of squared moves.

    Example:

    ```python
    >>> [round(place, 3) for place in spread([0.0, 0.1, 1.0], 0.2)]
    [-0.05, 0.15, 1.0]

    ```
    """
    # With `i * gap` subtracted, this is isotonic regression: solved by pooling adjacent violators.
    pools: list[tuple[float, int]] = []
    for index, place in enumerate(places):
        pools.append((place - index * gap, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (mean, count), (last, last_count) = pools[-2:]
            pools[-2:] = [((mean * count + last * last_count) / (count + last_count), count + last_count)]
    flat = [mean for mean, count in pools for _ in range(count)]
    return [place + index * gap for index, place in enumerate(flat)]
