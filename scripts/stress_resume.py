"""
Kill merges with SIGKILL at random moments, resume them, and count what came out.

    python scripts/stress_resume.py --kills 200 --seed 0
    python scripts/stress_resume.py --kills 100 --fitted --layers 1

A warm process forks a child that merges; the child is killed at a random moment of its merge, and every fifth time
just when it gives its files their names. What it leaves is looked at as a loader would, then resumed in a new child,
which may be killed in turn. In the end every byte is compared with a merge that nobody disturbed. The exit code is 1
if any resumed merge differs, or if an unfinished folder could be taken for a model. With `--fitted` the merges are
fitted to prompts and refined, and what the experts write for that is not in the cache.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import bench_models
import torch
import transformers

from hf_frmerge import FisherRaoMerger
from hf_frmerge.merging.arguments.merging_arguments import MergingArguments

WAYS: list[dict[str, Any]] = [
    {"block": "tensor"},
    {"block": "tensor", "max_shard_size": "5MB", "method": "linear"},
    {"block": "layer", "max_shard_size": "20MB"},
    {"block": "row", "num_workers": 1},
    {"block": "model", "max_shard_size": "5MB"},
]
FITTED_WAYS: list[dict[str, Any]] = [
    {"calibration_form": "auto"},
    {"method": "linear", "calibration_form": "low_rank", "refine_steps": 12},
    {"calibration_form": "dense", "refine_steps": 12, "refine_written_samples": 4},
    {"calibration_form": "table", "refine_steps": 12, "refine_loss": "reverse_kl", "refine_lmbda": 0.5},
    {"method": "regmean", "space": "deltas"},
]
FITTED_OPTIONS: dict[str, Any] = {
    "num_calibration_samples": 8, "max_calibration_length": 32, "calibration_rank": 4, "space": "deltas",
}  # fmt: skip
STATES = (
    "no file yet",
    "files laid out, no tensor finished",
    "some tensors finished",
    "all tensors finished, none named",
    "some files named, no config.json",
    "model complete",
)


@dataclass
class Counts:
    """What was seen."""

    kills: int = 0
    states: Counter[str] = field(default_factory=Counter)
    merges: int = 0
    identical: int = 0
    accepted: int = 0
    tried_to_load: int = 0
    loaded: int = 0


class Stress:
    """Merges of one family of models, and the outputs they should have."""

    def __init__(self, work: Path, seed: int, *, fitted: bool) -> None:
        self.out, self.cache = work / "out", work / "cache"
        self.random = random.Random(seed)
        self.counts = Counts()
        base, experts = bench_models.ensure_models(work / "models", "stress", 3)
        self.experts = [str(path) for path in experts]
        self.ways = [FITTED_OPTIONS | way for way in FITTED_WAYS] if fitted else WAYS
        self.inputs: dict[str, Any] = {"base_model": str(base), "calibration_dataset": prompts()} if fitted else {}
        os.environ["HF_FRMERGE_CACHE"] = str(self.cache)
        self.expected, self.seconds = [], []
        for index, way in enumerate(self.ways):
            child, started = self._start(way, work / f"whole-{index}", resume=False), time.perf_counter()
            if os.waitpid(child, 0)[1]:
                raise SystemExit("A merge that was not disturbed failed.")
            self.seconds.append(time.perf_counter() - started)
            self.expected.append(contents(work / f"whole-{index}"))
        if not loads(work / "whole-0"):
            raise SystemExit("transformers does not load the finished model, so it proves nothing on unfinished ones.")

    def run_one(self) -> None:
        """Kill one merge, perhaps more than once, and resume it to its end."""
        for folder in (self.out, self.cache):
            shutil.rmtree(folder, ignore_errors=True)
        number = self.random.randrange(len(self.ways))
        resume, killed = False, False
        while not self._is_complete():
            child = self._start(self.ways[number], self.out, resume=resume)
            if not resume or self.random.random() < 0.4:
                killed |= self._kill(child, self.seconds[number])
            elif os.waitpid(child, 0)[1]:
                return self._end(False)
            resume = True
        if killed:
            self._end(contents(self.out) == self.expected[number])

    def _end(self, identical: bool) -> None:
        self.counts.merges += 1
        self.counts.identical += identical

    def _start(self, way: dict[str, Any], out: Path, *, resume: bool) -> int:
        """Fork a child that merges; return its id when it is about to begin."""
        ready, begin = os.pipe()
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os.write(begin, b"!")
                arguments = MergingArguments(
                    output_dir=str(out), resume_from_checkpoint=resume, disable_tqdm=True, logging_steps=10**9, **way
                )
                merger = FisherRaoMerger(self.experts, arguments, **self.inputs)
                for callback in list(merger.callback_handler.callbacks):
                    merger.remove_callback(callback)  # nothing to print
                merger.merge()
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        os.read(ready, 1)
        os.close(ready)
        os.close(begin)
        return child

    def _kill(self, child: int, seconds: float) -> bool:
        """Kill a child at a random moment and look at what it left; False if it had ended before."""
        if self.random.random() < 0.2:
            while not list(self.out.glob("*.safetensors")) and os.waitpid(child, os.WNOHANG) == (0, 0):
                time.sleep(0.0002)
            time.sleep(self.random.uniform(0, 0.005))
        else:
            time.sleep(self.random.uniform(0, 1.1 * seconds))
        try:
            os.kill(child, signal.SIGKILL)
            status = os.waitpid(child, 0)[1]
        except (ProcessLookupError, ChildProcessError):
            return False
        if not os.WIFSIGNALED(status):
            return False
        self.counts.kills += 1
        state = self._state()
        self.counts.states[state] += 1
        if state == STATES[-1]:
            return True
        self.counts.accepted += loader_accepts(self.out)
        if self.random.random() < 0.1 or not self.counts.tried_to_load:
            self.counts.tried_to_load += 1
            self.counts.loaded += loads(self.out)
        return True

    def _is_complete(self) -> bool:
        return loader_accepts(self.out) and (self.out / "merge_manifest.json").exists()

    def _state(self) -> str:
        if self._is_complete():
            return STATES[5]
        if not (self.out / ".frmerge").exists():
            return STATES[0]
        if list(self.out.glob("model*.safetensors")):
            return STATES[4]
        lines = [
            line for path in self.out.glob(".frmerge/journal-*.jsonl") for line in path.open() if line[-1] == "\n"
        ]
        records = [json.loads(line)[0] for line in lines]
        finished = {record["tensor"] for record in records if record["kind"] == "written"}
        if not finished:
            return STATES[1]
        return STATES[2 if len(finished) < len(bench_models.shapes("stress")) else 3]


def prompts() -> list[dict[str, list[int]]]:
    """Tokens for experts to be fitted on: what they are does not matter to the bits."""
    draw = random.Random(0)
    return [{"input_ids": [draw.randrange(bench_models.SIZES["stress"][4]) for _ in range(32)]} for _ in range(8)]


def contents(folder: Path) -> dict[str, bytes]:
    """Weights, index, config and coefficients: all that must be the same."""
    return {
        path.name: path.read_bytes()
        for path in sorted(folder.iterdir())
        if path.suffix in (".safetensors", ".json") and not path.name.startswith((".", "merge_manifest"))
    }


def loader_accepts(folder: Path) -> bool:
    """Whether a folder has what loaders ask for: a config, and weights or an index whose shards are all there."""
    if not (folder / "config.json").exists():
        return False
    index = folder / "model.safetensors.index.json"
    if index.exists():
        shards = set(json.loads(index.read_text())["weight_map"].values())
        return all((folder / shard).exists() for shard in shards)
    return (folder / "model.safetensors").exists()


def loads(folder: Path) -> bool:
    """Whether transformers loads a model from a folder."""
    try:
        transformers.AutoConfig.from_pretrained(folder)
        transformers.AutoModelForCausalLM.from_pretrained(folder)
    except (OSError, ValueError):
        return False
    return True


def report(counts: Counts) -> Iterator[str]:
    """Yield the lines of the report."""
    yield "| the kill found | times |\n|---|---|"
    yield from (f"| {state} | {counts.states[state]} |" for state in STATES)
    yield f"\n{counts.kills} kills in {counts.merges} merges."
    yield f"Resumed or complete, and bit-identical: {counts.identical} of {counts.merges}."
    unfinished = counts.kills - counts.states[STATES[-1]]
    yield f"Unfinished folders with all that a loader asks for: {counts.accepted} of {unfinished}."
    yield f"Unfinished folders that transformers loaded: {counts.loaded} of {counts.tried_to_load} tried."


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="stop after the merge in which this many is reached")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fitted", action="store_true", help="fit the merges to prompts, and refine some of them")
    parser.add_argument("--layers", type=int, default=8, help="size of the models: 3 million parameters a layer")
    parser.add_argument("--work-dir", type=Path, help="where models and outputs go; by default a temporary folder")
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)  # its threads would not survive the fork
    bench_models.SIZES["stress"] = (512, 1376, options.layers, 512, 4000)
    with tempfile.TemporaryDirectory(dir=options.work_dir) as folder:
        stress, started = Stress(Path(folder), options.seed, fitted=options.fitted), time.perf_counter()
        slowest, fastest = max(stress.seconds), min(stress.seconds)
        print(f"An undisturbed merge takes {fastest:.2f} to {slowest:.2f} s; seed {options.seed}.", flush=True)
        while stress.counts.kills < options.kills:
            stress.run_one()
    counts = stress.counts
    print("\n".join(report(counts)))
    print(f"{time.perf_counter() - started:.0f} s.")
    sys.exit(counts.identical != counts.merges or counts.accepted > 0 or counts.loaded > 0)


if __name__ == "__main__":
    main()
