"""Tiny real checkpoints, an adapter and texts, and a runner that behaves like a terminal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from click.testing import Result
from click_runner import click_runner
from comparison_family import family  # noqa: F401  # a fixture
from peft import LoraConfig, get_peft_model
from tiny_models import save_llama_family
from transformers import LlamaForCausalLM

from hf_frmerge.cli.main import main

WORDS = [
    "the",
    "house",
    "of",
    "wisdom",
    "has",
    "many",
    "rooms",
    "and",
    "each",
    "room",
    "opens",
    "on",
    "another",
    "house",
]


@dataclass(frozen=True)
class Models:
    """Folders, as a user would type them."""

    base: str
    math: str
    code: str
    adapter: str
    adapter_2: str
    text: str

    @property
    def experts(self) -> list[str]:
        return [self.math, self.code]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    root = tmp_path_factory.mktemp("models")
    save_llama_family(root, WORDS, 0.02)
    for seed, name in enumerate(("adapter", "adapter_2")):
        torch.manual_seed(seed)
        base = LlamaForCausalLM.from_pretrained(root / "base", dtype=torch.float32)
        adapter = get_peft_model(
            base, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        )
        adapter.save_pretrained(root / name, save_embedding_layers=False)
    (root / "text.txt").write_text(" ".join(WORDS * 8), encoding="utf-8")
    names = ("base", "math", "code", "adapter", "adapter_2", "text.txt")
    return Models(*(str(root / name) for name in names))


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is kept for another run of the tests."""
    monkeypatch.setenv("HF_FRMERGE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def frmerge() -> Callable[..., Result]:
    """Run `frmerge` with arguments; an exception that would be a traceback fails the test."""

    def run(*arguments: str | Path) -> Result:
        result = click_runner().invoke(main, [str(argument) for argument in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return run
