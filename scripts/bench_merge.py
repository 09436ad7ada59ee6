"""
Time merges as whole processes: ours, the physical floor, and mergekit if it is installed somewhere.

    python scripts/bench_merge.py --size 0.5b --experts 2 8 --repeats 3
    python scripts/bench_merge.py --size 0.1b --experts 2 8 --mergekit ~/mergekit-venv/bin/mergekit-yaml

Inputs are generated (`bench_models.py`) below `--work-dir` and kept. Every round runs all candidates once, in turn, so
that a machine that slows down slows all of them; medians are printed. The floor is a process that touches every input
byte once and writes an output of the same size, in the fastest way found, and is given twice: with and without the
fsync that every real merge here ends with (the disk is set to work before, as we do). Exactness is the angle, in
radians, of the output to a float64 iteration on full vectors; its floor is that reference rounded to bf16.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from bench_models import SIZES, ensure_models

from hf_frmerge.geometry.karcher import karcher_mean
from hf_frmerge.merging.arguments.merging_arguments import MergingArguments
from hf_frmerge.merging.engine.batches import in_batches
from hf_frmerge.merging.planning.build_plan import build_plan

FLOOR = r"""
import ctypes, os, sys, threading
import numpy as np
from xxhash import xxh3_64_intdigest
out, size, fsync, *inputs = sys.argv[1:]
size, piece = int(size), 4 << 20
views = [np.memmap(path, np.uint8, "r") for path in inputs]
reads = [(v, s) for v in views for s in range(0, v.size, piece)]
fd = os.open(out, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
os.posix_fallocate(fd, 0, size)
buffer = memoryview(bytes(1 << 20))
writes = list(range(0, size, 1 << 20))
start_writeback = getattr(ctypes.CDLL(None), "sync_file_range", None)
def work(k, n):
    for v, s in reads[k::n]:
        xxh3_64_intdigest(v[s : s + piece].data)
    for i, s in enumerate(writes[k::n]):
        os.pwrite(fd, buffer[: min(1 << 20, size - s)], s)
        if fsync == "1" and i % 32 == 31 and start_writeback:
            start_writeback(fd, ctypes.c_int64(0), ctypes.c_int64(0), 2)
n = len(os.sched_getaffinity(0))
threads = [threading.Thread(target=work, args=(k, n)) for k in range(n)]
[t.start() for t in threads]
[t.join() for t in threads]
if fsync == "1":
    os.fsync(fd)
os.close(fd)
"""

MERGEKIT = """
merge_method: {method}
models:
{models}
dtype: {dtype}
{extra}
"""


@dataclass
class Candidate:
    """One command to time. `out` is where it writes."""

    name: str
    command: list[str]
    out: Path
    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    anonymous: list[int] = field(default_factory=list)


def run(candidate: Candidate, inputs: list[Path]) -> None:
    """Run once with warm inputs and a quiet machine; keep wall and CPU seconds and the peak of anonymous memory."""
    shutil.rmtree(candidate.out, ignore_errors=True)
    if candidate.name.startswith("floor") and candidate.out.exists():
        candidate.out.unlink()
    os.sync()
    # A virtual machine gives memory back to its host two seconds after it was freed, and pays tenfold to get it again:
    # let that pass, then touch as much as will be written.
    time.sleep(3)
    for path in inputs:
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 24):
                pass
    warm = np.ones(sum(path.stat().st_size for path in inputs if path.parent == inputs[0].parent) // 8)
    del warm
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # what pip installs is compiled; so is everything timed here
    before = os.times()
    start = time.perf_counter()
    process = subprocess.Popen(
        candidate.command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment
    )
    peak = [0]
    watcher = threading.Thread(target=_watch, args=(process, peak))
    watcher.start()
    _, errors = process.communicate()
    seconds = time.perf_counter() - start
    watcher.join()
    if process.returncode:
        raise SystemExit(f"{candidate.name} failed:\n{errors[-2000:]}")
    after = os.times()
    candidate.seconds.append(seconds)
    candidate.cpu.append(after.children_user + after.children_system - before.children_user - before.children_system)
    candidate.anonymous.append(peak[0])


def _watch(process: subprocess.Popen[str], peak: list[int]) -> None:
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            return
        for line in status.splitlines():
            if line.startswith("RssAnon"):
                peak[0] = max(peak[0], int(line.split()[1]) * 1024)
        time.sleep(0.01)


def candidates(experts: list[Path], work: Path, mergekit: str | None) -> list[Candidate]:
    """Return everything to time on these experts."""
    inputs = [str(path) for expert in experts for path in sorted(expert.glob("*.safetensors"))]
    size = sum(path.stat().st_size for path in experts[0].glob("*.safetensors"))
    found = []
    for name, fsync in (("floor", "0"), ("floor + fsync", "1")):
        out = work / "out-floor"
        found.append(Candidate(name, [sys.executable, "-c", FLOOR, str(out), str(size), fsync, *inputs], out))
    for method in ("karcher", "linear"):
        out = work / f"out-{method}"
        command = [str(Path(sys.executable).with_name("frmerge")), "merge", *map(str, experts)]
        command += ["--output-dir", str(out), "--method", method]
        found.append(Candidate(f"frmerge {method}", command, out))
    settings = [("karcher", "bfloat16", ""), ("karcher", "float32", "out_dtype: bfloat16"), ("linear", "bfloat16", "")]
    for method, dtype, extra in settings if mergekit else []:
        out, config = work / f"out-mergekit-{method}-{dtype}", work / f"mergekit-{method}-{dtype}.yml"
        weight = "\n    parameters: {weight: 1.0}" if method == "linear" else ""
        models = "\n".join(f"  - model: {expert}{weight}" for expert in experts)
        config.write_text(MERGEKIT.format(method=method, models=models, dtype=dtype, extra=extra))
        command = [str(mergekit), str(config), str(out), "--quiet", "-j", "1"]
        found.append(Candidate(f"mergekit {method} {dtype}", command, out))
    return found


def read_tensor(folder: Path, name: str) -> np.ndarray:
    """Read one bf16 tensor as float32, without any code under test."""
    for path in sorted(folder.glob("model*.safetensors")):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
            if name not in header:
                continue
            start, stop = header[name]["data_offsets"]
            file.seek(8 + length + start)
            bits = np.frombuffer(file.read(stop - start), np.uint16)
            return (bits.astype(np.uint32) << 16).view(np.float32)
    raise KeyError(name)


def reference(vectors: list[np.ndarray]) -> np.ndarray:
    """Karcher mean of equal weights on full float64 vectors, textbook iteration; not rescaled."""
    units = [v / np.sqrt(np.einsum("i,i->", v, v)) for v in (x.astype(np.float64) for x in vectors)]
    mean = sum(units)
    for _ in range(30):
        mean = mean / np.sqrt(np.einsum("i,i->", mean, mean))
        tangent = np.zeros_like(mean)
        for unit in units:
            angle = 2 * np.arcsin(min(1.0, float(np.linalg.norm(unit - mean)) / 2))
            cosine = float(np.einsum("i,i->", unit, mean))
            tangent += (angle / np.sin(angle) if angle > 0 else 1.0) / len(units) * (unit - cosine * mean)
        length = float(np.linalg.norm(tangent))
        if length < 1e-13:
            break
        mean = np.cos(length) * mean + np.sin(length) / length * tangent
    return mean / np.sqrt(np.einsum("i,i->", mean, mean))


def angle(a: np.ndarray, b: np.ndarray) -> float:
    """Angle between two vectors by their chord."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    chord = np.linalg.norm(a / np.linalg.norm(a) - b / np.linalg.norm(b))
    return float(2 * np.arcsin(min(1.0, chord / 2)))


def exactness(experts: list[Path], folders: dict[str, Path]) -> None:
    """Print angles to the float64 reference on some tensors and the embedding."""
    names = [
        "model.embed_tokens.weight",
        "model.layers.0.mlp.down_proj.weight",
        "model.layers.1.self_attn.k_proj.weight",
    ]
    print("\n| angle to the float64 reference, rad | rounding floor | " + " | ".join(folders) + " |")
    print("|---|---|" + "---|" * len(folders))
    for name in names:
        vectors = [read_tensor(expert, name) for expert in experts]
        truth = reference(vectors)
        scaled = (truth * np.mean([np.linalg.norm(v.astype(np.float64)) for v in vectors])).astype(np.float32)
        bits = scaled.view(np.uint32)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16).view(np.float32)
        cells = [angle(rounded, truth)] + [angle(read_tensor(f, name), truth) for f in folders.values()]
        print(f"| {name} | " + " | ".join(f"{c:.2e}" for c in cells) + " |", flush=True)


