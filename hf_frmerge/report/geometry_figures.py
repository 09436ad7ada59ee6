"""Figures of the geometry: angles between the experts, and the coefficients of the merge."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hf_frmerge.report.facts import MergeFacts, TensorFacts
from hf_frmerge.report.style import HEAT_MAP, INK, MUTED, WIDE, compact, layer_ticks, new_figure, shorten, styled, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

_MAX_KINDS = 14  # rows of a heat map that are still readable
_MAX_NUMBERED = 7  # pairs in a row of the triangle that leave room for numbers
_LEVEL_CHARACTERS = 24  # characters of all names that fit side by side below the triangle
# Text on light and on dark cells. Not from the palette: heat maps look the same in light and dark mode.
_OVER_CELLS = ("#10131a", "#fdfdfd")


@styled
def angles_figure(facts: MergeFacts, width: float = WIDE) -> Figure | None:
    """
    Draw the angle of every pair of experts, median over tensors, and the angles by layer. All in radians.

    Returns:
        `Figure`: A heat map if there are more than two experts, then a scatter plot if there are layers. `None` if
        the manifest has data for neither.
    """
    table = pair_angles(facts)
    # Two experts have a single angle, which needs no heat map.
    has_pairs = table is not None and len(table) > 2
    has_layers = any(tensor.layer is not None for tensor in facts.measured_tensors)
    if not has_pairs and not has_layers:
        return None
    n = len(facts.experts)
    side = min(1.9 + 0.13 * n, width - 0.4)  # inches of the heat map with its labels
    if has_pairs and has_layers and width >= WIDE:
        figure = new_figure(width, max(2.5, side))
        places = figure.add_gridspec(1, 2, width_ratios=[side, width - side])
    elif has_pairs and has_layers:
        figure = new_figure(width, side + 2.8)
        places = figure.add_gridspec(2, 1, height_ratios=[side, 2.5])
    else:
        figure = new_figure(width, side if has_pairs else 2.6)
        places = figure.add_gridspec(1, 1)
    if has_pairs and table is not None:
        _draw_pairs(figure.add_subplot(places[0]), table, facts.experts)
    if has_layers:
        _draw_angles_by_layer(figure.add_subplot(places[-1]), facts.measured_tensors)
    return figure


def pair_angles(facts: MergeFacts) -> NDArray[np.float64] | None:
    """
    Return the median over tensors of the angle of every pair of experts.

    Returns:
        `numpy.ndarray`: `(experts, experts)`, float64, in radians, symmetric; NaN on the diagonal and for pairs
        without an angle. `None` for records of versions that did not keep angles of pairs.
    """
    rows = [tensor.geometry.pair_angles for tensor in facts.measured_tensors if tensor.geometry]
    known = np.array([row for row in rows if row], dtype=np.float64)
    if not known.size:
        return None
    n = len(facts.experts)
    table = np.full((n, n), np.nan)
    for column, (first, second) in zip(known.T, zip(*np.triu_indices(n, 1))):
        # nanmedian warns about a column of NaN, as of an expert that is zero in all tensors.
        if not np.isnan(column).all():
            table[first, second] = table[second, first] = np.nanmedian(column)
    return table


def _draw_pairs(axes: Axes, table: NDArray[np.float64], experts: Sequence[str]) -> None:
    """Draw the triangle below the diagonal, so that each pair appears once; with numbers if there is room."""
    cells = np.where(np.tri(len(table), k=-1, dtype=bool), table, np.nan)[1:, :-1]
    size = len(cells)
    low, high = _scale(cells, least=0.25)
    image = axes.imshow(cells, cmap=HEAT_MAP, vmin=low, vmax=high, interpolation="none")
    if size <= _MAX_NUMBERED:
        for row, column in np.argwhere(np.tri(size)).tolist():
            value = cells[row, column]
            colour = _OVER_CELLS[0] if value > low + 0.55 * (high - low) else _OVER_CELLS[1]
            text = "" if math.isnan(value) else f"{value:.{3 if high < 0.2 else 2}f}"
            axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=7.5)
    else:
        _colour_bar(axes, image, "rad")
    names = compact(experts, 12)
    is_level = size * max(map(len, names)) <= _LEVEL_CHARACTERS
    slant: dict[str, Any] = {} if is_level else {"rotation": 40, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(range(size), names[:-1], **slant)
    axes.set_yticks(range(size), names[1:])
    axes.set_title("Angle of two experts (rad)")
    tidy(axes, grid="")
    axes.spines["bottom"].set_visible(False)


def _draw_angles_by_layer(axes: Axes, tensors: Sequence[TensorFacts]) -> None:
    """Draw a dot per tensor and the median of each layer, and label the largest angle."""
    inside = [tensor for tensor in tensors if tensor.layer is not None]
    layers = np.array([tensor.layer for tensor in inside], dtype=np.float64)
    angles = np.array([tensor.geometry.mean_angle for tensor in inside if tensor.geometry], dtype=np.float64)
    axes.plot(layers, angles, "o", color=MUTED, alpha=0.45, markersize=2.6, markeredgewidth=0, label="tensors")
    distinct_layers = np.unique(layers)
    medians = [np.median(angles[layers == layer]) for layer in distinct_layers]
    axes.plot(distinct_layers, medians, color=INK, linewidth=1.8, label="median")
    # Room above for the label of the largest angle; the bound avoids an empty range if all angles are 0.
    axes.set_ylim(0, 1.12 * max(float(angles.max()), 1e-12))
    axes.margins(x=0.03)
    axes.set_title("Angle by layer")
    tidy(axes, "layer", "rad, mean over pairs")
    layer_ticks(axes)
    largest = int(np.argmax(angles))
    is_right_half = layers[largest] > (distinct_layers[0] + distinct_layers[-1]) / 2
    axes.annotate(
        f"{angles[largest]:.3g} rad: {shorten(inside[largest].kind, 26)}",
        (layers[largest], angles[largest]),
        (-5 if is_right_half else 5, 4),
        textcoords="offset points",
        ha="right" if is_right_half else "left",
        fontsize=7.5,
        color=INK,
    )


@styled
def coefficients_figure(facts: MergeFacts, width: float = WIDE) -> Figure | None:
    """
    Draw the coefficients of every expert divided by its weight: a row per kind of tensor, a column per layer.

    Divided by the weight, a plain average is 1 everywhere, and experts with little weight are visible too.

    Returns:
        `Figure`: One heat map per expert, all with the same scale. `None` if there are no coefficients.
    """
    rows, table = coefficient_table(facts)
    if not rows:
        return None
    n = len(facts.experts)
    max_columns = (3 if n <= 9 else 4) if width >= WIDE else (1 if n <= 6 else 2)
    columns = 2 if n == 4 and max_columns > 2 else min(n, max_columns)
    lines = math.ceil(n / columns)
    figure = new_figure(width, lines * (0.14 * len(rows) + 0.45) + 0.8)
    grid = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    weights = np.array(facts.manifest.weights)
    # An expert of weight 0 has no ratio: NaN leaves its heat map empty.
    relative = np.divide(
        table, weights[:, None, None], out=np.full_like(table, np.nan), where=weights[:, None, None] != 0
    )
    low, high = _scale(relative, least=0.02)
    layers = [tensor.layer for tensor in facts.merged_tensors if tensor.layer is not None]
    extent = (min(layers, default=0) - 0.5, max(layers, default=0) + 0.5, len(rows) - 0.5, -0.5)
    names = compact(facts.experts, 26 // columns + 8)
    for index, axes in enumerate(grid.flat):
        if index >= n:
            axes.set_visible(False)
            continue
        image = axes.imshow(
            relative[index], cmap=HEAT_MAP, vmin=low, vmax=high, aspect="auto", interpolation="none", extent=extent
        )
        axes.set_title(names[index], fontsize=8.5)
        tidy(axes, "layer" if index + columns >= n else "", grid="")
        axes.set_yticks(range(len(rows)), [shorten(row, 24 if columns < 3 else 20) for row in rows])
        axes.tick_params(axis="y", labelsize=7)
        axes.tick_params(axis="x", labelbottom=index + columns >= n)
        axes.spines["bottom"].set_visible(False)
        layer_ticks(axes)
    _colour_bar(grid, image, "coefficient ÷ weight of the expert", location="bottom")
    return figure


def coefficient_table(facts: MergeFacts) -> tuple[list[str], NDArray[np.float64]]:
    """
    Arrange coefficients by kind of tensor and layer. Kinds beyond the 14 rows share the last one.

    Returns:
        `tuple`: Names of the rows, and `(experts, rows, layers)`, float64, means over the tensors of a cell; NaN for
        empty cells. A kind outside the layers, such as the embedding, has the same value along its whole row.
    """
    with_coefficients = [tensor for tensor in facts.merged_tensors if tensor.coefficients is not None]
    layers = [tensor.layer for tensor in with_coefficients if tensor.layer is not None]
    first, width = min(layers, default=0), max(layers, default=0) - min(layers, default=0) + 1
    kinds = Counter(tensor.kind for tensor in with_coefficients)
    kept = {kind for kind, _ in kinds.most_common(_MAX_KINDS if len(kinds) <= _MAX_KINDS else _MAX_KINDS - 1)}
    other = f"{len(kinds) - len(kept)} other kinds"
    rows = [kind for kind in kinds if kind in kept] + ([other] if len(kinds) > len(kept) else [])
    total = np.zeros((len(facts.experts), len(rows), width))
    count = np.zeros((len(rows), width))
    for tensor in with_coefficients:
        row = rows.index(tensor.kind if tensor.kind in kept else other)
        columns = range(width) if tensor.layer is None else [tensor.layer - first]
        total[:, row, columns] += np.reshape(tensor.coefficients, (-1, 1))  # type: ignore[arg-type]  # none is None
        count[row, columns] += 1
    with np.errstate(invalid="ignore"):  # 0 / 0 in empty cells: the NaN is wanted
        return _short(rows), total / count


def _short(rows: list[str]) -> list[str]:
    """Shorten names to their last part where that is unique."""
    last = Counter(row.rpartition(".")[2] for row in rows)
    return [row.rpartition(".")[2] if last[row.rpartition(".")[2]] == 1 else row for row in rows]


def _scale(table: NDArray[np.float64], least: float) -> tuple[float, float]:
    """Return the colour range, at least `least` times the largest value, lest noise look like a pattern."""
    low, high = float(np.nanmin(table)), float(np.nanmax(table))
    missing = max(0.0, least * max(abs(low), abs(high), 1e-12) - (high - low)) / 2
    return low - missing, high + missing


def _colour_bar(axes: Any, image: AxesImage, label: str, location: str = "right") -> None:
    """Add a colour bar beside or below one or several axes."""
    from matplotlib.ticker import MaxNLocator

    figure = np.ravel(axes)[0].figure
    length = 0.7 if location == "right" else min(1.0, 3.0 / figure.get_figwidth())
    bar = figure.colorbar(image, ax=axes, location=location, shrink=length, aspect=26, pad=0.02, ticks=MaxNLocator(4))
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.set_label(label, color=MUTED, fontsize=8)
    bar.ax.tick_params(labelsize=7.5, labelcolor=MUTED, length=0)
