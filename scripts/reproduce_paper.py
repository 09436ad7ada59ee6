"""
Try the axes of the paper (arXiv 2603.04972) on real experts: how many there are, how far apart, and what collapses.

    python scripts/train_experts.py --suite full lora --output-dir /tmp/experts
    python scripts/reproduce_paper.py --experts /tmp/experts --family lora --numbers 2 4 8 --workdir /tmp/paper
    python scripts/reproduce_paper.py --experts /tmp/experts --family full --numbers 2 5 --workdir /tmp/paper
    python scripts/reproduce_paper.py --workdir /tmp/paper --report --figure docs/figures/paper_axes.png

Every run is a `MergeComparison`: all methods get the same scales, chosen on a quarter of the texts and reported on
the others. A seed decides which experts are merged (the first N of a shuffled list), and which passages are drawn. The
same command goes on where an interrupted one was. `--report` prints the tables of docs/results.md from what is there,
and `--figure` draws them.

The experts of the demo are among the adapters, with the excerpts that it ships; all texts were kept out of training.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from math import degrees
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from hf_frmerge.report.style import MUTED, PALETTE, WIDE, layer_ticks, new_figure, styled, tidy

DEMO_DATA = Path(__file__).resolve().parents[1] / "hf_frmerge" / "demo" / "data"
METHODS = ("karcher", "nre", "linear", "ties", "della", "sce", "karcher,space=weights")
SCALES = (0.7, 1.0, 1.4, 2.0)
DRAWN = ("karcher", "nre", "linear", "ties")
N_RESAMPLES = 2000

Record = dict[str, Any]


def main() -> None:
    args = parse_args()
    if args.report:
        runs = read_runs(args.workdir)
        print_report(runs)
        if args.figure is not None:
            draw_axes(runs).savefig(args.figure, dpi=150)
        return
    experts = find_experts(args.experts, args.family)
    for number in args.numbers:
        for seed in args.seeds:
            run(args, experts, number, seed)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").strip().splitlines()[0])
    parser.add_argument("--experts", type=Path, help="folder that train_experts.py wrote")
    parser.add_argument("--family", choices=("lora", "full"), default="lora", help="adapters, or full fine-tunes")
    parser.add_argument("--numbers", type=int, nargs="+", default=[2, 3, 5], help="numbers of experts to merge")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="each draws experts and passages")
    parser.add_argument("--tokens", type=int, default=1536, help="of every text, a quarter of them to choose scales")
    parser.add_argument("--workdir", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--report", action="store_true", help="print the tables of the runs that are there")
    parser.add_argument("--figure", type=Path, metavar="PNG", help="with --report: draw them, too")
    return parser.parse_args()


# ---- runs -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Expert:
    """One expert, and a text of its domain that was kept out of its training."""

    folder: Path
    text: Path


def find_experts(root: Path, family: str) -> list[Expert]:
    """Return the experts of a family, sorted by name; where there are two of a name, the demo's is left out."""
    found = {
        folder.name: Expert(folder, root / "texts" / f"{folder.name}.test.jsonl")
        for folder in (root / family).iterdir()
        if folder.is_dir()
    }
    if family == "lora":
        for folder in (DEMO_DATA / "experts").iterdir():
            found.setdefault(folder.name, Expert(folder, DEMO_DATA / f"{folder.name}.txt"))
    return [found[name] for name in sorted(found)]


def run(args: argparse.Namespace, experts: Sequence[Expert], number: int, seed: int) -> None:
    """Compare the methods on `number` experts that the seed draws; a finished run takes no time."""
    import torch

    from hf_frmerge.comparison.comparison import MergeComparison
    from hf_frmerge.demo.base import base_model_dir
    from hf_frmerge.evaluation.text.datasets import read_texts
    from hf_frmerge.merging.arguments.merging_arguments import MergingArguments

    torch.set_num_threads(1)
    shuffled = list(experts)
    random.Random(seed).shuffle(shuffled)
    chosen = shuffled[:number]
    folder = args.workdir / f"{args.family}-{number}-{seed}"
    print(f"{folder.name}: {', '.join(expert.folder.name for expert in chosen)}", flush=True)
    record = MergeComparison(
        [str(expert.folder) for expert in chosen],
        {expert.folder.name: read_texts(str(expert.text)) for expert in chosen},
        str(base_model_dir()),
        methods=METHODS,
        scales=SCALES,
        args=MergingArguments(output_dir=str(folder), seed=seed, per_device_eval_batch_size=8),
        max_tokens=args.tokens,
        eval_dtype="bfloat16",
        cache_dir=str(args.workdir / "cache"),
    ).run()
    (folder / "spread.json").write_text(json.dumps(spread_of(chosen, str(base_model_dir()))), encoding="utf-8")
    print(f"  best: {record.best.label} x {record.best.scale}, {record.best.score:.3f}", flush=True)