def report(found: list[Candidate], input_bytes: int, n: int) -> None:
    """Print one table row per candidate."""
    median = {c.name: statistics.median(c.seconds) for c in found}
    print(f"\nN = {n}, {input_bytes / 1e9:.2f} GB of input, medians")
    print("| | runs | wall s (min..max) | CPU s | x floor+fsync | x frmerge karcher | GB/s in | anonymous MB |")
    print("|---|---|---|---|---|---|---|---|")
    for c in found:
        print(
            f"| {c.name} | {len(c.seconds)} | {median[c.name]:.2f} ({min(c.seconds):.2f}..{max(c.seconds):.2f}) "
            f"| {statistics.median(c.cpu):.2f} | {median[c.name] / median['floor + fsync']:.2f} "
            f"| {median[c.name] / median['frmerge karcher']:.2f} | {input_bytes / median[c.name] / 1e9:.2f} "
            f"| {max(c.anonymous) / 1e6:.0f} |",
            flush=True,
        )


def fixed_point(experts: list[Path], whole: float) -> None:
    """Print what the Karcher iteration takes of a merge of `whole` CPU seconds: random directions 0.3 rad apart."""
    with closing(build_plan([str(expert) for expert in experts], MergingArguments())) as plan:
        sizes = [len(batch) for batch in in_batches(plan.steps, len(experts))]
    rng, n = np.random.default_rng(0), len(experts)
    points = rng.standard_normal(n) + 0.2 * rng.standard_normal((sum(sizes), n, n))
    units = points / np.linalg.norm(points, axis=-1, keepdims=True)
    start = time.process_time()
    for size in sizes:
        karcher_mean(units[:size], np.full(n, 1 / n))
    seconds = time.process_time() - start
    print(
        f"The fixed point itself, {sum(sizes)} tensors in {len(sizes)} batches: {seconds:.3f} s of CPU, "
        f"{seconds / whole:.1%} of the merge's."
    )


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, nargs="+", default=["0.1b"])
    parser.add_argument("--experts", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--work-dir", type=Path, default=Path("bench"))
    parser.add_argument("--mergekit", help="path of mergekit-yaml, in an environment of its own")
    parser.add_argument("--mergekit-repeats", type=int, default=1, help="its runs take minutes; at most --repeats")
    parser.add_argument("--no-exactness", action="store_true")
    options = parser.parse_args()
    print(f"{len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f} at the start")
    for size in options.size:
        folder = options.work_dir / size
        _, models = ensure_models(folder, size, max(options.experts))
        for n in options.experts:
            experts = models[:n]
            inputs = [path for expert in experts for path in expert.glob("*.safetensors")]
            found = candidates(experts, folder, options.mergekit)
            for repeat in range(options.repeats):
                for candidate in found:
                    if candidate.name.startswith("mergekit") and repeat >= options.mergekit_repeats:
                        continue
                    run(candidate, inputs)
            print(f"\n## {size}")
            report(found, sum(path.stat().st_size for path in inputs), n)
            [karcher] = [c for c in found if c.name == "frmerge karcher"]
            fixed_point(experts, statistics.median(karcher.cpu))
            if not options.no_exactness:
                exactness(experts, {c.name: c.out for c in found if "karcher" in c.name})
            for candidate in found:
                shutil.rmtree(candidate.out, ignore_errors=True)
        (folder / "out-floor").unlink(missing_ok=True)


if __name__ == "__main__":
    main()
