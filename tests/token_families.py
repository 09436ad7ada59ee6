"""Tiny language models of one family whose tokenizers differ, and the rows that belong together, token by token."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEXTS = ["hello world, there they are", "the other words of the others", "lower and lowest, newer and newest"] * 4
VOCABULARY_TENSORS = ("model.embed_tokens.weight", "lm_head.weight")


def bpe(texts: Sequence[str] = tuple(TEXTS), n_tokens: int = 290) -> Tokenizer:
    """A byte-level BPE tokenizer, trained on a few words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=n_tokens, special_tokens=["<eos>"], initial_alphabet=sorted(alphabet))
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def renumbered(tokenizer: Tokenizer, seed: int = 0) -> Tokenizer:
    """The same tokenizer with the ids of its tokens shuffled."""
    content = json.loads(tokenizer.to_str())
    tokens = sorted(content["model"]["vocab"])
    order = np.random.default_rng(seed).permutation(len(tokens))
    content["model"]["vocab"] = {token: int(place) for token, place in zip(tokens, order)}
    for token in content["added_tokens"]:
        token["id"] = content["model"]["vocab"][token["content"]]
    return Tokenizer.from_str(json.dumps(content))


def save_expert(
    folder: Path,
    tokenizer: Tokenizer | None = None,
    *,
    added: Sequence[str] = (),
    special: Sequence[str] = (),
    n_rows: int | None = None,
    seed: int = 0,
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
    template: str | None = None,
    eos: str = "<eos>",
) -> LlamaForCausalLM:
    """Save a model with a tokenizer, to which tokens are added; `n_rows` of embeddings, by default one for each."""
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer or bpe(), eos_token="<eos>")
    fast.add_tokens(list(added))
    fast.add_special_tokens({"additional_special_tokens": list(special)})
    fast.eos_token = eos
    fast.chat_template = template
    ends = {"bos_token_id": None, "eos_token_id": fast.convert_tokens_to_ids(eos), "pad_token_id": None}
    config = LlamaConfig(
        vocab_size=n_rows or len(fast),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=tied,
        **ends,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.to(dtype).save_pretrained(folder)
    fast.save_pretrained(folder)
    return model


def vocabulary_of(folder: Path) -> dict[str, int]:
    """Token -> id, as transformers loads the tokenizer."""
    return AutoTokenizer.from_pretrained(folder).get_vocab()


def aligned_rows(
    name: str,
    output: Mapping[str, int],
    n_rows: int,
    experts: Sequence[Path],
    base: Path | None,
    weights: Sequence[float],
) -> tuple[list[np.ndarray], np.ndarray | None]:
    """
    Rows of all models in the order of the output, float64, by loops over tokens.

    A token that a model lacks gets the weighted mean of the experts that have it, else the row of the base; a row
    that no model has the mean of all rows of the base, else of the first expert.
    """
    folders = [*experts, *([base] if base else [])]
    stored = [load_file(folder / "model.safetensors")[name].double().numpy() for folder in folders]
    ids = [vocabulary_of(folder) for folder in folders]
    token_at = {place: token for token, place in output.items()}
    columns: list[list[np.ndarray]] = [[] for _ in folders]
    donor_mean = (stored[-1] if base else stored[0]).mean(0)
    for place in range(n_rows):
        token = token_at.get(place)
        own: list[np.ndarray | None] = []
        for rows, vocabulary in zip(stored, ids):
            if token is not None:
                own.append(rows[vocabulary[token]] if token in vocabulary else None)
            else:
                own.append(rows[place] if place < len(rows) and place not in vocabulary.values() else None)
        having = [(w, row) for w, row in zip(weights, own[: len(experts)]) if row is not None]
        if having:
            fill = sum(w * row for w, row in having) / sum(w for w, _ in having)
        else:
            fill = own[-1] if base and own[-1] is not None else donor_mean
        for column, row in zip(columns, own):
            column.append(fill if row is None else row)
    arrays = [np.array(column) for column in columns]
    return (arrays[:-1], arrays[-1]) if base else (arrays, None)
