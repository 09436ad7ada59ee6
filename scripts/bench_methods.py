"""
Time every method as a whole process, beside mergekit's where it has the method and is installed somewhere.

    python scripts/bench_methods.py --size 0.5b --experts 4
    python scripts/bench_methods.py --size 0.1b --methods ties della --mergekit ~/mergekit-venv/bin/mergekit-yaml

Inputs are those of `bench_merge.py`: generated fine-tunes in bfloat16 below `--work-dir`, which are kept. Every round
runs all candidates once, in turn, so that a machine that slows down slows all of them; medians are printed, of wall
and of CPU seconds, with their ratios to our `linear`. Ratios of CPU seconds hold on a machine that others use too.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
from pathlib import Path

from bench_merge import Candidate, run
from bench_models import SIZES, ensure_models

from hf_frmerge.methods.table import METHODS

BLOCK = "merge_method: {method}\n{base}models:\n{models}\ndtype: bfloat16\n{parameters}"
# Our name -> mergekit's, what it needs for each expert, and for all. It has no consensus, nre or geometric median.
MERGEKIT: dict[str, tuple[str, str, str]] = {
    "linear": ("linear", "weight: 1.0", ""),
    "karcher": ("karcher", "", ""),
    "slerp": ("slerp", "", "t: 0.5"),
    "nuslerp": ("nuslerp", "weight: 1.0", ""),
    "multislerp": ("multislerp", "weight: 1.0", ""),
    "task_arithmetic": ("task_arithmetic", "weight: 1.0", ""),
    "model_stock": ("model_stock", "", ""),
    "ties": ("ties", "weight: 1.0, density: 0.2", ""),
    "dare_linear": ("dare_linear", "weight: 1.0, density: 0.8", ""),
    "dare_ties": ("dare_ties", "weight: 1.0, density: 0.8", ""),
    "della": ("della", "weight: 1.0, density: 0.7, epsilon: 0.07", ""),
    "breadcrumbs": ("breadcrumbs", "weight: 1.0, density: 0.1, gamma: 0.01", ""),
    "sce": ("sce", "", "select_topk: 0.1"),
    "ram": ("ram", "", ""),
}


def candidates(
    base: Path, experts: list[Path], methods: list[str], work: Path, mergekit: str | None
) -> list[Candidate]:
    """Return everything to time; a method for two experts gets the first two."""
    found = []
    for name in methods:
        method = METHODS[name]
        some = experts[: method.n_experts]
        out = work / f"out-{name}"
        command = [str(Path(sys.executable).with_name("frmerge")), "merge", *map(str, some), "--method", name]
        command += ["--output-dir", str(out)] + (["--base-model", str(base)] if method.needs_deltas else [])
        found.append(Candidate(f"frmerge {name}", command, out))
        if mergekit is None or name not in MERGEKIT:
            continue
        theirs, each, shared = MERGEKIT[name]
        out, config = work / f"out-mergekit-{name}", work / f"mergekit-{name}.yml"
        # Its slerp takes the first of the two as the base.
        of_base = base if method.needs_deltas else some[0] if theirs == "slerp" else None
        own = f"\n    parameters: {{{each}}}" if each else ""
        config.write_text(
            BLOCK.format(
                method=theirs,
                base="" if of_base is None else f"base_model: {of_base}\n",
                models="\n".join(f"  - model: {expert}{own}" for expert in some),
                parameters=f"parameters: {{{shared}}}" if shared else "",
            )
        )
        found.append(Candidate(f"mergekit {name}", [mergekit, str(config), str(out), "--quiet", "-j", "1"], out))
    return found


def report(found: list[Candidate], n: int) -> None:
    """Print one row for every candidate."""
    wall = {c.name: statistics.median(c.seconds) for c in found}
    cpu = {c.name: statistics.median(c.cpu) for c in found}
    print(f"\nN = {n}, medians\n| | runs | wall s (min..max) | x linear | CPU s | x linear | anonymous MB |")
    print("|---|---|---|---|---|---|---|")
    for c in found:
        print(
            f"| {c.name} | {len(c.seconds)} | {wall[c.name]:.2f} ({min(c.seconds):.2f}..{max(c.seconds):.2f}) "
            f"| {wall[c.name] / wall['frmerge linear']:.2f} | {cpu[c.name]:.2f} "
            f"| {cpu[c.name] / cpu['frmerge linear']:.2f} | {max(c.anonymous) / 1e6:.0f} |"
        )


def main() -> None:
    """Run the benchmark from the command line."""
    of_full_models = {name: method for name, method in METHODS.items() if not method.needs_factors}
    known = [name for name, method in of_full_models.items() if method.kind not in ("calibrated", "given")]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="0.1b")
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--methods", choices=known, nargs="+", default=known, help="linear is always timed")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--work-dir", type=Path, default=Path("bench"))
    parser.add_argument("--mergekit", help="path of mergekit-yaml, in an environment of its own")
    options = parser.parse_args()
    print(f"{len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f} at the start")
    folder = options.work_dir / options.size
    base, models = ensure_models(folder, options.size, options.experts)
    inputs = [path for model in [base, *models[: options.experts]] for path in model.glob("*.safetensors")]
    methods = list(dict.fromkeys(["linear", *options.methods]))
    found = candidates(base, models[: options.experts], methods, folder, options.mergekit)
    for _ in range(options.repeats):
        for candidate in found:
            run(candidate, inputs)
            shutil.rmtree(candidate.out, ignore_errors=True)
    report(found, options.experts)


if __name__ == "__main__":
    main()
