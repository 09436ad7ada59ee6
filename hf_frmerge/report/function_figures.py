"""Figures of the model's outputs: distances to the experts, and how much of each expert's gain is kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hf_frmerge.evaluation.record import MERGED, FunctionDistance
from hf_frmerge.report.facts import MergeFacts
from hf_frmerge.report.style import GRID, INK, MUTED, WIDE, compact, expert_colour, new_figure, styled, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from hf_frmerge.evaluation.record import EvaluationRecord, Recovered

_CLIP = (-1.0, 1.5)  # shares beyond are cut off, as they would squeeze all other bars


class Pooled(NamedTuple):
    """Histogram of distances: edges `(B + 1,)` in radians, shares of tokens `(B,)`, and the mean in radians."""

    edges: NDArray[np.float64]
    shares: NDArray[np.float64]
    mean: float


@styled
def distances_figure(facts: MergeFacts, width: float = WIDE) -> Figure | None:
    """
    Draw a histogram over tokens of the Fisher-Rao distance from the merged model to each expert.

    Distances from the other experts to the same one are drawn as an outline, for scale. Tokens of all domains are
    pooled.

    Returns:
        `Figure`: One axes per expert. `None` if no distances were measured.
    """
    record = facts.record
    experts = [] if record is None else [name for name in record.experts if _rows(record, name)]
    if record is None or not experts:
        return None
    columns = 2 if width >= WIDE and len(experts) > 3 else 1
    rows = math.ceil(len(experts) / columns)
    figure = new_figure(width, 1.2 * rows + 0.6)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    labels = dict(zip(record.experts, compact(record.experts, 30)))
    right_end = 0.0
    for axes, name in zip(grid.flat, experts):
        merged, expert_rows = pooled(_rows(record, name)), _between_experts(record, name)
        experts_pooled = pooled(expert_rows) if expert_rows else None
        colour = expert_colour(record.experts.index(name), len(record.experts))
        right_end = max(right_end, _draw_histograms(axes, merged, experts_pooled, colour))
        axes.set_title(f"Mean distance from {labels[name]}", color=colour, fontsize=8.5, pad=16)
        tidy(axes)
    for axes in grid.flat[len(experts) :]:
        axes.set_visible(False)
    # After all are drawn: shared axes get the range of the widest histogram.
    for index, axes in enumerate(grid.flat):
        axes.set_xlim(0, right_end)
        axes.tick_params(labelbottom=index + columns >= len(experts))
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
        axes.locator_params(axis="y", nbins=3)
    figure.supxlabel("Fisher–Rao distance of two predictions (rad)", color=MUTED, fontsize=8.5)
    figure.supylabel("share of tokens", color=MUTED, fontsize=8.5)
    return figure


def _rows(record: EvaluationRecord, expert: str) -> list[FunctionDistance]:
    """Select the distances from the merged model to an expert, on all domains."""
    return [row for row in record.distances if (row.model, row.other) == (MERGED, expert) and row.n_tokens]


def _between_experts(record: EvaluationRecord, expert: str) -> list[FunctionDistance]:
    """Select the distances between an expert and the others; a pair may be recorded in either order."""
    others = set(record.experts) - {expert}
    return [
        row
        for row in record.distances
        if row.n_tokens and expert in (row.model, row.other) and others & {row.model, row.other}
    ]


def pooled(rows: Sequence[FunctionDistance]) -> Pooled:
    """Pool the histograms and means of several rows, weighted by tokens."""
    edges = np.array([*(edge for edge, _ in rows[0].histogram), math.pi])
    counts = np.sum([[count for _, count in row.histogram] for row in rows], axis=0).astype(np.float64)
    mean = sum(row.n_tokens * row.fisher_rao.mean for row in rows) / sum(row.n_tokens for row in rows)
    return Pooled(edges, counts / counts.sum(), mean)


def _draw_histograms(axes: Axes, merged: Pooled, experts: Pooled | None, colour: str) -> float:
    """Draw both histograms with their means; return the right end in radians, where the axis may be cut."""
    ends = []
    if experts is not None:
        axes.stairs(experts.shares, experts.edges, color=MUTED, linewidth=1.1, label="other experts")
        ends.append(_end(experts))
    axes.stairs(merged.shares, merged.edges, color=colour, alpha=0.3, fill=True)
    axes.stairs(merged.shares, merged.edges, color=colour, linewidth=1.5, label=MERGED)
    ends.append(_end(merged))
    for histogram, ink in ((experts, MUTED), (merged, colour)):
        if histogram is not None:
            axes.axvline(histogram.mean, color=ink, linewidth=1, linestyle=(0, (2, 2)))
    word = axes.annotate(
        f"merged: {merged.mean:.2f} rad", (0, 1), (0, 4), "axes fraction", "offset points", color=colour, fontsize=8
    )
    if experts is not None:
        text = f"other experts: {experts.mean:.2f} rad"
        axes.annotate(text, (1, 0), (10, 0), word, "offset points", color=MUTED, va="bottom", fontsize=8)
    return max(ends)


def _end(histogram: Pooled) -> float:
    """Return the right edge, in radians, of the last bin with more than 0.1 % of the tokens."""
    filled = np.flatnonzero(histogram.shares > 1e-3)
    return float(histogram.edges[filled[-1] + 1])


@styled
def recovery_figure(facts: MergeFacts, width: float = WIDE) -> Figure | None:
    """
    Draw the share of each expert's gain over the base that the merged model keeps, as bars.

    Returns:
        `Figure`: One bar per expert. `None` if there was no base to compare with.
    """
    record = facts.record
    rows = [] if record is None else [row for row in record.recovery if row.model == MERGED]
    if record is None or not rows:
        return None
    figure = new_figure(width, 0.34 * len(rows) + 0.85)
    axes = figure.subplots()
    labels = dict(zip(record.experts, compact(record.experts, 22 if width >= WIDE else 13)))
    shares = np.clip([np.nan if row.share is None else row.share for row in rows], *_CLIP)
    places = np.arange(len(rows))
    colours = [expert_colour(_index(record, row), len(record.experts)) for row in rows]
    # A share is NaN if the expert gained nothing; its bar has no length, and a text instead.
    axes.barh(places, np.nan_to_num(shares), height=0.62, color=colours)
    low, high = min(0.0, np.nanmin([0.0, *shares])), max(1.0, np.nanmax([0.0, *shares]))
    for place, (row, share) in enumerate(zip(rows, shares)):
        _write_share(axes, place, row, share, with_nats=width >= WIDE)
    axes.set_yticks(places, [labels.get(row.expert, row.expert) for row in rows])
    axes.invert_yaxis()
    axes.set_xlim(1.05 * low, high + (0.4 if width >= WIDE else 0.2))
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    tidy(axes, "share of each expert's gain that is kept", grid="")
    # Fixed ticks, because automatic ones can miss 0 and 1, which mean base and expert.
    axes.set_xticks([0.0, 0.5, 1.0])
    axes.tick_params(axis="y", labelcolor=INK, labelsize=8.5)
    for position, text in ((0.0, "base"), (1.0, "expert")):
        axes.axvline(position, color=MUTED if position == 0 else GRID, linewidth=0.9, zorder=0)
        axes.text(position, 1.01, text, color=MUTED, ha="center", fontsize=8, transform=axes.get_xaxis_transform())
    return figure


def _index(record: EvaluationRecord, row: Recovered) -> int:
    return record.experts.index(row.expert) if row.expert in record.experts else 0


def _write_share(axes: Axes, place: int, row: Recovered, share: float, with_nats: bool) -> None:
    """Write the share beside its bar; on wide figures, also the gain in nats per token."""
    text = "no better than the base" if row.share is None else f"{100 * row.share:.0f} %"
    if row.share is not None and with_nats:
        text += f"  ({row.kept:.2f} of {row.gain:.2f} nats a token)"
    # The text of a negative bar goes to the right of the base, where there is always room.
    start = max(0.0, float(np.nan_to_num(share)))
    axes.annotate(text, (start, place), (4, 0), textcoords="offset points", va="center", fontsize=8.5)
