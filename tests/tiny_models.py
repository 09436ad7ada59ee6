"""Tiny causal language models with a tokenizer of their own, saved as transformers saves them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def save_llama_family(root: Path, words: Sequence[str], spread: float) -> None:
    """Save `base`, `math` and `code`: bfloat16, tied, 20 tensors; experts are the base and `spread` times noise."""
    vocabulary = {word: index for index, word in enumerate(["<unk>", *dict.fromkeys(words)])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=len(vocabulary),
        tie_word_embeddings=True,
    )
    for seed, name in enumerate(("base", "math", "code")):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        generator = torch.Generator().manual_seed(seed)
        if name != "base":
            for parameter in model.parameters():
                parameter.data += spread * torch.randn(parameter.shape, generator=generator)
        model.to(torch.bfloat16).save_pretrained(root / name)
        fast.save_pretrained(root / name)
