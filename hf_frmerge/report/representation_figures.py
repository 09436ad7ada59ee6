"""Figure of activation variance and effective rank by layer, merged against experts (arXiv 2603.04972, Fig. 2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from hf_frmerge.evaluation.record import MERGED
from hf_frmerge.report.facts import MergeFacts
from hf_frmerge.report.style import (
    INK,
    MUTED,
    N_HUES,
    WIDE,
    compact,
    end_labels,
    expert_colour,
    layer_ticks,
    new_figure,
    styled,
    tidy,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from hf_frmerge.evaluation.record import EvaluationRecord

_MEASURES = (
    ("activation_variance", "Activation variance", "variance per feature"),
    ("effective_rank", "Effective rank", "dimensions"),
)
_VALUES_HEIGHT, _RATIO_HEIGHT = 1.9, 1.0  # inches


@styled
def layers_figure(facts: MergeFacts, width: float = WIDE) -> Figure | None:
    """
    Draw activation variance and effective rank by layer, and their ratios to the experts' mean.

    Returns:
        `Figure`: Four axes: values and ratios of both measures. `None` if layers were not measured.
    """
    record = facts.record
    if record is None or not record.collapse():
        return None
    side_by_side = width >= WIDE
    rows, columns = (2, 2) if side_by_side else (4, 1)
    heights = [_VALUES_HEIGHT, _RATIO_HEIGHT] * (rows // 2)
    figure = new_figure(width, sum(heights) + 0.5 * rows)
    grid = figure.add_gridspec(rows, columns, height_ratios=heights)
    for number, (name, title, unit) in enumerate(_MEASURES):
        places = [(0, number), (1, number)] if side_by_side else [(2 * number, 0), (2 * number + 1, 0)]
        values, ratios = (figure.add_subplot(grid[place]) for place in places)
        _draw_values(values, record, name)
        values.set_title(title)
        tidy(values, y_label=unit)
        values.tick_params(labelbottom=False)
        _draw_ratios(ratios, record, name)
        tidy(ratios, "layer (0 is the embedding)", "÷ experts' mean")
        ratios.set_xlim(values.get_xlim())
        for axes in (values, ratios):
            layer_ticks(axes)
        figure.align_ylabels([values, ratios])
    return figure


def series(record: EvaluationRecord, model: str, measure: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return layers and values of one model, both `(layers,)`, float64; NaN where a value was not finite."""
    rows = sorted((row for row in record.layers if row.model == model), key=lambda row: row.layer)
    return (
        np.array([row.layer for row in rows], dtype=np.float64),
        np.array([getattr(row, measure) for row in rows], dtype=np.float64),
    )


def _draw_values(axes: Axes, record: EvaluationRecord, measure: str) -> None:
    """Draw one line per model; many experts become a band with their mean, since more colours cannot be told apart."""
    labels = []
    experts = record.experts
    lines = {name: series(record, name, measure) for name in record.models}
    for name, (layers, values) in lines.items():
        if record.models[name] == "base" and len(layers):
            axes.plot(layers, values, color=MUTED, linewidth=1.1, dashes=(3, 2), label=name)
            labels.append((values[-1], "base", MUTED))
    measured = [name for name in experts if len(lines[name][0])]
    if len(experts) > N_HUES:
        layers = lines[measured[0]][0]
        # An expert with another number of layers does not fit into the band.
        every = np.array([lines[name][1] for name in measured if len(lines[name][0]) == len(layers)])
        colour = expert_colour(0, len(experts))
        axes.fill_between(layers, every.min(0), every.max(0), color=colour, alpha=0.25, linewidth=0, label="experts")
        axes.plot(layers, every.mean(0), color=colour, linewidth=1.2, label="mean of the experts")
        labels.append((every.mean(0)[-1], f"{len(every)} experts", colour))
    else:
        for index, (name, label) in enumerate(zip(experts, compact(experts, 13))):
            if name in measured:
                colour = expert_colour(index, len(experts))
                axes.plot(*lines[name], color=colour, linewidth=1.3, label=name)
                labels.append((lines[name][1][-1], label, colour))
    layers, values = lines[MERGED]
    axes.plot(layers, values, color=INK, linewidth=2.2, label=MERGED)
    labels.append((values[-1], "merged", INK))
    _choose_scale(axes, np.concatenate([values for _, values in lines.values()]))
    end_labels(axes, labels, _VALUES_HEIGHT)


def _choose_scale(axes: Axes, values: NDArray[np.float64]) -> None:
    """Use a log scale if values span a factor above 30, else one from 0, which does not exaggerate differences."""
    # A broken model may have infinite or NaN values, which no axis can show.
    values = values[np.isfinite(values)]
    if values.min() > 0 and values.max() > 30 * values.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
    else:
        axes.set_ylim(bottom=0, top=1.08 * values.max() if values.max() > 0 else 1)


def _draw_ratios(axes: Axes, record: EvaluationRecord, measure: str) -> None:
    """Draw the merged model's and the experts' ratios to the experts' mean, and mark the lowest of the merged."""
    rows = record.collapse()
    layers = np.array([row.layer for row in rows], dtype=np.float64)
    ratios = np.array([getattr(row, measure) for row in rows], dtype=np.float64)
    experts = [series(record, name, measure) for name in record.experts]
    by_layer = [dict(zip(*line)) for line in experts if len(line[0])]
    for index, line in enumerate(by_layer if len(by_layer) <= N_HUES else []):
        mean = [np.mean([other[layer] for other in by_layer if layer in other]) for layer in layers]
        relative = np.array([line.get(layer, np.nan) for layer in layers]) / np.array(mean)
        axes.plot(layers, relative, color=expert_colour(index, len(by_layer)), linewidth=1, alpha=0.7)
    axes.axhline(1, color=MUTED, linewidth=0.8)
    axes.plot(layers, ratios, color=INK, linewidth=2.2, label=MERGED)
    drawn = np.concatenate([np.ravel(line.get_ydata()) for line in axes.lines])
    drawn = drawn[np.isfinite(drawn)]
    low, high = min(0.9, drawn.min()), max(1.1, drawn.max())
    # Room below for the text of the lowest point.
    axes.set_ylim(low - 0.28 * (high - low), high + 0.12 * (high - low))
    if np.isfinite(ratios).any():
        worst = int(np.nanargmin(ratios))
        axes.plot(layers[worst], ratios[worst], "o", color=INK, markersize=4.5)
        is_right_half = layers[worst] > (layers[0] + layers[-1]) / 2
        axes.annotate(
            f"lowest: {ratios[worst]:.2f} in layer {layers[worst]:.0f}",
            (layers[worst], ratios[worst]),
            (-7 if is_right_half else 7, -3),
            textcoords="offset points",
            ha="right" if is_right_half else "left",
            va="top",
            fontsize=8,
        )
