"""Figures of a comparison of merge methods: which is best and by how much, for whom, at which scale, at what cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_frmerge.report.figures import draw_all
from hf_frmerge.report.style import (
    GRID,
    INK,
    MUTED,
    N_HUES,
    PALETTE,
    WIDE,
    compact,
    expert_colour,
    new_figure,
    shorten,
    spread,
    styled,
    tidy,
)
from hf_frmerge.wording.comparison import difference, named, score
from hf_frmerge.wording.numbers import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from hf_frmerge.evaluation.comparison_record import ComparisonRecord, Interval, MethodResult

TIED = PALETTE["expert-3"][0]
"""Colour of the best merge and of those that are tied with it; the others are muted."""

_ROW = 0.27  # inches of a method


def draw_comparison(record: ComparisonRecord, width: float = WIDE) -> dict[str, Figure]:
    """
    Draw every figure there is data for.

    Raises:
        MergeError: If matplotlib is not installed.
    """
    return draw_all(FIGURES, record, width)


@styled
def ranking_figure(record: ComparisonRecord, width: float = WIDE) -> Figure:
    """Draw the score of every method, best first, and beside it how far it is behind the best, with intervals."""
    rows = record.methods
    figure, scores, behind = _two_axes(rows, width)
    sign = 1.0 if record.unit == "share" else -1.0
    for place, row in enumerate(rows):
        ends = sorted((sign * row.interval[0], sign * row.interval[1]))
        _point(scores, place, sign * row.score, (ends[0], ends[1]), _colour(row), is_filled=row.is_tied)
        _point(behind, place, -row.lead, (-row.lead_interval[1], -row.lead_interval[0]), _colour(row), row.is_tied)
        _beside(scores, place, score(record, row.score), row)
        word = "best" if row is record.best else "tied" if row.is_tied else f"−{difference(record, row.lead)}"
        _beside(behind, place, word, row)
    _cut_outliers(behind, rows)
    behind.axvline(0.0, color=MUTED, linewidth=0.9, zorder=0)
    tidy(scores, _score_label(record), grid="x")
    tidy(behind, "behind the best" + _unit_of_difference(record), grid="x")
    _format_scores(scores, record)
    behind.locator_params(axis="x", nbins=4)
    if record.unit == "share":
        behind.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g}".replace("-", "−"))
    _name_both(scores, behind, rows, width)
    return figure


@styled
def experts_figure(record: ComparisonRecord, width: float = WIDE) -> Figure:
    """Draw what every method keeps of each expert, with intervals, or the loss on every text."""
    rows, places = record.methods, list(record.best.by_place)
    sign = 1.0 if record.unit == "share" else -1.0
    apart = 0.16 if len(places) <= N_HUES else 0.0
    row_height = _ROW + 0.12 * max(len(places) - 2, 0) if apart else _ROW
    figure = new_figure(width, row_height * len(rows) + 0.95)
    axes = figure.subplots()
    for number_, name in enumerate(places):
        colour = expert_colour(number_, len(places))
        shift = apart * (number_ - (len(places) - 1) / 2)
        for place, row in enumerate(rows):
            ends = sorted(sign * end for end in row.place_intervals[name])
            interval = (ends[0], ends[1]) if apart else None
            _point(axes, place + shift, sign * row.by_place[name], interval, colour, is_filled=True)
    if apart:
        _legend(axes, compact(places, 24 if width >= WIDE else 14), width)
    if record.unit == "share":
        axes.axvline(1.0, color=MUTED, linewidth=0.9, linestyle=(0, (2, 2)), zorder=0)
        axes.axvline(0.0, color=MUTED, linewidth=0.9, zorder=0)
    label = "share of the gain kept" if record.unit == "share" else "loss (nats)"
    tidy(axes, label, grid="x")
    _format_scores(axes, record)
    _name_rows(axes, rows, width)
    return figure


@styled
def trade_off_figure(record: ComparisonRecord, width: float = WIDE) -> Figure | None:
    """
    Draw the mean share against the share of the expert that loses most.

    Returns:
        `Figure`: A point per method. `None` without shares, or for one expert.
    """
    if record.unit != "share" or len(record.best.by_place) < 2:
        return None
    rows = record.methods
    figure = new_figure(width, max(0.55 * width, 0.16 * len(rows) + 1.2))
    axes = figure.subplots()
    means = np.array([row.score for row in rows])
    worst = np.array([min(row.by_place.values()) for row in rows])
    low, high = float(min(worst.min(), means.min())), float(means.max())
    margin = 0.06 * max(high - low, 0.02)
    axes.set_xlim(float(means.min()) - margin, high + margin)
    axes.set_ylim(float(worst.min()) - margin, max(float(worst.max()), high) + margin)
    axes.plot([low - 1, high + 1], [low - 1, high + 1], color=MUTED, linewidth=0.9, linestyle=(0, (2, 2)), zorder=0)
    for mean, least, row in zip(means, worst, rows):
        _point(axes, least, mean, None, _colour(row), row.is_tied)
    _lead_to_names(axes, means, worst, rows, float(figure.get_figheight()) - 0.7, width)
    tidy(axes, "mean share kept", "least share kept", grid="both")
    axes.xaxis.set_major_formatter(_as_percent)
    axes.yaxis.set_major_formatter(_as_percent)
    axes.locator_params(nbins=6)
    return figure


@styled
def scales_figure(record: ComparisonRecord, width: float = WIDE) -> Figure | None:
    """Draw the validation score against the scale, an axes a method. `None` if no method was tried with several."""
    rows = [row for row in record.methods if len({one.scale for one in row.tried}) > 1]
    if not rows:
        return None
    columns = min(4 if width >= WIDE else 2, len(rows))
    lines = math.ceil(len(rows) / columns)
    figure = new_figure(width, 1.15 * lines + 0.5)
    grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    sign = 1.0 if record.unit == "share" else -1.0
    scores = [sign * one.score for row in rows for one in row.tried]
    low, high = _readable_range(scores, sign)
    scales = sorted({one.scale for row in rows for one in row.tried if one.scale is not None})
    names = compact([row.label for row in rows], 22 if width >= WIDE else 18)
    for axes, row, name in zip(grid.flat, rows, names):
        for other in rows:
            for curve in _curves(other, sign):
                axes.plot(*curve, color=GRID, linewidth=0.8, zorder=1)
        for curve in _curves(row, sign):
            axes.plot(*curve, color=_colour(row), linewidth=1.5, marker="o", markersize=2.6, zorder=2)
        axes.plot([row.scale], [sign * row.validation], "o", color=_colour(row), markersize=6, zorder=3)
        axes.set_title(name, fontsize=8.5, color=INK if row.is_tied else MUTED)
        tidy(axes, grid="y")
        if min(scales) > 0:
            axes.set_xscale("log")
        axes.set_xticks(scales, [f"{scale:g}" for scale in scales], minor=False)
        axes.minorticks_off()
        axes.set_ylim(low, high)
        axes.locator_params(axis="y", nbins=4)
        if record.unit == "share":
            axes.yaxis.set_major_formatter(_as_percent)
    for axes in grid.flat[len(rows) :]:
        axes.set_visible(False)
    for index, axes in enumerate(grid.flat):
        axes.tick_params(labelbottom=index + columns >= len(rows))
    figure.supxlabel("scale of the merged delta", color=MUTED, fontsize=8.5)
    figure.supylabel(_score_label(record), color=MUTED, fontsize=8.5)
    return figure


@styled
def cost_figure(record: ComparisonRecord, width: float = WIDE) -> Figure:
    """Draw time and memory of every merge that was made here as bars."""
    rows = [row for row in record.methods if row.model is None]
    figure, times, memories = _two_axes(rows, width)
    _draw_bars(times, rows, [row.seconds for row in rows], "seconds a merge")
    megabytes = [None if row.memory is None else row.memory / 1e6 for row in rows]
    _draw_bars(memories, rows, megabytes, "MB beside the model")
    _name_both(times, memories, rows, width)
    return figure


FIGURES = {
    "ranking": ranking_figure,
    "experts": experts_figure,
    "trade_off": trade_off_figure,
    "scales": scales_figure,
    "cost": cost_figure,
}
"""Name -> function of the record and the width in inches, which returns `None` if there is no data to draw."""


def _two_axes(rows: Sequence[MethodResult], width: float) -> tuple[Figure, Axes, Axes]:
    """Return a figure with two axes, beside each other or, if that is too narrow, one below the other."""
    height, is_wide = _ROW * len(rows) + 0.75, width >= WIDE
    figure = new_figure(width, height if is_wide else 2 * height)
    first, second = figure.subplots(1 if is_wide else 2, 2 if is_wide else 1, squeeze=False).flat
    return figure, first, second


def _name_both(first: Axes, second: Axes, rows: Sequence[MethodResult], width: float) -> None:
    """Name the rows of two axes; those of the second only if it is below the first."""
    for axes in (first, second):
        _name_rows(axes, rows, width)
    second.tick_params(labelleft=width < WIDE)


def _cut_outliers(behind: Axes, rows: Sequence[MethodResult]) -> None:
    """End the axis before methods that are so far behind that all others would seem equal, and mark these."""
    ends = [row.lead_interval[1] for row in rows[1:]] or [0.0]
    limit = min(max(ends), 3.0 * float(np.median(ends)))
    if limit <= 0.0:
        return
    behind.set_xlim(-1.06 * limit, 0.06 * limit - min(row.lead_interval[0] for row in rows))
    for place, row in enumerate(rows):
        if row.lead > limit:
            behind.annotate(
                "◂", (0, place), xycoords=("axes fraction", "data"), va="center", fontsize=8.5, color=_colour(row)
            )


def _draw_bars(axes: Axes, rows: Sequence[MethodResult], values: Sequence[float | None], label: str) -> None:
    """Draw a bar a method, with its number at the end."""
    lengths = [0.0 if value is None else value for value in values]
    axes.barh(range(len(rows)), lengths, height=0.62, color=[_colour(row) for row in rows])
    for place, (value, length) in enumerate(zip(values, lengths)):
        text = "not counted" if value is None else number(value, 2)
        axes.annotate(text, (length, place), (4, 0), textcoords="offset points", va="center", fontsize=8)
    axes.margins(x=0.18)
    tidy(axes, label, grid="")
    axes.set_xticks([])


def _name(row: MethodResult, width: float) -> str:
    """Name a method as short as the width asks for."""
    if width >= WIDE:
        return shorten(named(row), 36)
    return shorten(named(row).replace(f" to {row.n_prompts} prompts", ""), 20)


def _colour(row: MethodResult) -> str:
    return TIED if row.is_tied else MUTED


def _point(axes: Axes, place: float, value: float, interval: Interval | None, colour: str, is_filled: bool) -> None:
    """Draw a point, hollow or filled, with its interval."""
    if interval is not None:
        axes.plot(interval, [place, place], color=colour, linewidth=1.6, zorder=2)
    face = colour if is_filled else PALETTE["paper"][0]
    axes.plot([value], [place], "o", color=colour, markerfacecolor=face, markersize=5, zorder=3)


def _beside(axes: Axes, place: float, text: str, row: MethodResult) -> None:
    """Write a word at the right edge of the row of a method."""
    axes.annotate(
        text, (1, place), (4, 0), xycoords=("axes fraction", "data"), textcoords="offset points", va="center",
        fontsize=8.5, color=_colour(row),
    )  # fmt: skip


def _name_rows(axes: Axes, rows: Sequence[MethodResult], width: float) -> None:
    """Name the rows, the first on top."""
    axes.set_yticks(range(len(rows)), [_name(row, width) for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.tick_params(axis="y", labelsize=8.5)
    for name, row in zip(axes.get_yticklabels(), rows):
        name.set_color(INK if row.is_tied else MUTED)
        name.set_fontweight("bold" if row is rows[0] else "normal")


def _legend(axes: Axes, names: Sequence[str], width: float) -> None:
    """Write the names above the axes, each in its colour, in as many lines as they need."""
    columns = 3 if width >= WIDE else 2
    last_line = (len(names) - 1) // columns
    for index, name in enumerate(names):
        line, column = divmod(index, columns)
        axes.annotate(
            f"● {name}", (column / columns, 1), (0, 5 + 11 * (last_line - line)), "axes fraction", "offset points",
            color=expert_colour(index, len(names)), fontsize=8.5, va="bottom",
        )  # fmt: skip


def _lead_to_names(
    axes: Axes, x: Sequence[float] | Any, y: Sequence[float] | Any, rows: Sequence[MethodResult], height: float,
    width: float,
) -> None:  # fmt: skip
    """Name points at the right edge, moved apart so that none overlap, with a line to each."""
    order = sorted(range(len(rows)), key=lambda index: (y[index], x[index]))
    low, high = axes.get_ylim()
    wanted = [(y[index] - low) / (high - low) for index in order]
    places = spread(wanted, 1.35 * 8 / 72 / height)
    for index, place in zip(order, places):
        row = rows[index]
        axes.annotate(
            _name(row, width), (x[index], y[index]), (1.03, place),
            textcoords="axes fraction", va="center", fontsize=8, color=_colour(row),
            arrowprops={"arrowstyle": "-", "color": GRID, "linewidth": 0.7, "shrinkB": 3, "shrinkA": 1},
        )  # fmt: skip


def _curves(row: MethodResult, sign: float) -> list[tuple[list[float], list[float]]]:
    """Return scales and scores, a curve for every choice of weights."""
    curves = []
    for weights in dict.fromkeys(one.weights for one in row.tried):
        points = [(one.scale, sign * one.score) for one in row.tried if one.weights == weights]
        curves.append(([x for x, _ in points if x is not None], [y for x, y in points if x is not None]))
    return curves


def _readable_range(scores: Sequence[float], sign: float) -> tuple[float, float]:
    """Return the range of an axis that shows all scores but those so bad that they would flatten all others."""
    best, worst = max(sign * value for value in scores), min(sign * value for value in scores)
    usual = float(np.quantile([sign * value for value in scores], 0.2))
    worst = max(worst, best - 2.0 * (best - usual))
    margin = 0.06 * (best - worst) or 0.05
    ends = sorted((sign * (worst - margin), sign * (best + margin)))
    return ends[0], ends[1]


def _score_label(record: ComparisonRecord) -> str:
    return "mean share kept" if record.unit == "share" else "mean loss (nats)"


def _unit_of_difference(record: ComparisonRecord) -> str:
    return " (points)" if record.unit == "share" else " (nats)"


def _format_scores(axes: Axes, record: ComparisonRecord) -> None:
    axes.locator_params(axis="x", nbins=5)
    if record.unit == "share":
        axes.xaxis.set_major_formatter(_as_percent)


def _as_percent(value: float, _: Any) -> str:
    return f"{100 * value:.0f} %".replace("-", "−")
