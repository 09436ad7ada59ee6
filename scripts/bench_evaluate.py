"""
What measuring costs: the suite's CPU time over that of bare forward passes of the same models, and its peak memory.

    python scripts/bench_evaluate.py                       # SmolLM2-135M and the demo's three experts
    python scripts/bench_evaluate.py --tokens 2048 --dtype bfloat16 --top-k 0

Every run is a process of its own, one torch thread. Both sides load the same five models (base, three adapters, and
their mean as the merged one) and read the same tokens in the same batches; the suite then does all it can: losses,
distances of every pair, barycentres, activations of every layer, generations.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from itertools import cycle, islice
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import AutoTokenizer

from hf_frmerge.checkpoints.resolve import resolve
from hf_frmerge.demo.base import base_model_dir
from hf_frmerge.demo.texts import expert_dirs, load_texts
from hf_frmerge.evaluation.models.loading import ModelLoader
from hf_frmerge.evaluation.suite.settings import ModelSet, RunSettings, SuiteOptions
from hf_frmerge.evaluation.suite.suite import evaluate_suite
from hf_frmerge.evaluation.text.forward import forward_blocks
from hf_frmerge.evaluation.text.token_blocks import cut
from hf_frmerge.merger import FisherRaoMerger
from hf_frmerge.merging.arguments.merging_arguments import MergingArguments


def main() -> None:
    options = parse()
    torch.set_num_threads(1)
    if options.child:
        print(json.dumps(run_child(options)))
        return
    with tempfile.TemporaryDirectory(prefix="frmerge-bench-") as scratch:
        merge(Path(scratch) / "merged")
        print(f"{options.tokens} tokens a text, 3 texts, 5 models, {options.dtype}, top_k {options.top_k}, 1 thread")
        print("  tokens   bare, CPU s  suite, CPU s   ratio  again, CPU s  peak MB, bare   suite")
        for times in (1, 4):
            bare, suite = (run(options, scratch, what, times) for what in ("bare", "suite"))
            print(
                f"{options.tokens * times:8}{bare['seconds']:14.1f}{suite['seconds']:14.1f}"
                f"{suite['seconds'] / bare['seconds']:8.2f}{suite['again']:14.1f}{bare['peak']:15.0f}"
                f"{suite['peak']:8.0f}",
                flush=True,
            )
        print(f"{suite['stored']:.2f} kB stored a token, model and text")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024, help="tokens a text; run once more on four times as many")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--top-k", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--child", choices=["bare", "suite"], help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def merge(folder: Path) -> None:
    experts = [str(path) for path in expert_dirs().values()]
    args = MergingArguments(output_dir=str(folder), method="linear", adapter_output="merged", disable_tqdm=True)
    FisherRaoMerger(experts, args=args, base_model=str(base_model_dir())).merge()


def run(options: argparse.Namespace, scratch: str, what: str, times: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--child", what, "--scratch", scratch, "--dtype", options.dtype]
    command += ["--top-k", str(options.top_k), "--batch-size", str(options.batch_size)]
    command += ["--tokens", str(options.tokens * times)]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(out.splitlines()[-1])


def run_child(options: argparse.Namespace) -> dict[str, float]:
    base = str(base_model_dir())
    models = {"base": base, **{k: str(v) for k, v in expert_dirs().items()}, "merged": str(options.scratch / "merged")}
    texts = {name: tokens(base, text, options.tokens) for name, text in load_texts().items()}
    found = {"seconds": 0.0}
    started = time.process_time()
    if options.child == "bare":
        loader = ModelLoader(resolve(base), options.dtype, None)
        for spec in models.values():
            model = loader.load(resolve(spec))
            for stream in texts.values():
                blocks = cut(torch.tensor(stream), 256, model.config.vocab_size, None)
                forward_blocks(
                    model, blocks, lambda *_: None, batch_size=options.batch_size, accelerator=Accelerator(cpu=True)
                )
            loader.release(model)
            del model
        found["seconds"] = time.process_time() - started
    else:
        roles = dict.fromkeys(models, "expert") | {"base": "base", "merged": "merged"}
        with tempfile.TemporaryDirectory(dir=options.scratch) as cache:
            for timing in ("seconds", "again"):
                started = time.process_time()
                evaluate_suite(
                    ModelSet(models, roles),
                    {name: [{"input_ids": stream}] for name, stream in texts.items()},
                    SuiteOptions(batch_size=options.batch_size, dtype=options.dtype, top_k=options.top_k),
                    RunSettings(Accelerator(cpu=True), cache),
                )
                found[timing] = time.process_time() - started
            n_bytes = sum(path.stat().st_size for path in Path(cache).rglob("*") if path.is_file())
            found["stored"] = n_bytes / 1e3 / (options.tokens * len(texts) * len(models))
    found["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    return found


def tokens(base: str, text: str, n: int) -> list[int]:
    """Repeat a text's tokens until there are `n`."""
    return list(islice(cycle(AutoTokenizer.from_pretrained(base)(text, verbose=False)["input_ids"]), n))


if __name__ == "__main__":
    main()
