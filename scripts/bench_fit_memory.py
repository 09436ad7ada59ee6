"""
Fit a merge of one wide transformer block to prompts, and watch the memory: a fit holds one block of every model.

    python scripts/bench_fit_memory.py --hidden 2048 --intermediate 7168 --experts 5 --prompts 64

A Llama of one block and its fine-tunes are written below `--work-dir`, with random weights; prompts are random tokens.
A deeper model takes the same memory, but for the time, and for the held-out hidden states of each form of the fit.
Prints what each process of the fit allocated at most, without the mapped pages of its inputs, beside what the one with
most experts should on paper:

* what the interpreter and its libraries take;
* in float32 the block of every expert of the process, of the merge and of what it becomes;
* the hidden states of merge and expert of the prompts of these experts, in float32;
* the larger of two: of the prompts to fit what enters the layers of the block, in bfloat16, and the states before
  each of the two layers that write to them, in float32; or what is left of this when the widest layer is fitted, with
  the systems of that layer: of n inputs and m outputs 16 n² + 24 n m bytes, when the start of full fine-tunes is
  solved for (float32 Gram matrices of inputs and updates, and a Cholesky factor in float64; right-hand sides of both
  and weights of base and start in float32, and right-hand sides in float64).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from bench_memory import watch
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 512
HEAD = 64  # width of an attention head
LENGTH = 128  # tokens of a prompt
LIBRARIES = 0.38e9  # what a process that has imported torch, transformers and datasets takes
UPDATE = 0.02  # norm of an expert's update over that of the weights


def main() -> None:
    args = parse_args()
    with tempfile.TemporaryDirectory(dir=args.work_dir) as folder:
        models, prompts = write_models(Path(folder), args), write_prompts(Path(folder), args)
        command = [str(Path(sys.executable).with_name("frmerge")), "merge", *map(str, models[1:])]
        command += ["--base-model", str(models[0]), "--output-dir", str(Path(folder) / "out")]
        command += [f"--calibration={model}={file}" for model, file in zip(models[1:], prompts)]
        command += ["--num-calibration-samples", str(args.prompts), "--max-calibration-length", str(LENGTH)]
        started = time.perf_counter()
        processes = start(command, args.processes)
        with ThreadPoolExecutor(args.processes) as pool:
            peaks = [peak["RssAnon"] for peak in pool.map(watch, processes)]
        if max(process.wait() for process in processes):
            raise SystemExit("The merge failed.")
        seconds = time.perf_counter() - started
    print(
        f"{args.experts} experts of one block {args.hidden} x {args.intermediate}, {args.prompts} prompts of {LENGTH} "
        f"tokens each: {seconds:.0f} s, load {os.getloadavg()[0]:.1f}"
    )
    told = ", ".join(f"{peak / 1e9:.2f}" for peak in peaks)
    print(f"peak anonymous memory of each process {told} GB; on paper {on_paper(args) / 1e9:.2f} GB")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").strip().splitlines()[0])
    parser.add_argument("--hidden", type=int, default=2048, help="width of the hidden states (7 B: 4096)")
    parser.add_argument("--intermediate", type=int, default=7168, help="inputs of the widest layer (7 B: 14336)")
    parser.add_argument("--experts", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=64, help="of each expert")
    parser.add_argument("--processes", type=int, default=1, help="that share the fit")
    parser.add_argument("--work-dir", type=Path, help="where the models go; by default a temporary folder")
    return parser.parse_args()


def start(command: list[str], n_processes: int) -> list[subprocess.Popen[bytes]]:
    """Start a command as often as it is to run, with what a launcher sets in the environment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(n_processes)}
    shared = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"} | (where if n_processes > 1 else {})
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(n_processes)]
    return [subprocess.Popen(command, stdout=subprocess.DEVNULL, env=shared | rank) for rank in ranks]


def write_models(folder: Path, args: argparse.Namespace) -> list[Path]:
    """Write a base and its fine-tunes, all weights of which moved a little, and return their folders."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=1,
        num_attention_heads=args.hidden // HEAD,
        num_key_value_heads=args.hidden // HEAD // 4,
        vocab_size=VOCABULARY,
        max_position_embeddings=LENGTH,
        dtype="bfloat16",
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    base = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    folders = []
    for number in range(args.experts + 1):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                step = UPDATE * base[name].float().std().nan_to_num() if number else 0.0
                parameter.copy_(base[name] + step * torch.randn_like(parameter))
        folders.append(folder / ("base" if number == 0 else f"expert-{number}"))
        model.save_pretrained(folders[-1])
    return folders


def write_prompts(folder: Path, args: argparse.Namespace) -> list[Path]:
    draw, files = np.random.default_rng(0), []
    for number in range(args.experts):
        rows = [{"input_ids": draw.integers(VOCABULARY, size=LENGTH).tolist()} for _ in range(args.prompts)]
        files.append(folder / f"prompts-{number}.jsonl")
        files[-1].write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return files


def on_paper(args: argparse.Namespace) -> float:
    """Return the bytes that a process of a fit should take at most."""
    hidden, inner, experts = args.hidden, args.intermediate, math.ceil(args.experts / args.processes)
    tokens = experts * args.prompts * LENGTH
    block = hidden * hidden * 2.5 + 3 * hidden * inner  # keys and values have a quarter of the heads
    weights = 4 * block * (experts + 2)
    fitted = tokens * 7 / 8
    all_layers = fitted * (2 * (3 * hidden + inner) + 2 * 4 * hidden)
    widest = fitted * (2 * inner + 4 * hidden) + 16 * inner * inner + 24 * inner * hidden
    return LIBRARIES + weights + tokens * 2 * 4 * hidden + max(all_layers, widest)


if __name__ == "__main__":
    main()
