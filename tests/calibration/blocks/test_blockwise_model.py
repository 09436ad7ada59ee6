"""Models run block by block against the same models run whole, and the layers that are found in their blocks."""

from __future__ import annotations

import pytest
import torch
import transformers
from blockwise_models import MODELS, inputs, inside, opened

from hf_frmerge.calibration.blocks.blockwise_model import BlockwiseModel
from hf_frmerge.calibration.blocks.layers import BlockLayers, find_layers
from hf_frmerge.errors import ArgumentError


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


@pytest.mark.parametrize("name", MODELS)
def test_what_follows_the_blocks_is_the_same_to_the_bit_with_its_weights_converted_before(name: str) -> None:
    class_name, config = MODELS[name]
    weights = opened(name)[2]
    model = BlockwiseModel(getattr(transformers, class_name), config, torch.device("cpu"), torch.bfloat16)
    outer = model.computed({key: weights[key] for key in model.outer_parameters()})
    hidden, _ = model.begin(outer, model.computed(inside(weights, model.blocks[0])), inputs(False))
    converted = model.behind_blocks(outer)
    assert {value.dtype for value in converted.values() if value.ndim > 1} == {torch.bfloat16}
    assert torch.equal(
        model.finish(converted, hidden, inputs(False)).values, model.finish(outer, hidden, inputs(False)).values
    )


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
