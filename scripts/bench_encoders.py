"""
Measure how much of what classifiers learned is left in a merge of their encoders, without data and fitted to prompts.

    python scripts/bench_encoders.py --base BASE --suite FOLDER --texts FOLDER [--prompts 16 64 256]

A suite is a folder with one encoder per task, and in `TASK/classifier` the whole classifier with its head; the texts'
folder has for every task `TASK.calibration.jsonl` (a column `text`) and `TASK.test.jsonl` (`text` and `label`).
`scripts/train_experts.py` makes both. The heads have different labels, so the encoders alone are merged, and every
task is judged with its own head on the merged encoder.

Recovery of a task is (merged - base) / (expert - base) in accuracy, with the expert's head on each. BERT's pooler, a
layer between the first token and the head, is part of the encoder and merged with it. Other architectures have it in
the head (as RoBERTa), where it stays each expert's own; the last two columns are measured so, on base, experts and
merges alike.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
from itertools import islice, product
from pathlib import Path

import numpy as np
import torch
from bench_function_space import print_spreads, recovery
from numpy.typing import NDArray
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

LENGTH = 64
"""Tokens of a text at most, as in the training."""

HEADS = (False, True)
"""Whether the pooler is that of the encoder, or each expert's own."""


def main() -> None:
    args = parse_args()
    torch.set_num_threads(1)
    tasks = sorted(path.name for path in args.suite.iterdir() if path.is_dir())
    tests = {task: read(args.texts / f"{task}.test.jsonl", args.tests) for task in tasks}
    n_tests = min(len(rows) for rows in tests.values())
    print(f"{', '.join(tasks)}; {n_tests} test texts or more a task")
    base = {
        (task, own): errors(args.suite, task, str(args.base), tests[task], own_pooler=own)
        for task, own in product(tasks, HEADS)
    }
    expert = {task: errors(args.suite, task, None, tests[task]) for task in tasks}
    for task in tasks:
        of_base = ", with the expert's pooler ".join(f"{1 - base[task, own].mean():.3f}" for own in HEADS)
        print(f"  {task}: base {of_base}, expert {1 - expert[task].mean():.3f}")
    print(f"| merge | {' | '.join(tasks)} | mean | worst | CPU s | mean, own pooler | worst, own pooler |")
    print("|---|" + "---:|" * (len(tasks) + 5), flush=True)
    given = [f"--calibration={args.suite / task}={args.texts / f'{task}.calibration.jsonl'}" for task in tasks]
    rows = [(method, ["--method", method]) for method in args.methods]
    for count, seed in product(args.prompts, args.seeds):
        counts = [f"--num-calibration-samples={count}", f"--max-calibration-length={LENGTH}", f"--seed={seed}"]
        name = f"{args.start}, fitted to {count} prompts a task"
        rows.append((name, [*given, "--method", args.start, *counts]))
    by_name: dict[str, list[list[float]]] = {}
    for name, options in rows:
        seconds = merge(args, tasks, options)
        found = {
            own: [
                recovery(
                    base[task, own],
                    expert[task],
                    errors(args.suite, task, str(args.workdir), tests[task], own_pooler=own),
                )
                for task in tasks
            ]
            for own in HEADS
        }
        print(row(name, seconds, found), flush=True)
        for own, suffix in zip(HEADS, ("", ", own pooler")):
            by_name.setdefault(name + suffix, []).append([value for value, _ in found[own]])
    print_spreads(by_name)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").strip().splitlines()[0])
    parser.add_argument("--base", type=Path, required=True, help="folder of the base encoder")
    parser.add_argument("--suite", type=Path, required=True, help="folder with one encoder per task")
    parser.add_argument("--texts", type=Path, required=True, help="folder of the texts")
    parser.add_argument("--methods", nargs="*", default=["linear", "karcher"], help="merges without data")
    parser.add_argument("--prompts", nargs="*", type=int, default=[16, 64, 256], help="prompts a task")
    parser.add_argument("--seeds", nargs="*", type=int, default=[42], help="seeds of the choice of prompts")
    parser.add_argument("--start", default="karcher", help="method the fits start from")
    parser.add_argument("--tests", type=int, default=2000, help="test texts a task at most")
    parser.add_argument("--workdir", type=Path, default=Path("bench-encoders"))
    return parser.parse_args()


def row(name: str, seconds: float, found: dict[bool, list[tuple[float, float]]]) -> str:
    """Return a row of the table; `found` has recovery and standard error of every task, for both kinds of heads."""
    cells = " | ".join(f"{value:.3f} ± {error:.3f}" for value, error in found[False])
    values = {own: [value for value, _ in found[own]] for own in HEADS}
    summary, own_summary = (f"{np.mean(values[own]):.3f} | {min(values[own]):.3f}" for own in HEADS)
    return f"| {name} | {cells} | {summary} | {seconds:.0f} | {own_summary} |"


def merge(args: argparse.Namespace, tasks: list[str], options: list[str]) -> float:
    """Merge in another process; return its CPU seconds."""
    experts = [str(args.suite / task) for task in tasks]
    command = [
        sys.executable, "-c", "from hf_frmerge.cli.main import main; main()", "merge", *experts,
        "--base-model", str(args.base),
        "--space", "deltas", "--output-dir", str(args.workdir), "--overwrite", "--disable-tqdm", *options,
    ]  # fmt: skip
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def read(file: Path, n_rows: int) -> list[dict]:
    with file.open(encoding="utf-8") as lines:  # not `splitlines`, which also splits at separators within texts
        return [json.loads(line) for line in islice(lines, n_rows)]


def errors(
    suite: Path, task: str, encoder: str | None, rows: list[dict], *, own_pooler: bool = False
) -> NDArray[np.float64]:
    """
    Return 1 for every text the task's head is wrong about, on another encoder if one is given; `(texts, 1)`.

    With `own_pooler` the pooler stays that of the task, as its head does.
    """
    folder = suite / task / "classifier"
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if encoder is not None:
        own = model.base_model.state_dict()
        other = AutoModel.from_pretrained(encoder).state_dict()
        model.base_model.load_state_dict(
            {name: own[name] if own_pooler and name.startswith("pooler.") else other[name] for name in own}
        )
    found = []
    with torch.inference_mode():
        for start in range(0, len(rows), 32):
            part = rows[start : start + 32]
            texts = tokenizer(
                [row["text"] for row in part], truncation=True, max_length=LENGTH, padding=True, return_tensors="pt"
            )
            numbers = model.config.label2id or {}
            labels = [numbers.get(row["label"], row["label"]) for row in part]
            found.append((model(**texts).logits.argmax(-1) != torch.tensor(labels)).numpy())
    return np.concatenate(found).astype(np.float64)[:, None]


if __name__ == "__main__":
    main()
