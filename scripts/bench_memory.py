"""
Merge one huge tensor and watch the memory: it must not grow with the tensor.

    python scripts/bench_memory.py --size-gib 4 --experts 5

Writes experts of one bf16 tensor each below `--work-dir` (which takes N + 1 times `--size-gib` of disk until the end),
merges them with `frmerge merge` and its default memory budget, and polls the anonymous memory of that process: what it
has allocated itself, without the pages of its input files, which the system can take back at any time. The exit code
is 1 if the peak is above the budget plus 250 MB for the interpreter and its libraries.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from hf_frmerge.merging.arguments.merging_arguments import MergingArguments

_ALLOWANCE = 250_000_000
_COLUMNS = 8192
_PATTERN = 32 << 20  # bytes of noise, repeated: the merge does not know that the next 32 MiB are the same


def write_expert(folder: Path, size: int, seed: int) -> None:
    """Write a checkpoint of one bf16 tensor of `size` bytes: noise that all share, and noise of its own."""
    folder.mkdir()
    rows = size // (2 * _COLUMNS)
    header = {"weight": {"dtype": "BF16", "shape": [rows, _COLUMNS], "data_offsets": [0, rows * 2 * _COLUMNS]}}
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    common, own = (np.random.default_rng(s).standard_normal(_PATTERN // 2, dtype=np.float32) for s in (0, seed + 1))
    pattern = memoryview(((common + 0.3 * own).view(np.uint32) >> 16).astype(np.uint16)).cast("B")
    with (folder / "model.safetensors").open("wb", buffering=0) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        left = rows * 2 * _COLUMNS
        while left:
            left -= file.write(pattern[: min(left, _PATTERN)])
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))


def watch(process: subprocess.Popen[bytes]) -> dict[str, int]:
    """Return the peaks of anonymous and of resident memory of a process until it ends, in bytes."""
    peaks = {"RssAnon": 0, "VmRSS": 0}
    while process.poll() is None:
        try:
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        except OSError:
            break
        for name, *values in (line.replace(":", "").split() for line in lines):
            if name in peaks:
                peaks[name] = max(peaks[name], int(values[0]) * 1024)
        time.sleep(0.005)
    return peaks


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size-gib", type=float, default=4)
    parser.add_argument("--experts", type=int, default=5)
    parser.add_argument("--block", default="tensor")
    parser.add_argument("--work-dir", type=Path, help="where the models go; by default a temporary folder")
    options = parser.parse_args()
    size = int(options.size_gib * 2**30)
    budget = MergingArguments().memory_budget_bytes
    with tempfile.TemporaryDirectory(dir=options.work_dir) as folder:
        free = shutil.disk_usage(folder).free
        if free < (options.experts + 2) * size:
            raise SystemExit(f"{(options.experts + 2) * size / 1e9:.0f} GB of disk are needed, {free / 1e9:.0f} free.")
        experts = [Path(folder) / f"expert-{index}" for index in range(options.experts)]
        for seed, expert in enumerate(experts):
            write_expert(expert, size, seed)
        command = [str(Path(sys.executable).with_name("frmerge")), "merge", *map(str, experts)]
        command += ["--output-dir", str(Path(folder) / "out"), "--block", options.block]
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
        peaks = watch(process)
        seconds = time.perf_counter() - started
        if process.wait():
            raise SystemExit("The merge failed.")
    limit = budget + _ALLOWANCE
    print(
        f"{options.experts} experts of one tensor of {size / 2**30:g} GiB, block={options.block}: {seconds:.1f} s, "
        f"{options.experts * size / seconds / 1e9:.2f} GB/s of input, load {os.getloadavg()[0]:.1f}"
    )
    print(f"peak anonymous memory {peaks['RssAnon'] / 1e6:.0f} MB of {limit / 1e6:.0f} MB allowed")
    print(f"peak resident memory  {peaks['VmRSS'] / 1e6:.0f} MB (with mapped pages of the inputs)")
    sys.exit(peaks["RssAnon"] > limit)


if __name__ == "__main__":
    main()
