"""Tiny causal language models with a tokenizer of their own, saved as transformers saves them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)


def save_llama_family(root: Path, words: Sequence[str], spread: float, **special: str) -> None:
    """Save `base`, `math` and `code`: bfloat16, tied, 20 tensors; experts are the base and `spread` times noise."""
    fast = word_tokenizer(words, **special)
    vocabulary = fast.get_vocab()
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


def save_classifier_family(root: Path, words: Sequence[str], spread: float) -> None:
    """Save `base`, `math` and `code`: float32 BERT classifiers of the labels `no`, `maybe`, `yes`."""
    fast = word_tokenizer(words, pad_token="<pad>")
    config = BertConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=len(fast),
        pad_token_id=fast.pad_token_id,
        id2label={0: "no", 1: "maybe", 2: "yes"},
        label2id={"no": 0, "maybe": 1, "yes": 2},
    )
    for seed, name in enumerate(("base", "math", "code")):
        torch.manual_seed(0)
        model = BertForSequenceClassification(config)
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():  # the base too: fresh heads give all samples one label
            parameter.data += (spread if name != "base" else 0.2) * torch.randn(parameter.shape, generator=generator)
        model.save_pretrained(root / name)
        fast.save_pretrained(root / name)


def word_tokenizer(words: Sequence[str], **special: str) -> PreTrainedTokenizerFast:
    """Tokenizer of whole words, with `<unk>` first and then the special tokens."""
    vocabulary = {word: index for index, word in enumerate(["<unk>", *special.values(), *dict.fromkeys(words)])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **special)


def save_tokenizer(folder: Path, words: list[str], chat_template: str | None = None) -> None:
    """Save a tokenizer of three special tokens and some words, without a model."""
    vocabulary = {word: index for index, word in enumerate(["<unk>", "<s>", "</s>", *words])}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token="<unk>")),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
    )
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
