"""Tables and figure of `reproduce_paper.py`: what is kept, by family and number of experts, and what leads."""

# Shape suffixes: T = texts, R = resamples, N = runs.

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray
from small_models import SIZES

from hf_frmerge.report.style import MUTED, PALETTE, WIDE, layer_ticks, new_figure, styled, tidy

FACTS_FILE = "run.json"
"""Beside a comparison: how far apart its experts are, and what each gained over the base."""

FIRST = "karcher"
"""The method whose lead over the others is told."""

DRAWN = (FIRST, "nre", "linear", "ties")
STYLES: dict[str, tuple[Any, str]] = {
    "full": ("-", "o"),
    "lora": ("--", "^"),
    "mixed": (":", "s"),
    "16m": ("-.", "P"),
    "4m": ("-.", "D"),
    "1m": ("-.", "v"),
}
"""Family -> how it is drawn: line and marker."""

PARAMETERS = {**{name: size.parameters for name, size in SIZES.items()}, "full": 134_515_008}
N_RESAMPLES = 2000

Record = dict[str, Any]
Losses = Mapping[str, tuple[NDArray[np.float64], NDArray[np.int64]]]
"""Domain -> sums of the losses of each test text, in nats, and the number of its tokens."""


@dataclass(frozen=True)
class Run:
    """
    A finished run.

    Attributes:
        family, number, seed: as it was called.
        methods: label -> what was measured.
        losses: label -> losses on the test texts, at the scale that was chosen.
        gains: expert -> the domain of its text, and what it gained there, in nats a token.
        angle, norm_ratio: between the experts' deltas, in degrees; largest norm over the smallest.
    """

    family: str
    number: int
    seed: int
    methods: Mapping[str, Record]
    losses: Mapping[str, Losses]
    gains: Mapping[str, tuple[str, float]]
    angle: float
    norm_ratio: float


def read_runs(workdir: Path) -> list[Run]:
    """Read the finished runs of a folder."""
    runs = []
    for path in sorted(workdir.glob(f"*-*-*/{FACTS_FILE}")):
        family, number, seed = path.parent.name.split("-")
        rows = json.loads((path.parent / "comparison.json").read_text(encoding="utf-8"))["methods"]
        methods = {row["label"]: row for row in rows}
        facts = json.loads(path.read_text(encoding="utf-8"))
        runs.append(Run(family, int(number), int(seed), methods, read_losses(path.parent, methods), **facts))
    return runs


def read_losses(folder: Path, methods: Mapping[str, Record]) -> dict[str, Losses]:
    """Return the losses of every method at the scale that was chosen, from the file of cells."""
    lines = (folder / "cells.jsonl").read_text(encoding="utf-8").splitlines()[1:]
    cells = {cell["cell"]: cell["result"]["measured"] for cell in map(json.loads, lines) if cell["split"] == "test"}
    losses: dict[str, Losses] = {}
    for label, row in methods.items():
        key = json.dumps([row["method"], list(row["options"].items()), row["scale"], row["weights"]])
        losses[label] = {
            domain: (np.array(columns["sums"]), np.array(columns["counts"]))
            for domain, columns in cells[key]["losses"].items()
        }
    return losses


# ---- tables ---------------------------------------------------------------------------------------------------------


def print_report(runs: Sequence[Run]) -> None:
    """Print a table for every measure and family, and the paired differences the paper is about."""
    measures: list[tuple[str, Callable[[Record], float]]] = [
        ("Share of the experts' gains that is kept, mean over the experts, %", lambda row: 100 * row["score"]),
        ("The same of the expert that keeps least, %", lambda row: 100 * min(row["by_place"].values())),
        ("Variance of activations over that of the experts, layer that lost most, %",
         lambda row: 100 * row["activation_variance"]),
        ("Effective rank over that of the experts, layer that lost most, %",
         lambda row: 100 * row["effective_rank"]),
    ]  # fmt: skip
    for family in sorted({one.family for one in runs}):
        own = [one for one in runs if one.family == family]
        print(f"\n### {family}\n")
        print_spread(own)
        for title, measure in measures:
            print(f"\n{title}; mean and standard deviation over seeds\n")
            print_table(own, measure)
        print(f"\nLead of {FIRST} in the mean share, points\n")
        print_leads(own)


