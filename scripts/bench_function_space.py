"""
Measure how much of what language-model experts learned is left in a merge: without data, and fitted to prompts.

    python scripts/bench_function_space.py --base BASE --suite FOLDER --texts FOLDER [--prompts 16 64] [--self 64] ...

A suite is a folder with one expert per domain (full checkpoints or adapters), and maybe their base; the texts' folder
has for every domain `DOMAIN.calibration.jsonl`, of which the prompts are taken, and `DOMAIN.test.jsonl`, which is
measured. Both hold a column `text`. `scripts/train_experts.py` makes both.

Recovery of an expert is (base - merged) / (base - expert) in nats a token on its own domain: 1 keeps all that the
expert learned, 0 none of it. Its standard error comes from the blocks of the text, merged and expert measured on the
same ones. Every merge runs in a process of its own, whose CPU time and peak memory are printed. What base and experts
lose is kept in `--workdir` for the next call with the same suite and texts.

`--refine STEPS` adds each fitted merge once more with a refinement. `--distil STEPS` adds controls that see the same
prompts but no fit (`--controls`, `distil_control.py`): all weights distilled from the linear merge, a fresh LoRA of
the base, and one coefficient for every expert and tensor, as AdaMerging and SAMerging find them, and along random
directions as long as the experts' updates.

`--facts TOKENS` adds columns that `frmerge evaluate` measures on the first tokens of every domain: the distance of the
predictions to the experts' and to their barycentre, and the variance of activations; with `--neutral FILE` also what
the merge loses on text of no domain.

A merge is not told which expert's text it reads, and so cannot predict its first words as that expert does. What can
be kept all the same is shown by the Bayesian mixture of the experts: it starts with equal odds, and weighs each expert
by how well it predicted the text so far. If the texts were drawn from the experts, nothing that reads texts alone
would do better in the mean. The last column is the recovery once a text has had time to tell.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from merge_facts import HEADINGS, NEUTRAL, Facts, Texts
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, AutoTokenizer

# Runs a command and prints its peak memory: what the system says of children is the largest of all so far.
_MEASURED = """
import resource, sys
from hf_frmerge.cli.main import main
try:
    main()
finally:
    print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)
