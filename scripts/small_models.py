"""Small language models from nothing: a tokenizer made from texts, and random weights of a Llama or a Mixtral."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

VOCABULARY = 2_048
END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True)
class Size:
    """Layers, their width, the width inside their MLPs, heads of attention, and experts of which two see a token."""

    layers: int
    width: int
    inner: int
    heads: int
    experts: int = 0

    @property
    def parameters(self) -> int:
        """Number of parameters, with embeddings, which the head shares."""
        mlps = max(self.experts, 1) * 3 * self.width * self.inner + self.experts * self.width  # and their router
        layer = 4 * self.width**2 + mlps + 2 * self.width  # attention and two norms
        return VOCABULARY * self.width + self.layers * layer + self.width


SIZES = {
    "1m": Size(4, 128, 344, 4),
    "4m": Size(5, 256, 640, 4),
    "16m": Size(9, 384, 960, 6),
    "4m-mixture": Size(5, 192, 256, 4, experts=4),
}
"""By whole millions of parameters."""


def save_untrained(size: Size, texts: Sequence[str], folder: Path, seed: int) -> None:
    """Make a byte-level BPE tokenizer from texts, draw the weights of a model, and save both."""
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, PreTrainedTokenizerFast

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, VOCABULARY, special_tokens=[END_OF_TEXT], show_progress=False)
    end = tokenizer.token_to_id(END_OF_TEXT)
    mixture = {"num_local_experts": size.experts, "num_experts_per_tok": 2, "num_key_value_heads": size.heads}
    config = (MixtralConfig if size.experts else LlamaConfig)(
        **(mixture if size.experts else {}),
        vocab_size=VOCABULARY,
        hidden_size=size.width,
        intermediate_size=size.inner,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=end,
        eos_token_id=end,
    )
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer._tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT
    ).save_pretrained(folder)
