"""Models run block by block against the same models run whole, and the layers that are found in their blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from hf_frmerge.calibration.blocks.blockwise_model import BlockwiseModel
from hf_frmerge.calibration.blocks.layers import BlockLayers, find_layers
from hf_frmerge.errors import ArgumentError

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


@pytest.mark.parametrize("padded", [False, True], ids=["whole rows", "padded"])
@pytest.mark.parametrize("name", MODELS)
def test_blocks_give_what_the_whole_model_gives(name: str, padded: bool) -> None:
    whole, model, weights = opened(name)
    batch = inputs(padded)
    outer = {key: weights[key] for key in model.outer_parameters()}
    assert not any(parameter.device.type != "meta" for parameter in model.model.parameters())
    hidden, calls = model.begin(outer, inside(weights, model.blocks[0]), batch)
    assert len(model.blocks) == len(calls) == 3
    for block, call in zip(model.blocks, calls):
        hidden = model.run_block(block, inside(weights, block), hidden, call)
    with torch.no_grad():
        expected = whole(**batch).logits
    logits = model.finish(outer, hidden, batch).values
    if padded and logits.ndim == 3:
        mask = batch["attention_mask"].bool()
        logits, expected = logits[mask], expected[mask]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


def layers_of(name: str) -> BlockLayers:
    _, model, weights = opened(name)
    first = model.blocks[0]
    hidden, calls = model.begin(
        {k: weights[k] for k in model.outer_parameters()}, inside(weights, first), inputs(False)
    )
    return find_layers(model, first, inside(weights, first), hidden, calls[0])


def test_layers_of_a_decoder_that_begins_its_blocks_with_norms() -> None:
    layers = layers_of("Llama")
    assert [group.names for group in layers.groups] == [
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    ]
    assert [group.writes for group in layers.groups] == [False, True, False, True]
    assert [group.norm_after for group in layers.groups] == [None, "post_attention_layernorm", None, None]
    assert layers.norms == ["input_layernorm", "post_attention_layernorm"]
    assert not layers.is_post_norm


def test_layers_of_an_encoder_that_ends_its_blocks_with_norms() -> None:
    layers = layers_of("BERT")
    assert [group.names for group in layers.groups] == [
        ("attention.self.query", "attention.self.key", "attention.self.value"),
        ("attention.output.dense",),
        ("intermediate.dense",),
        ("output.dense",),
    ]
    assert [group.writes for group in layers.groups] == [False, True, False, True]
    assert layers.groups[3].norm_after == "output.LayerNorm"
    assert layers.is_post_norm


def test_layers_that_are_stored_transposed_are_found_too() -> None:
    assert [group.names for group in layers_of("GPT-2").groups] == [
        ("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",)
    ]  # fmt: skip


def test_a_model_with_encoder_and_decoder_is_refused() -> None:
    config = transformers.T5Config(vocab_size=50, d_model=16, d_ff=24, num_layers=2, num_heads=2, d_kv=8)
    with pytest.raises(ArgumentError, match="an encoder and a decoder"):
        BlockwiseModel(transformers.T5ForConditionalGeneration, config, torch.device("cpu"), torch.float32)
