"""Tiny models of many architectures, whole and block by block."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from hf_frmerge.calibration.blocks.blockwise_model import BlockwiseModel

SIZES = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
WIDE = {**SIZES, "intermediate_size": 24}
MODELS = {
    "Llama": ("LlamaForCausalLM", transformers.LlamaConfig(**WIDE, num_key_value_heads=1)),
    "Qwen2": ("Qwen2ForCausalLM", transformers.Qwen2Config(**WIDE, num_key_value_heads=1, tie_word_embeddings=True)),
    "Gemma2": (
        "Gemma2ForCausalLM",
        transformers.Gemma2Config(**WIDE, num_key_value_heads=1, head_dim=8, sliding_window=4),
    ),
    "GPT-2": ("GPT2LMHeadModel", transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=3, n_head=2)),
    "OPT": (
        "OPTForCausalLM",
        transformers.OPTConfig(**SIZES, ffn_dim=24, word_embed_proj_dim=16, max_position_embeddings=32),
    ),
    "Mixtral": (
        "MixtralForCausalLM",
        transformers.MixtralConfig(**WIDE, num_key_value_heads=1, num_local_experts=3, num_experts_per_tok=2),
    ),
    "GPT-NeoX": ("GPTNeoXForCausalLM", transformers.GPTNeoXConfig(**WIDE, max_position_embeddings=32)),
    "Phi": ("PhiForCausalLM", transformers.PhiConfig(**WIDE, max_position_embeddings=32, pad_token_id=0)),
    "Falcon": (
        "FalconForCausalLM",
        transformers.FalconConfig(
            vocab_size=50, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, pad_token_id=0
        ),
    ),
    "Gemma 3, with vision": (
        "Gemma3ForConditionalGeneration",
        transformers.Gemma3Config(
            text_config={**WIDE, "num_key_value_heads": 1, "head_dim": 8},
            vision_config={
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_hidden_layers": 5,
                "num_attention_heads": 2,
                "image_size": 16,
                "patch_size": 8,
            },
        ),
    ),
    "BERT": ("BertForSequenceClassification", transformers.BertConfig(**WIDE, num_labels=3)),
    "DistilBERT": (
        "DistilBertForSequenceClassification",
        transformers.DistilBertConfig(vocab_size=50, dim=16, n_layers=3, n_heads=2, hidden_dim=24, num_labels=3),
    ),
    "ModernBERT": (
        "ModernBertForSequenceClassification",
        transformers.ModernBertConfig(**WIDE, num_labels=3, pad_token_id=0, local_attention=4),
    ),
}


def opened(name: str) -> tuple[Any, BlockwiseModel, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    class_name, config = MODELS[name]
    model_class = getattr(transformers, class_name)
    whole = model_class(config).eval()
    with torch.no_grad():
        for parameter in whole.parameters():  # norms and biases are 1 and 0 otherwise, which hides mistakes
            parameter.add_(0.1 * torch.randn_like(parameter))
    blocks = BlockwiseModel(model_class, config, torch.device("cpu"), torch.float32)
    return whole, blocks, {key: value.detach() for key, value in whole.named_parameters()}


def inside(weights: dict[str, torch.Tensor], block: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(f"{block}."): w for name, w in weights.items() if name.startswith(f"{block}.")}


def inputs(padded: bool) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 50, (2, 9), generator=torch.Generator().manual_seed(1))
    if not padded:
        return {"input_ids": ids}
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask}