def spread_of(experts: Sequence[Expert], base: str) -> dict[str, float]:
    """Return how far apart the experts' deltas are: mean angle in degrees, and the largest norm over the smallest."""
    from hf_frmerge.merging.arguments.merging_arguments import MergingArguments
    from hf_frmerge.merging.inspection import inspect_experts
    from hf_frmerge.merging.planning.build_plan import build_plan

    args = MergingArguments(output_dir="unused", space="deltas", adapter_output="merged")
    with closing(build_plan([str(expert.folder) for expert in experts], args, None, base)) as plan:
        deltas = inspect_experts(plan).total.deltas
    assert deltas is not None
    return {"angle": degrees(deltas.mean_angle), "norm_ratio": max(deltas.norms) / min(deltas.norms)}


# ---- report ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A finished run: family, number of experts, seed, label -> what was measured, and how far apart they are."""

    family: str
    number: int
    seed: int
    methods: Mapping[str, Record]
    spread: Mapping[str, float]


def read_runs(workdir: Path) -> list[Run]:
    runs = []
    for path in sorted(workdir.glob("*-*-*/comparison.json")):
        family, number, seed = path.parent.name.split("-")
        methods = {row["label"]: row for row in json.loads(path.read_text(encoding="utf-8"))["methods"]}
        spread = json.loads((path.parent / "spread.json").read_text(encoding="utf-8"))
        runs.append(Run(family, int(number), int(seed), methods, spread))
    return runs


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
        print("\nPaired differences of the mean share, points of a percent, 95 % interval over runs\n")
        print_differences(own)


def print_spread(runs: Sequence[Run]) -> None:
    print("| N | runs | angle between deltas, degrees | largest norm over smallest |\n|---:|---:|---:|---:|")
    for number, group in by_number(runs).items():
        angles = [one.spread["angle"] for one in group]
        ratios = [one.spread["norm_ratio"] for one in group]
        print(f"| {number} | {len(group)} | {np.mean(angles):.1f} | {np.mean(ratios):.2f} |")


def print_table(runs: Sequence[Run], measure: Callable[[Record], float]) -> None:
    groups = by_number(runs)
    print(f"| method | {' | '.join(f'N = {number}' for number in groups)} |\n|---|{'---:|' * len(groups)}")
    for label in labels_of(runs):
        cells = []
        for group in groups.values():
            values = [measure(one.methods[label]) for one in group]
            cells.append(f"{np.mean(values):.1f} ± {np.std(values, ddof=1) if len(values) > 1 else 0:.1f}")
        print(f"| {label} | {' | '.join(cells)} |")


def print_differences(runs: Sequence[Run]) -> None:
    """Every run gives one difference; runs are drawn again for the interval."""
    print("| lead of | over | mean | interval | runs it leads in |\n|---|---|---:|---:|---:|")
    draw = np.random.default_rng(0)
    first = METHODS[0]
    for second in labels_of(runs)[1:]:
        leads = np.array([100 * (one.methods[first]["score"] - one.methods[second]["score"]) for one in runs])
        resampled = draw.choice(leads, (N_RESAMPLES, len(leads))).mean(axis=1)
        low, high = np.quantile(resampled, (0.025, 0.975))
        n_leads = int((leads > 0).sum())
        print(f"| {first} | {second} | {leads.mean():+.1f} | {low:+.1f} to {high:+.1f} | {n_leads} of {len(leads)} |")


@styled
def draw_axes(runs: Sequence[Run]) -> Figure:
    """Draw what is kept against the number of experts, and the lead of Karcher against how unlike the experts are."""
    figure = new_figure(WIDE, 3.1)
    kept, lead = figure.subplots(1, 2)
    for family, line in (("full", "-"), ("lora", "--")):
        own = [one for one in runs if one.family == family]
        for place, label in enumerate(DRAWN):
            colour = PALETTE[f"expert-{place + 1}"][0]
            points = {n: [100 * one.methods[label]["score"] for one in group] for n, group in by_number(own).items()}
            means = [float(np.mean(values)) for values in points.values()]
            kept.plot(list(points), means, line, marker="o", markersize=3, color=colour, label=f"{label}, {family}")
        for place, label in enumerate(DRAWN[1:], start=1):
            ratios = [one.spread["norm_ratio"] for one in own]
            leads = [100 * (one.methods[DRAWN[0]]["score"] - one.methods[label]["score"]) for one in own]
            marker = "o" if family == "full" else "^"
            colour = PALETTE[f"expert-{place + 1}"][0]
            lead.plot(ratios, leads, marker, markersize=5, color=colour, alpha=0.8, label=f"over {label}, {family}")
    layer_ticks(kept)
    tidy(kept, "number of experts", "share of the gains kept, %", grid="both")
    tidy(lead, "largest norm of a delta over the smallest", "lead of karcher, points", grid="both")
    lead.axhline(0.0, color=MUTED, linewidth=0.9)
    for axes in (kept, lead):
        axes.legend(frameon=False, fontsize=6.5, ncols=2, labelcolor=MUTED, handlelength=3)
    return figure


def by_number(runs: Iterable[Run]) -> dict[int, list[Run]]:
    groups: dict[int, list[Run]] = defaultdict(list)
    for one in runs:
        groups[one.number].append(one)
    return dict(sorted(groups.items()))


def labels_of(runs: Sequence[Run]) -> list[str]:
    """Return the methods in the order they were tried."""
    labels = [method.replace(",", " ") for method in METHODS]
    return [label for label in labels if all(label in one.methods for one in runs)]


if __name__ == "__main__":
    main()
