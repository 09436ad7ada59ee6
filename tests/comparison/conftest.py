"""A tiny family whose experts are each better than the base on their own text, and what they were trained on."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from tiny_models import word_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

WORDS = [f"w{number}" for number in range(40)]


class Family(NamedTuple):
    base: str
    experts: list[str]
    texts: dict[str, list[str]]


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


def train(model: LlamaForCausalLM, rows: list[str], tokenizer: object, steps: int) -> None:
    tokens = torch.tensor([tokenizer(row)["input_ids"] for row in rows])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        loss = model(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    root = tmp_path_factory.mktemp("family")
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
    train(base, text_of(0), tokenizer, 30)
    texts = {}
    for seed, name in enumerate(("base", "red", "blue")):
        model = LlamaForCausalLM(config)
        model.load_state_dict(base.state_dict())
        if name != "base":
            texts[name] = text_of(seed)
            train(model, texts[name], tokenizer, 60)
        model.to(torch.bfloat16).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return Family(str(root / "base"), [str(root / "red"), str(root / "blue")], texts)


@pytest.fixture
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")