"""

CONTROL = Path(__file__).with_name("distil_control.py")

CONTROLS = {
    "all": "all weights distilled",
    "lora": "fresh LoRA distilled",
    "adamerging": "AdaMerging",
    "samerging": "SAMerging",
    "random": "SAMerging along random directions",
}
"""What the control can make, and what its row is called."""

BLOCK = 128
"""Tokens of a block of text; the first is only context."""

KNOWN = 48
"""Tokens after which a block has told what domain it is of: the mixture of the experts has lost nothing there."""


Losses = dict[str, NDArray[np.float64]]
"""Domain -> loss of every token."""


@dataclass(frozen=True)
class Merge:
    """One row of the table: options of `frmerge merge`, or of the script that makes controls."""

    name: str
    options: tuple[str, ...]
    is_control: bool = False


@dataclass(frozen=True)
class Cost:
    """What a merge took."""

    cpu_seconds: float
    peak_mib: float


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    base_dir = Path(args.base).resolve()
    domains = sorted(path.name for path in args.suite.iterdir() if path.is_dir() and path.resolve() != base_dir)
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    blocks = {domain: blocks_of(tokenizer, args.texts / f"{domain}.test.jsonl", args.tokens) for domain in domains}
    n_tokens = min(map(len, blocks.values())) * (BLOCK - 1)
    print(f"{args.suite.name}: {', '.join(domains)}; {n_tokens:,} test tokens or more a domain")
    args.workdir.mkdir(parents=True, exist_ok=True)
    kept = partial(kept_losses, args.workdir)
    base = kept(f"{args.suite.name}-base", lambda: load(args.base), blocks)
    of_experts = [
        kept(f"{args.suite.name}-{e}", lambda e=e: load_expert(args.suite / e, args.base), blocks) for e in domains
    ]
    experts = {domain: losses[domain] for domain, losses in zip(domains, of_experts)}
    for domain in domains:
        print(f"  {domain}: base {base[domain].mean():.3f}, expert {experts[domain].mean():.3f} nats a token")
    headings = [*domains, "mean", "worst", "CPU s", "peak MiB", f"mean after {KNOWN} tokens"]
    headings += HEADINGS if args.facts else ()
    print(f"| merge | {' | '.join(headings)} |")
    print("|---|" + "---:|" * len(headings), flush=True)
    texts = texts_of_facts(args, tokenizer, blocks) if args.facts else None
    if args.random:
        write_random(args.workdir / "random.jsonl", max(args.random), len(tokenizer))
    by_seed: dict[str, list[list[float]]] = {}
    mixed = {domain: mixture([losses[domain] for losses in of_experts]) for domain in domains}
    print(row("mixture of the experts' predictions", base, experts, mixed, None), flush=True)
    for merge in merges(args, domains):
        output, cost = run(args, merge, domains)
        model = load(output)
        merged = {domain: nats(model, blocks[domain]) for domain in domains}
        facts = texts.measure(output) if texts else None
        print(row(merge.name, base, experts, merged, cost, facts), flush=True)
        shutil.rmtree(output)
        kept = [recovery(base[domain], experts[domain], merged[domain])[0] for domain in domains]
        by_seed.setdefault(re.sub(", seed [0-9]+", "", merge.name), []).append(kept)
    print_spreads(by_seed)


def print_spreads(by_seed: dict[str, list[list[float]]]) -> None:
    """
    Say what is kept in the mean and of the worst, each with the standard deviation over seeds.

    Args:
        by_seed: row -> for every seed what is kept of every domain; rows of one seed have no spread.
    """
    for name, kept in by_seed.items():
        if len(kept) > 1:
            kept_SD = np.array(kept)  # seeds, domains
            found = (kept_SD.mean(1), kept_SD.min(1))
            mean, worst = (f"{each.mean():.3f} ± {each.std(ddof=1):.3f}" for each in found)
            print(f"{name}, {len(kept)} seeds: mean {mean}, worst {worst}")


def row(
    name: str, base: Losses, experts: Losses, merged: Losses, cost: Cost | None, facts: Facts | None = None
) -> str:
    """Return a row of the table."""
    found = [recovery(base[domain], experts[domain], merged[domain]) for domain in base]
    known = [recovery(*(losses[domain][:, KNOWN:] for losses in (base, experts, merged)))[0] for domain in base]
    values = [value for value, _ in found]
    cells = " | ".join(f"{value:.3f} ± {error:.3f}" for value, error in found)
    took = " | ".join(f"{value:.0f}" for value in (cost.cpu_seconds, cost.peak_mib)) if cost else " | "
    end = f" {facts.cells()} |" if facts else ""
    return f"| {name} | {cells} | {np.mean(values):.3f} | {min(values):.3f} | {took} | {np.mean(known):.3f} |{end}"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").strip().splitlines()[0])
    parser.add_argument("--base", required=True, help="folder of the base model")
    parser.add_argument("--suite", type=Path, required=True, help="folder with one expert per domain")
    parser.add_argument("--texts", type=Path, required=True, help="folder of the texts")
    parser.add_argument("--methods", nargs="*", default=["linear", "karcher", "nre"], help="merges without data")
    parser.add_argument("--prompts", nargs="*", type=int, default=[16, 64], help="prompts an expert")
    parser.add_argument("--self", nargs="*", type=int, default=[64], dest="own", help="self-written prompts an expert")
    parser.add_argument("--random", nargs="*", type=int, default=[], help="prompts of random tokens an expert")
    parser.add_argument("--self-chat", nargs="*", type=int, default=[], help="those behind the chat template's prefix")
    parser.add_argument("--start", default="karcher", help="method the fit starts from")
    parser.add_argument("--baselines", nargs="*", default=[], help="methods that need prompts, as rows beside the fit")
    parser.add_argument("--fisher", nargs="*", default=[], help="merges without data once more, measured by this")
    parser.add_argument("--seeds", nargs="*", type=int, default=[42], help="seeds of the choice of prompts")
    parser.add_argument("--tokens", type=int, default=20_000, help="test tokens a domain")
    parser.add_argument("--options", nargs="*", default=[], help="further options of the fitted merges, as NAME=VALUE")
    parser.add_argument("--refine", type=int, default=0, help="steps of a refinement; 0 leaves these rows out")
    parser.add_argument("--distil", type=int, default=0, help="steps of the controls; 0 leaves these rows out")
    parser.add_argument("--controls", nargs="*", choices=CONTROLS, default=list(CONTROLS), help="which controls")
    parser.add_argument("--facts", type=int, default=0, help="tokens a domain for further columns; 0 leaves them out")
    parser.add_argument("--neutral", type=Path, help="text of no domain, for the last of these columns")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--workdir", type=Path, default=Path("bench-function-space"))
    return parser.parse_args()


def merges(args: argparse.Namespace, domains: list[str]) -> list[Merge]:
    """List the merges: without data, then fitted to given prompts, then to the experts' own."""
    rows = [Merge(method, ("--method", method)) for method in args.methods]
    given = [f"--calibration={args.suite / d}={args.texts / f'{d}.calibration.jsonl'}" for d in domains]
    further = tuple(f"--{option}" for option in args.options)
    random = [f"--calibration={args.workdir / 'random.jsonl'}"]
    sources = (
        (args.prompts, given, "prompts"),
        (args.own, ["--calibration=self"], "own prompts"),
        (args.random, random, "prompts of random tokens"),
        (args.self_chat, ["--calibration=self:chat"], "own chat prompts"),
    )
    for counts, source, name in sources:
        for count in counts:
            for seed in args.seeds:
                options = ("--method", args.start, *source, f"--num-calibration-samples={count}", f"--seed={seed}")
                rows.append(Merge(f"{count} {name}, seed {seed}", (*options, *further)))
                for method in args.baselines:
                    of_method = ("--method", method, *options[2:], *further)
                    rows.append(Merge(f"{method}, {count} {name}, seed {seed}", of_method))
                for method, form in product(args.methods, args.fisher):
                    of_method = ("--method", method, *options[2:], f"--fisher={form}")
                    rows.append(Merge(f"{method} by {form} Fisher, {count} {name}, seed {seed}", of_method))
                if args.refine:
                    refined = (*options, f"--refine={args.refine}", *further)
                    rows.append(Merge(f"{count} {name}, seed {seed}, refined", refined))
    return [*rows, *controls(args, domains)]