def print_spread(runs: Sequence[Run]) -> None:
    """Print how far apart the experts are, and how well a share is known."""
    print(
        "| N | runs | angle between deltas, degrees | largest norm over smallest | standard error of a share, points |"
    )
    print("|---:|---:|---:|---:|---:|")
    for number, group in by_number(runs).items():
        angle, ratio = (np.mean([getattr(one, name) for one in group]) for name in ("angle", "norm_ratio"))
        error = np.mean([100 * one.methods[FIRST]["error"] for one in group])
        print(f"| {number} | {len(group)} | {angle:.1f} | {ratio:.2f} | {error:.1f} |")


def print_table(runs: Sequence[Run], measure: Callable[[Record], float]) -> None:
    groups = by_number(runs)
    print(f"| method | {' | '.join(f'N = {number}' for number in groups)} |\n|---|{'---:|' * len(groups)}")
    for label in labels_of(runs):
        cells = []
        for group in groups.values():
            values = [measure(one.methods[label]) for one in group]
            spread = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.1f}{spread}")
        print(f"| {label} | {' | '.join(cells)} |")


def print_leads(runs: Sequence[Run]) -> None:
    """Print the leads for every number of experts, and for all of them together."""
    print("| over | N | lead | standard error over texts | interval over runs and texts | runs it leads in |")
    print("|---|---:|---:|---:|---:|---:|")
    groups = {str(number): group for number, group in by_number(runs).items()}
    if len(groups) > 1:
        groups["all"] = list(runs)
    for label in labels_of(runs)[1:]:
        for number, group in groups.items():
            lead = lead_of(group, label)
            low, high = lead.interval
            print(
                f"| {label} | {number} | {lead.mean:+.2f} | {lead.error:.2f} | {low:+.1f} to {high:+.1f} | "
                f"{lead.n_ahead} of {len(group)} |"
            )


@dataclass(frozen=True)
class Lead:
    """
    Lead of `FIRST` over another method in the mean share, in points.

    Attributes:
        mean: over runs.
        error: standard error over texts, for the experts and seeds that were run.
        interval: 95 %, over runs and texts.
        n_ahead: number of runs it leads in.
    """

    mean: float
    error: float
    interval: tuple[float, float]
    n_ahead: int


def lead_of(runs: Sequence[Run], other: str) -> Lead:
    """Return the lead over a method; the same texts are drawn again for both, and then the runs."""
    draw = np.random.default_rng(0)
    leads_N = np.array([100 * (one.methods[FIRST]["score"] - one.methods[other]["score"]) for one in runs])
    resampled_NR = np.stack([resampled_lead(one, other, draw) for one in runs])
    drawn_RN = draw.integers(len(runs), size=(N_RESAMPLES, len(runs)))
    # A run that is drawn twice gets other texts each time.
    twice_R = resampled_NR[drawn_RN, draw.integers(N_RESAMPLES, size=drawn_RN.shape)].mean(axis=1)
    low, high = np.quantile(twice_R, (0.025, 0.975))
    error = resampled_NR.mean(axis=0).std()
    return Lead(float(leads_N.mean()), float(error), (float(low), float(high)), int((leads_N > 0).sum()))


def resampled_lead(run: Run, other: str, draw: np.random.Generator) -> NDArray[np.float64]:
    """Return the lead over a method in one run when its texts are drawn again, domain by domain; `(R,)`."""
    leads_R: dict[str, NDArray[np.float64]] = {}  # in nats a token
    for domain, (sums_T, counts_T) in run.losses[FIRST].items():
        n_texts = len(sums_T)
        drawn_RT = draw.multinomial(n_texts, np.full(n_texts, 1 / n_texts), N_RESAMPLES)
        leads_R[domain] = drawn_RT @ (run.losses[other][domain][0] - sums_T) / (drawn_RT @ counts_T)
    shares: NDArray[np.float64] = np.mean([leads_R[domain] / gain for domain, gain in run.gains.values()], axis=0)
    return 100 * shares


# ---- figure ---------------------------------------------------------------------------------------------------------


