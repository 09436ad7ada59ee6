"""
Try the axes of the paper (arXiv 2603.04972) on real experts: how many, how far apart, how large, and what collapses.

    python scripts/train_experts.py --suite full lora 1m 4m --output-dir /tmp/experts
    python scripts/reproduce_paper.py --experts /tmp/experts --family lora --numbers 2 4 8 --workdir /tmp/paper
    python scripts/reproduce_paper.py --experts /tmp/experts --family full --numbers 2 5 --workdir /tmp/paper
    python scripts/reproduce_paper.py --experts /tmp/experts --family 1m --numbers 2 4 --workdir /tmp/paper
    python scripts/reproduce_paper.py --workdir /tmp/paper --report --figure docs/figures/paper_axes.png

Every run is a `MergeComparison`: all methods get the same scales, chosen on a quarter of the texts and reported on
the others. A seed decides which experts are merged (the first N of a shuffled list), and which passages are drawn. The
same command goes on where an interrupted one was. `--report` prints the tables of docs/results.md from what is there
(see `paper_report.py`), and `--figure` draws them. The small models were run with `--tokens 8192` and
`--scales 0.25 0.35 0.5 0.7 1 1.4`, since they are fast, and their experts in each other's way.

The experts of the demo are among the adapters, with the excerpts that it ships; all texts were kept out of training.
The family `mixed` has full fine-tunes and adapters of one base: several of them may be experts of one domain, each
with a gain of its own on the same text.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from math import degrees
from pathlib import Path

from paper_report import FACTS_FILE, draw_axes, print_report, read_runs
from small_models import SIZES

DEMO_DATA = Path(__file__).resolve().parents[1] / "hf_frmerge" / "demo" / "data"
METHODS = ("karcher", "nre", "linear", "ties", "della", "sce", "karcher,space=weights")
SCALES = (0.7, 1.0, 1.4, 2.0)
FAMILIES = {"full": ("full",), "lora": ("lora",), "mixed": ("full", "lora"), **{size: (size,) for size in SIZES}}
"""Family -> suites of `train_experts.py` that it is made of."""


def main() -> None:
    args = parse_args()
    if args.report:
        runs = read_runs(args.workdir)
        print_report(runs)
        if args.figure is not None:
            draw_axes(runs).savefig(args.figure, dpi=150)
        return
    experts, base = find_experts(args.experts, args.family), find_base(args.experts, args.family)
    for number in args.numbers:
        for seed in args.seeds:
            run(args, experts, base, number, seed)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").strip().splitlines()[0])
    parser.add_argument("--experts", type=Path, help="folder that train_experts.py wrote")
    parser.add_argument("--family", choices=FAMILIES, default="lora", help="which experts")
    parser.add_argument("--numbers", type=int, nargs="+", default=[2, 3, 5], help="numbers of experts to merge")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="each draws experts and passages")
    parser.add_argument("--methods", nargs="+", default=METHODS, help="karcher, whose leads are told, and others")
    parser.add_argument("--scales", type=float, nargs="+", default=SCALES, help="of the merged delta")
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
    """
    Return the experts of a family, sorted by name.

    The demo's adapters are left out where there are others of their name: what was kept out of the training of one
    may be among what the other was trained on.
    """
    experts = [
        Expert(folder, root / "texts" / f"{folder.name}.test.jsonl")
        for suite in FAMILIES[family]
        for folder in sorted((root / suite).iterdir())
        if folder.is_dir() and folder.name != "base"
    ]
    if "lora" in FAMILIES[family]:
        names = {expert.folder.name for expert in experts}
        for folder in (DEMO_DATA / "experts").iterdir():
            if folder.name not in names:
                experts.append(Expert(folder, DEMO_DATA / f"{folder.name}.txt"))
    return sorted(experts, key=lambda expert: expert.folder.name)


def find_base(root: Path, family: str) -> Path:
    """Return the base of a family: the demo's, unless one was made for it."""
    from hf_frmerge.demo.base import base_model_dir

    own = root / family / "base"
    return own if own.is_dir() else base_model_dir()


def run(args: argparse.Namespace, experts: Sequence[Expert], base: Path, number: int, seed: int) -> None:
    """Compare the methods on `number` experts that the seed draws; a finished run takes no time."""
    import torch

    from hf_frmerge.comparison.comparison import MergeComparison
    from hf_frmerge.evaluation.text.datasets import read_texts
    from hf_frmerge.merging.arguments.merging_arguments import MergingArguments

    torch.set_num_threads(1)
    shuffled = list(experts)
    random.Random(seed).shuffle(shuffled)
    chosen = shuffled[:number]
    folder = args.workdir / f"{args.family}-{number}-{seed}"
    print(f"{folder.name}: {', '.join(expert.folder.name for expert in chosen)}", flush=True)
    comparison = MergeComparison(
        [str(expert.folder) for expert in chosen],
        {expert.folder.name: read_texts(str(expert.text)) for expert in chosen},
        str(base),
        methods=args.methods,
        scales=args.scales,
        args=MergingArguments(output_dir=str(folder), seed=seed, per_device_eval_batch_size=8),
        max_tokens=args.tokens,
        eval_dtype="bfloat16",
        cache_dir=str(args.workdir / "cache"),
    )
    record = comparison.run()
    with comparison.bench() as (bench, _):
        gains = {place.name: (place.domain, place.gain) for place in bench.places["test"]}
    (folder / FACTS_FILE).write_text(json.dumps({**spread_of(chosen, base), "gains": gains}), encoding="utf-8")
    print(f"  best: {record.best.label} x {record.best.scale}, {record.best.score:.3f}", flush=True)


def spread_of(experts: Sequence[Expert], base: Path) -> dict[str, float]:
    """Return how far apart the experts' deltas are: mean angle in degrees, and the largest norm over the smallest."""
    from hf_frmerge.merging.arguments.merging_arguments import MergingArguments
    from hf_frmerge.merging.inspection import inspect_experts
    from hf_frmerge.merging.planning.build_plan import build_plan

    args = MergingArguments(output_dir="unused", space="deltas", adapter_output="merged")
    with closing(build_plan([str(expert.folder) for expert in experts], args, None, str(base))) as plan:
        deltas = inspect_experts(plan).total.deltas
    assert deltas is not None
    return {"angle": degrees(deltas.mean_angle), "norm_ratio": max(deltas.norms) / min(deltas.norms)}


if __name__ == "__main__":
    main()
