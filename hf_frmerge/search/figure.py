"""Figure of a front: what was measured, what is predicted to be best, and what was chosen."""

from __future__ import annotations

from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from hf_frmerge.checkpoints.disk import write_file
from hf_frmerge.report.style import MUTED, N_HUES, WIDE, end_labels, expert_colour, new_figure, shorten, styled, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from hf_frmerge.search.record import SearchRecord

FIGURE_FILE = "front.svg"
_HEIGHT = 4.2


@styled
def front_figure(record: SearchRecord, width: float = WIDE) -> Figure:
    """
    Draw the front of a search, on the texts that the weights were chosen on.

    Two tasks are the axes of a plane; of more, each has an axis, and every merge is a line across them.
    """
    figure = new_figure(width, _HEIGHT)
    axes = figure.add_subplot()
    tasks = list(record.tried[0].scores)
    if len(tasks) == 2:
        _draw_plane(axes, record, tasks)
    else:
        _draw_lines(axes, record, tasks)
    what = "share of the gain kept" if record.unit == "share" else "minus the loss, nats"
    axes.set_title(f"Merges by {record.method}: {what}, on the texts that weights were chosen on")
    if record.unit == "share":
        for axis in (axes.xaxis, axes.yaxis) if len(tasks) == 2 else (axes.yaxis,):
            axis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    return figure


def save_figure(folder: Path, record: SearchRecord) -> None:
    """Write `front.svg`, if matplotlib is installed and there is a front of two tasks or more."""
    if find_spec("matplotlib") is None or not record.front or len(record.tried[0].scores) < 2:
        return
    write_file(folder / FIGURE_FILE, _as_svg(record))


@styled
def _as_svg(record: SearchRecord) -> bytes:
    from matplotlib import rc_context

    file = BytesIO()
    # No date, and ids from a fixed salt: the same record gives the same file.
    with rc_context({"svg.hashsalt": "front"}):
        front_figure(record).savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return file.getvalue()


def _draw_plane(axes: Axes, record: SearchRecord, tasks: list[str]) -> None:
    tidy(axes, tasks[0], tasks[1], grid="both")
    axes.spines["left"].set_visible(False)
    front = sorted(tuple(one.scores[task] for task in tasks) for one in record.front)
    axes.plot(*zip(*front), color=MUTED, linewidth=1.2, label="front, predicted")
    x, y = ([one.scores[task] for one in record.tried] for task in tasks)
    axes.scatter(x, y, s=10, color=MUTED, label="measured")
    for number, row in enumerate(record.chosen):
        colour = expert_colour(number % N_HUES, N_HUES)
        x_chosen, y_chosen = (row.validation[task] for task in tasks)
        axes.scatter(x_chosen, y_chosen, s=36, color=colour, zorder=3, label=row.label)
    axes.legend(frameon=False, fontsize=8, loc="upper right")


def _draw_lines(axes: Axes, record: SearchRecord, tasks: list[str]) -> None:
    tidy(axes, grid="x")
    places = range(len(tasks))
    # Of experts joined two by two, the front of the last two does not say what each task has.
    for one in record.front if list(record.fit) == tasks else []:
        axes.plot(places, [one.scores[task] for task in tasks], color=MUTED, linewidth=0.4, alpha=0.5)
    labels = []
    for number, row in enumerate(record.chosen):
        colour = expert_colour(number % N_HUES, N_HUES)
        scores = [row.validation[task] for task in tasks]
        axes.plot(places, scores, color=colour, linewidth=1.8, marker="o", markersize=4)
        labels.append((scores[-1], shorten(row.label), colour))
    axes.set_xticks(list(places), [shorten(task, 16) for task in tasks])
    end_labels(axes, labels, _HEIGHT)
