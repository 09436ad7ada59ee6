"""A tiny family whose experts are each better than the base on the text they were trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import word_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

WORDS = [f"w{number}" for number in range(40)]


class Family(NamedTuple):
    """Folders, and the text of every expert, as rows and as a file."""

    base: str
    experts: list[str]
    adapters: list[str]
    texts: dict[str, list[str]]
    files: dict[str, str]


def text_of(seed: int, n_rows: int = 40) -> list[str]:
    """Rows in which one word mostly follows from the word before, by a rule that depends on the seed."""
    follower = np.random.default_rng(seed).permutation(len(WORDS))
    draw = np.random.default_rng(100 + seed)
    rows = []
    for _ in range(n_rows):
        words = [int(draw.integers(len(WORDS)))]
        for _ in range(15):
            words.append(int(follower[words[-1]]) if draw.random() < 0.8 else int(draw.integers(len(WORDS))))
        rows.append(" ".join(WORDS[word] for word in words))
    return rows


def save_family(root: Path) -> Family:
    """Save `base`, full experts `red` and `blue`, adapters `red-lora` and `blue-lora`, and the texts of both."""
    tokenizer = word_tokenizer(WORDS)
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=len(tokenizer),
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    base = LlamaForCausalLM(config)
    _train(base, text_of(0), tokenizer, 30)
    _save(base, tokenizer, root / "base", torch.bfloat16)
    texts, files = {}, {}
    for seed, name in enumerate(("red", "blue"), start=1):
        texts[name] = text_of(seed)
        files[name] = str(root / f"{name}.txt")
        Path(files[name]).write_text("\n".join(texts[name]), encoding="utf-8")
        full = LlamaForCausalLM.from_pretrained(root / "base", dtype=torch.float32)
        _train(full, texts[name], tokenizer, 60)
        _save(full, tokenizer, root / name, torch.float32)
        adapted = get_peft_model(
            LlamaForCausalLM.from_pretrained(root / "base", dtype=torch.float32),
            LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
        )
        _train(adapted, texts[name], tokenizer, 60)
        adapted.save_pretrained(root / f"{name}-lora", save_embedding_layers=False)
    experts = [str(root / name) for name in texts]
    return Family(str(root / "base"), experts, [f"{expert}-lora" for expert in experts], texts, files)


def _train(model: Any, rows: list[str], tokenizer: Any, steps: int) -> None:
    tokens = torch.tensor([tokenizer(row)["input_ids"] for row in rows])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(steps):
        loss = model(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def _save(model: Any, tokenizer: Any, folder: Path, dtype: torch.dtype) -> None:
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# Fixtures; a conftest that imports them shares them with the tests beside it.


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return save_family(tmp_path_factory.mktemp("family"))


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")
