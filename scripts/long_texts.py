"""
Measure means of experts on 100,000 tokens a domain, in documents of which no expert saw a word.

    python scripts/train_experts.py --suite lora --output-dir /tmp/experts --texts /tmp/texts
    python scripts/long_texts.py --experts /tmp/experts/lora --texts /tmp/texts --workdir /tmp/long

`train_experts.py` keeps 24,576 tokens a domain out of training for tests, in documents of its own. But an expert is
trained on 200 blocks of 128 tokens alone, which leaves most other documents untouched: these are found here. The King
James Bible has too few (its documents are books), so it cannot be measured so.

Every method gets the same scales, the best of which is chosen on `--validation` tokens of the texts that
`train_experts.py` keeps for that. Printed are recovery and its standard error over blocks, and the lead of the first
method over the others, paired block by block. What was measured is kept in `--workdir` under names and texts: the same
command goes on, and experts that were trained again need another folder.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_function_space import Losses, blocks_of, kept_losses, load, load_expert, ratio_of_means
from expert_training import Recipe, drawn_blocks
from numpy.typing import NDArray
from train_experts import DOCUMENT_TOKENS, SEPARATOR, SUITES, split_domain, training_text
from transformers import AutoTokenizer

from hf_frmerge import FisherRaoMerger, MergingArguments
from hf_frmerge.demo.base import base_model_dir

METHODS = ("karcher", "nre", "linear", "ties")
SCALES = (0.7, 1.0, 1.4, 2.0)
NAMES = ("dialogue", "french", "mail", "roff")


def main() -> None:
    args = parse_args()
    torch.set_num_threads(1)
    args.workdir.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(base_model_dir())
    test = {name: test_blocks(args, tokenizer, name) for name in args.names}
    folder = args.experts.parent / "texts"
    validation = {
        name: blocks_of(tokenizer, folder / f"{name}.validation.jsonl", args.validation) for name in args.names
    }
    scales = {method: best_scale(args, method, validation) for method in args.methods}
    merged = {method: of_merge(args, method, scale, test) for method, scale in scales.items()}
    base, experts = references(args, test)
    for name in args.names:
        print(f"{name}: {test[name].size:,} tokens, base {base[name].mean():.4f}, expert {experts[name].mean():.4f}")
    print_table(scales, base, experts, merged)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").strip().splitlines()[0])
    parser.add_argument("--experts", type=Path, required=True, help="folder of a suite that train_experts.py wrote")
    parser.add_argument("--names", nargs="+", default=NAMES, help="domains whose experts are merged")
    parser.add_argument("--texts", type=Path, required=True, help="folder with the packages of texts unpacked")
    parser.add_argument("--methods", nargs="+", default=METHODS, help="the first is the one whose leads are told")
    parser.add_argument("--scales", type=float, nargs="+", default=SCALES, help="of the merged delta")
    parser.add_argument("--tokens", type=int, default=102_400, help="test tokens a domain")
    parser.add_argument("--validation", type=int, default=2_048, help="tokens a domain that choose the scales")
    parser.add_argument("--seed", type=int, default=42, help="the experts' own")
    parser.add_argument("--workdir", type=Path, required=True, help="folder where results are kept")
    return parser.parse_args()


# ---- texts ----------------------------------------------------------------------------------------------------------


def test_blocks(args: argparse.Namespace, tokenizer: Any, name: str) -> NDArray[np.int64]:
    """Return blocks of tokens from documents without a word that the expert was trained on; they are kept."""
    file = args.workdir / f"{args.experts.name}-{name}-{args.tokens}-{args.seed}.jsonl"
    if not file.exists():
        documents, _ = split_domain(name, args.texts, args.seed)
        unseen = untouched(documents, tokenizer, SUITES[args.experts.name], args.seed)
        rows, missing = [], args.tokens + 1_024  # a text cut and joined again may have a few tokens less
        random.Random(args.seed).shuffle(unseen)
        while missing > 0:
            if not unseen:
                raise SystemExit(f"{name}: untouched documents have {missing:,} tokens less than --tokens asks for")
            tokens = tokenizer(unseen.pop(), verbose=False).input_ids[: min(missing, DOCUMENT_TOKENS)]
            rows.append(json.dumps({"text": tokenizer.decode(tokens)}, ensure_ascii=False) + "\n")
            missing -= len(tokens)
        file.write_text("".join(rows), encoding="utf-8")
    return blocks_of(tokenizer, file, args.tokens)


def untouched(documents: Sequence[str], tokenizer: Any, recipe: Recipe, seed: int) -> list[str]:
    """Return the documents of which no part is in a block that an expert was trained on."""
    spans = tokenizer(training_text(documents), return_offsets_mapping=True, verbose=False)["offset_mapping"]
    blocks = drawn_blocks(len(spans) // recipe.length, recipe, seed).sort().values.tolist()
    begins = np.cumsum([0, *(len(document) + len(SEPARATOR) for document in documents)])
    touched: set[int] = set()
    for block in blocks:
        first, last = spans[block * recipe.length][0], spans[(block + 1) * recipe.length - 1][1]
        touched.update(range(*np.searchsorted(begins, (first, last), side="right") - (1, 0)))
    return [document for number, document in enumerate(documents) if number not in touched]


# ---- models ---------------------------------------------------------------------------------------------------------


def best_scale(args: argparse.Namespace, method: str, blocks: dict[str, NDArray[np.int64]]) -> float:
    """Return the scale whose merge keeps most in the mean on the texts for validation."""
    base, experts = references(args, blocks)

    def kept_in_the_mean(scale: float) -> float:
        losses = of_merge(args, method, scale, blocks)
        return float(np.mean([share(base[name], losses[name], base[name], experts[name])[0] for name in args.names]))

    return max(args.scales, key=kept_in_the_mean)


def references(args: argparse.Namespace, blocks: dict[str, NDArray[np.int64]]) -> tuple[Losses, Losses]:
    """Return the losses of the base, and on every domain those of its expert."""
    kept, suite = partial(kept_losses, args.workdir), args.experts.name
    base = kept("base", lambda: load(base_model_dir()), blocks)
    experts = {}
    for name in args.names:
        folder, own = args.experts / name, {name: blocks[name]}
        experts |= kept(f"{suite}-{name}", lambda folder=folder: load_expert(folder, base_model_dir()), own)
    return base, experts


def of_merge(args: argparse.Namespace, method: str, scale: float, blocks: dict[str, NDArray[np.int64]]) -> Losses:
    """Return the losses of a merge of the experts of these domains."""
    name = f"{args.experts.name}-{method}-{scale:g}"
    return kept_losses(args.workdir, name, lambda: merge(args, method, scale), blocks)


def merge(args: argparse.Namespace, method: str, scale: float) -> torch.nn.Module:
    """Return the merge of the experts' deltas."""
    merging = MergingArguments(
        output_dir=str(args.workdir / f"merged-{method}"),
        method=method,
        scale=scale,
        space="deltas",
        adapter_output="merged",
        overwrite=True,
        disable_tqdm=True,
    )
    merger = FisherRaoMerger(
        [str(args.experts / name) for name in args.names], merging, base_model=str(base_model_dir())
    )
    merger.merge()
    return load(merging.output_dir)