@styled
def draw_axes(runs: Sequence[Run]) -> Figure:
    """Draw what is kept by number of experts, and the lead of Karcher by how unlike and how large the experts are."""
    figure = new_figure(WIDE, 5.6)
    grid = figure.add_gridspec(2, 2)
    draw_kept(figure.add_subplot(grid[0, :]), runs)
    draw_by_ratio(figure.add_subplot(grid[1, 0]), runs)
    draw_by_size(figure.add_subplot(grid[1, 1]), runs)
    return figure


def draw_kept(axes: Axes, runs: Sequence[Run]) -> None:
    for family, own in drawn_families(runs).items():
        line, marker = STYLES[family]
        for label in DRAWN:
            points = {n: [100 * one.methods[label]["score"] for one in group] for n, group in by_number(own).items()}
            means = [float(np.mean(values)) for values in points.values()]
            axes.plot(list(points), means, line, marker=marker, markersize=4, color=colour_of(label))
    layer_ticks(axes)
    tidy(axes, "number of experts", "share of the gains kept, %", grid="both")
    explain(axes, DRAWN, {family: STYLES[family] for family in drawn_families(runs)})


def draw_by_ratio(axes: Axes, runs: Sequence[Run]) -> None:
    families = drawn_families(runs)
    for family, own in families.items():
        for label in DRAWN[1:3]:
            leads = [100 * (one.methods[FIRST]["score"] - one.methods[label]["score"]) for one in own]
            ratios = [one.norm_ratio for one in own]
            axes.plot(ratios, leads, STYLES[family][1], markersize=4.5, color=colour_of(label), alpha=0.8)
    finish_leads(axes, "largest norm of a delta over the smallest", {one: ("", STYLES[one][1]) for one in families})


def draw_by_size(axes: Axes, runs: Sequence[Run]) -> None:
    for numbers, line in (((2,), "-"), ((4, 5), "--")):
        groups = {size: [one for one in runs if one.family == size and one.number in numbers] for size in PARAMETERS}
        sizes = [size for size, group in groups.items() if group]
        for label in DRAWN[1:3]:
            leads = [lead_of(groups[size], label) for size in sizes]
            axes.errorbar(
                [PARAMETERS[size] for size in sizes],
                [lead.mean for lead in leads],
                [lead.error for lead in leads],
                linestyle=line,
                marker="o",
                markersize=3,
                capsize=2,
                color=colour_of(label),
            )
    axes.set_xscale("log")
    finish_leads(axes, "parameters of the model, full fine-tunes", {"N = 2": ("-", "o"), "N = 4 or 5": ("--", "o")})


def finish_leads(axes: Axes, x_label: str, styles: Mapping[str, tuple[Any, str]]) -> None:
    tidy(axes, x_label, f"lead of {FIRST}, points", grid="both")
    axes.axhline(0.0, color=MUTED, linewidth=0.9)
    explain(axes, DRAWN[1:3], styles)


def explain(axes: Axes, labels: Sequence[str], styles: Mapping[str, tuple[Any, str]]) -> None:
    """Add a legend: colours are methods, lines and markers what else is told apart."""
    methods = [Line2D([], [], color=colour_of(label), label=label) for label in labels]
    others = [
        Line2D([], [], linestyle=line, marker=marker, markersize=4, color=MUTED, label=name)
        for name, (line, marker) in styles.items()
    ]
    axes.legend(handles=[*methods, *others], frameon=False, fontsize=7, ncols=2, labelcolor=MUTED, handlelength=3)


def drawn_families(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """Return the runs of every family that has some."""
    families = {family: [one for one in runs if one.family == family] for family in STYLES}
    return {family: own for family, own in families.items() if own}


def colour_of(label: str) -> str:
    return PALETTE[f"expert-{DRAWN.index(label) + 1}"][0]


def by_number(runs: Iterable[Run]) -> dict[int, list[Run]]:
    groups: dict[int, list[Run]] = defaultdict(list)
    for one in runs:
        groups[one.number].append(one)
    return dict(sorted(groups.items()))


def labels_of(runs: Sequence[Run]) -> list[str]:
    """Return the methods that all runs tried, as the largest of them rank: `FIRST` and then from the best."""
    largest = max(runs, key=lambda one: one.number)
    labels = [label for label in largest.methods if all(label in one.methods for one in runs)]
    return sorted(labels, key=lambda label: label != FIRST)