def controls(args: argparse.Namespace, domains: list[str]) -> list[Merge]:
    """List what is trained on the same prompts, without a fit."""
    given = [f"{args.suite / domain}={args.texts / f'{domain}.calibration.jsonl'}" for domain in domains]
    rows = []
    for count in args.prompts if args.distil else ():
        for seed in args.seeds:
            options = ("--base", args.base, f"--prompts={count}", f"--seed={seed}", f"--steps={args.distil}")
            for kind in args.controls:
                options_of = (kind, *options, "--calibration", *given)
                rows.append(Merge(f"{CONTROLS[kind]}, {count} prompts, seed {seed}", options_of, is_control=True))
    return rows


def run(args: argparse.Namespace, merge: Merge, domains: list[str]) -> tuple[Path, Cost]:
    """Merge in another process; return the folder and what it took."""
    output = args.workdir / args.suite.name / merge.name.replace(" ", "-").replace(",", "")
    experts = [str(args.suite / domain) for domain in domains]
    options = [
        "-c", _MEASURED, "merge", *experts, "--base-model", args.base, "--space", "deltas",
        "--adapter-output", "merged", "--output-dir", str(output), "--overwrite", "--disable-tqdm", *merge.options,
    ]  # fmt: skip
    if merge.is_control:
        options = [str(CONTROL), *merge.options, "--output-dir", str(output)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, *options],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": str(args.threads)},  # two threads that wait for each other burn CPU time
    )
    if done.returncode:
        raise SystemExit(
            f"{merge.name}, {' '.join(merge.options)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return output, Cost(cpu, int(done.stderr.rsplit("peak ", 1)[1].split()[0]) / 1024)


def blocks_of(tokenizer: Callable, file: Path, n_tokens: int) -> NDArray[np.int64]:
    """Cut the test text into blocks `(n, BLOCK)`."""
    with file.open(encoding="utf-8") as lines:  # not `splitlines`, which also splits at separators within texts
        texts = [json.loads(line)["text"] for line in lines]
    ids = np.array(tokenizer("\n\n".join(texts))["input_ids"][:n_tokens])
    return ids[: len(ids) // BLOCK * BLOCK].reshape(-1, BLOCK)


def texts_of_facts(args: argparse.Namespace, tokenizer: Any, blocks: dict[str, NDArray[np.int64]]) -> Texts:
    """Write the first tokens of every domain, and of the text of none, where `frmerge evaluate` reads them."""
    ids = {domain: block.flatten()[: args.facts] for domain, block in blocks.items()}
    if args.neutral:
        ids[NEUTRAL] = tokenizer(args.neutral.read_text(encoding="utf-8"))["input_ids"][: args.facts]
    files = {domain: args.workdir / f"{domain}.txt" for domain in ids}
    for domain, file in files.items():
        file.write_text(tokenizer.decode(ids[domain]), encoding="utf-8")
    return Texts(files, [args.suite / domain for domain in blocks], args.base, BLOCK)


def write_random(file: Path, n_prompts: int, n_tokens: int) -> None:
    """Write prompts of tokens drawn alike from the whole vocabulary: what is the fit worth without any text?"""
    drawn = np.random.default_rng(0).integers(n_tokens, size=(n_prompts, BLOCK)).tolist()
    file.write_text("".join(json.dumps({"input_ids": ids}) + "\n" for ids in drawn), encoding="utf-8")


def load(path: str | Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()


def load_expert(folder: Path, base: str | Path) -> torch.nn.Module:
    if not (folder / "adapter_config.json").exists():
        return load(folder)
    from peft import PeftModel

    return PeftModel.from_pretrained(load(base), folder).merge_and_unload().eval()


def kept_losses(
    folder: Path, name: str, load_it: Callable[[], torch.nn.Module], blocks: dict[str, NDArray[np.int64]]
) -> Losses:
    """Return the losses of a model on some domains; they are kept under its name and the content of the blocks."""
    digest = hashlib.sha256(b"".join(blocks[domain].tobytes() for domain in sorted(blocks))).hexdigest()[:16]
    file = folder / f"losses-{name}-{digest}.npz"
    if not file.exists():
        model = load_it()
        np.savez(file, **{domain: nats(model, of_domain) for domain, of_domain in blocks.items()})
    with np.load(file) as kept:
        return dict(kept)


def nats(model: torch.nn.Module, blocks: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the loss of every token `(blocks, BLOCK - 1)`."""
    losses = []
    with torch.inference_mode():
        for start in range(0, len(blocks), 8):
            ids = torch.from_numpy(blocks[start : start + 8])
            logits = model(input_ids=ids).logits[:, :-1].float()
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
            losses.append(loss.reshape(len(ids), -1).double().numpy())
    return np.concatenate(losses)


def mixture(of_experts: list[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Return the losses of the Bayesian mixture, whose likelihood of a text so far is the mean of the experts'."""
    so_far = np.stack(of_experts).cumsum(-1)
    total = np.log(len(so_far)) - np.logaddexp.reduce(-so_far, 0)
    return np.diff(total, axis=-1, prepend=0.0)


def recovery(
    base: NDArray[np.float64], expert: NDArray[np.float64], merged: NDArray[np.float64]
) -> tuple[float, float]:
    """Return the recovery and its standard error over blocks."""
    return ratio_of_means((base - merged).mean(1), (base - expert).mean(1))


def ratio_of_means(part: NDArray[np.float64], whole: NDArray[np.float64]) -> tuple[float, float]:
    """Return the mean of one over that of the other, both of `(blocks,)`, and its standard error, to first order."""
    ratio = part.mean() / whole.mean()
    residual = part - ratio * whole
    return float(ratio), float(residual.std(ddof=1) / math.sqrt(len(whole)) / abs(whole.mean()))


if __name__ == "__main__":
    main()