# ---- the table ------------------------------------------------------------------------------------------------------


def print_table(scales: Mapping[str, float], base: Losses, experts: Losses, merged: Mapping[str, Losses]) -> None:
    """Print what every method keeps, and how far the first one is ahead, in %, each ± its standard error."""
    leader = next(iter(merged))
    print(f"\n| method | scale | {' | '.join(base)} | mean | lead of {leader} |")
    print("|---|" + "---:|" * (len(base) + 3))
    for method, losses in merged.items():
        shares = [share(base[name], losses[name], base[name], experts[name]) for name in base]
        leads = [share(losses[name], merged[leader][name], base[name], experts[name]) for name in base]
        cells = [percent(each) for each in (*shares, mean_of(shares))]
        lead = "" if method == leader else percent(mean_of(leads), "+.2f")
        print(f"| {method} | {scales[method]:g} | {' | '.join(cells)} | {lead} |")


def share(
    worse: NDArray[np.float64], better: NDArray[np.float64], base: NDArray[np.float64], expert: NDArray[np.float64]
) -> tuple[float, float]:
    """Return what one model is better than another by, as a share of what the expert learned, and the error of it."""
    return ratio_of_means((worse - better).mean(1), (base - expert).mean(1))


def mean_of(values: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return the mean of values and its error; they come from different texts."""
    found, errors = zip(*values)
    return float(np.mean(found)), math.hypot(*errors) / len(errors)


def percent(value: tuple[float, float], form: str = ".1f") -> str:
    return f"{value[0] * 100:{form}} ± {value[1] * 100:{form.removeprefix('+')}}"


if __name__ == "__main__":
    main()
