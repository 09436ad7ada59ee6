"""
Time the merge of LoRA adapters into one adapter, as a whole process, and set it beside PEFT's `svd` combination.

    python scripts/bench_adapters.py --workdir /tmp/bench

The adapters are synthetic: seeded normal factors in the shape of a Llama 2 7B with all linear layers adapted (224
modules). Weights do not matter for the time; shapes do.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

# Rows and columns of the seven linear layers of one Llama 2 7B layer.
LLAMA_7B = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (4096, 4096),
    "self_attn.v_proj": (4096, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (11008, 4096),
    "mlp.up_proj": (11008, 4096),
    "mlp.down_proj": (4096, 11008),
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--workdir", type=Path, default=Path("bench-adapters"), help="where adapters are made and merged"
    )
    parser.add_argument("--adapters", type=int, default=5)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--workers", type=int, default=None, help="threads of the merge")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each; the fastest counts")
    parser.add_argument(
        "--peft-size", type=int, default=2048, help="side of the square module PEFT merges; 0 skips it"
    )
    parser.add_argument("--run", choices=["exact", "recompressed", "energy"], help=argparse.SUPPRESS)
    return parser.parse_args()


def make_adapters(args: argparse.Namespace) -> None:
    import numpy as np

    from hf_frmerge.checkpoints.adapters.writer import AdapterModule, make_config, new_adapter

    modules = [
        AdapterModule(f"model.layers.{layer}.{name}", "linear", args.rank, rows, (cols,))
        for layer in range(args.layers)
        for name, (rows, cols) in LLAMA_7B.items()
    ]
    config = make_config({"base_model_name_or_path": "synthetic/llama-7b", "task_type": "CAUSAL_LM"}, modules)
    for index in range(args.adapters):
        folder = args.workdir / f"adapter-{index}"
        if (folder / "adapter_config.json").exists():
            continue
        rng = np.random.default_rng(index)
        with new_adapter(folder, modules, config, "BF16") as writer:
            for module in modules:
                up = rng.standard_normal((module.n_out, module.rank), dtype=np.float32)
                down = rng.standard_normal((module.rank, *module.input_shape), dtype=np.float32)
                writer.write(module, up * 1e-2, down * 1e-2)


def merge(args: argparse.Namespace) -> None:
    """Run in a process of its own, so that time and memory are those of one merge."""
    from hf_frmerge.merging.arguments.merging_arguments import MergingArguments
    from hf_frmerge.merging.engine.outcomes import StepObserver
    from hf_frmerge.merging.engine.processes import Processes
    from hf_frmerge.merging.planning.build_plan import build_plan
    from hf_frmerge.merging.run import run_merge

    imported = time.process_time()
    options = {"exact": {}, "recompressed": {"adapter_rank": args.rank}, "energy": {"adapter_energy": 0.5}}[args.run]
    output = str(args.workdir / f"merged-{args.run}")
    arguments = MergingArguments(output, num_workers=args.workers, overwrite=True, **options)
    plan = build_plan([str(args.workdir / f"adapter-{i}") for i in range(args.adapters)], arguments)
    report = run_merge(plan, StepObserver(), Processes()).report
    usage = resource.getrusage(resource.RUSAGE_SELF)
    facts = {
        "modules": report.n_merged,
        "rank": report.factors.max_rank,
        "truncation_error": report.factors.truncation_error,
        "cpu": usage.ru_utime + usage.ru_stime,
        "cpu_import": imported,
        "peak_mb": usage.ru_maxrss / 1024,
    }
    print(json.dumps(facts))


def timed_merge(args: argparse.Namespace, run: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--run", run, "--workdir", str(args.workdir), "--rank", str(args.rank)]
    command += ["--adapters", str(args.adapters), "--layers", str(args.layers)]
    command += ["--workers", str(args.workers)] if args.workers else []
    best: dict[str, float] = {}
    for _ in range(args.repeat):
        start = time.perf_counter()
        finished = subprocess.run(command, check=True, capture_output=True, text=True)
        seconds = time.perf_counter() - start
        if not best or seconds < best["seconds"]:
            best = json.loads(finished.stdout) | {"seconds": seconds}
    return best


def time_peft(args: argparse.Namespace, size: int) -> float:
    """Seconds of PEFT's `svd` combination for one square module of this size."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=args.rank, target_modules=["linear"], init_lora_weights=False)
    base = torch.nn.ModuleDict({"linear": torch.nn.Linear(size, size, bias=False)})
    model = get_peft_model(base, config, adapter_name="0")
    for index in range(1, args.adapters):
        model.add_adapter(str(index), config)
    names = [str(index) for index in range(args.adapters)]
    start = time.perf_counter()
    model.base_model.add_weighted_adapter(
        names, [1 / len(names)] * len(names), "merged", combination_type="svd", svd_rank=args.rank * len(names)
    )
    return time.perf_counter() - start


def main() -> None:
    args = parse_args()
    if args.run:
        merge(args)
        return
    make_adapters(args)
    shapes = list(LLAMA_7B.values()) * args.layers
    print(f"{args.adapters} adapters of rank {args.rank}, {len(shapes)} modules, bf16; best of {args.repeat} runs")
    print("| merge | rank | truncation error | seconds, whole process | CPU seconds | peak memory |")
    print("|---|---:|---:|---:|---:|---:|")
    for run in ("exact", "recompressed", "energy"):
        facts = timed_merge(args, run)
        print(
            f"| {run} | {facts['rank']} | {facts['truncation_error']:.3f} | {facts['seconds']:.2f} "
            f"| {facts['cpu']:.2f} | {facts['peak_mb']:.0f} MiB |",
            flush=True,
        )
    if args.peft_size:
        small, size = args.peft_size // 2, args.peft_size
        times = {side: min(time_peft(args, side) for _ in range(args.repeat)) for side in (small, size)}
        # A dense SVD of an (m, n) matrix costs m * n * min(m, n) operations.
        work = sum(rows * cols * min(rows, cols) for rows, cols in shapes)
        hours = times[size] * work / size**3 / 3600
        print(f"\nPEFT `svd` at {small}²: {times[small]:.2f} s, at {size}²: {times[size]:.2f} s for one module.")
        print(f"Extrapolated by m·n·min(m, n) to all {len(shapes)} modules: {hours:.1f} h (not run).")


if __name__ == "__main__":
    main()
