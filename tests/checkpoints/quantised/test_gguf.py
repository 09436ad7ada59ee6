"""Tensors of GGUF files of several architectures, against the models that transformers loads from the same files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

pytest.importorskip("gguf")
pytest.importorskip("transformers", minversion="5.20")

from gguf import GGUFWriter
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING
from transformers.modeling_gguf_pytorch_utils import TensorProcessor, get_gguf_hf_weights_map

from hf_frmerge.checkpoints.quantised.dequantise import dequantise
from hf_frmerge.checkpoints.resolve import resolve
from hf_frmerge.checkpoints.tensors.reader import open_checkpoint

CONFIGS = {
    "bloom": transformers.BloomConfig(vocab_size=40, hidden_size=64, n_layer=2, n_head=4),
    "falcon": transformers.FalconConfig(
        vocab_size=40, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, bias=False
    ),
    "gpt2": transformers.GPT2Config(vocab_size=40, n_embd=64, n_layer=2, n_head=4),
    "mamba": transformers.MambaConfig(vocab_size=40, hidden_size=64, num_hidden_layers=2, state_size=8),
    "starcoder2": transformers.Starcoder2Config(
        vocab_size=40, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    ),
    "t5": transformers.T5Config(
        vocab_size=40, d_model=64, d_ff=96, num_layers=2, num_heads=4, d_kv=16, feed_forward_proj="gated-gelu"
    ),
}  # fmt: skip
TURNED = ("attn_qkv.weight", "attn_output.weight", "ffn_up.weight", "ffn_down.weight")  # of GPT-2


def stored_shape(architecture: str, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    if architecture == "gpt2" and name.endswith(TURNED):
        return shape[::-1]
    return (shape[0], shape[2]) if name.endswith("ssm_conv1d.weight") else shape


def write(path: Path, architecture: str, model: Any) -> None:
    """Write random tensors under llama.cpp's names for those of a model, and its settings."""
    writer, config = GGUFWriter(path, architecture), model.config
    for key, entry in GGUF_CONFIG_MAPPING[architecture].items():
        value = getattr(config, entry, None) if entry else None
        if isinstance(value, (int, float)):
            (writer.add_uint32 if isinstance(value, int) else writer.add_float32)(f"{architecture}.{key}", value)
    writer.add_token_list([str(token) for token in range(40)])
    random, state = np.random.default_rng(0), model.state_dict()
    for name, weight in get_gguf_hf_weights_map(model, TensorProcessor(), model_type=architecture).items():
        if weight in state and weight != "lm_head.weight":
            values = random.normal(size=stored_shape(architecture, name, tuple(state[weight].shape))).astype(
                np.float32
            )
            writer.add_tensor(name, -np.abs(values) if name.endswith("ssm_a") else values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("architecture", CONFIGS)
def test_tensors_are_those_of_the_model_that_transformers_loads(tmp_path: Path, architecture: str) -> None:
    kind = transformers.AutoModelForSeq2SeqLM if architecture == "t5" else transformers.AutoModelForCausalLM
    write(tmp_path / "m.gguf", architecture, kind.from_config(CONFIGS[architecture]))
    model = kind.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    state = model.state_dict()
    with open_checkpoint(resolve(str(tmp_path))) as checkpoint:
        dequantise(checkpoint)
        assert checkpoint.tensors.keys() == dict(model.named_parameters()).keys()
        for name, info in checkpoint.tensors.items():
            found = np.frombuffer(checkpoint.read(name), np.float32).reshape(info.shape)
            assert np.array_equal(found, state[name].numpy()), name
