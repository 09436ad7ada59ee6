"""Write models as llama.cpp does: its names, its order of rows, its norms, and codes of the gguf package."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as Type
from gguf.quants import quantize

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
_GEMMA2 = _LAYER | {
    "post_attention_norm": "post_attention_layernorm", "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}  # fmt: skip
_MOE = {name: weight for name, weight in _LAYER.items() if not weight.startswith("mlp.")} | {
    "ffn_gate_inp": "mlp.gate", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
}  # fmt: skip
_LAYERS = {"llama": _LAYER, "qwen2": _LAYER, "gemma2": _GEMMA2, "qwen3moe": _MOE}

KINDS = [Type.F32, Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0]


def random_blocks(shape: tuple[int, ...], kind: Type, seed: int = 0) -> np.ndarray:
    """Return codes of a type that the package cannot make; its scales are halves of 16 bits, and must be finite."""
    per_block, size = GGML_QUANT_SIZES[kind]
    blocks = np.random.default_rng(seed).integers(0, 256, (*shape[:-1], shape[-1] // per_block, size), dtype=np.uint8)
    scale = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
    for place in {Type.Q4_K: (0, 2), Type.Q5_K: (0, 2), Type.Q6_K: (208,), Type.Q3_K: (108,), Type.Q2_K: (80, 82)}[
        kind
    ]:
        blocks[..., place : place + 2] = scale
    return blocks.reshape(*shape[:-1], -1)


def tensors_of(model: Any, architecture: str) -> dict[str, np.ndarray]:
    """Return the tensors of a model of transformers under llama.cpp's names, as it stores them, float32."""
    state = {name: tensor.detach().float().numpy() for name, tensor in model.state_dict().items()}
    config, tensors = model.config, {}
    pairs = {f"{name}.": f"{weight}." for name, weight in _TOP.items()}
    for layer in range(config.num_hidden_layers):
        pairs |= {f"blk.{layer}.{name}.": f"model.layers.{layer}.{at}." for name, at in _LAYERS[architecture].items()}
        if architecture == "qwen3moe":
            experts = f"model.layers.{layer}.mlp.experts"
            gate, up = np.split(state[f"{experts}.gate_up_proj"], 2, axis=1)
            joined = {"gate": gate, "up": up, "down": state[f"{experts}.down_proj"]}
            tensors |= {f"blk.{layer}.ffn_{name}_exps.weight": stack for name, stack in joined.items()}
    for name, weight in pairs.items():
        for ending in ("weight", "bias"):
            if weight + ending in state and not (name == "output." and config.tie_word_embeddings):
                tensors[name + ending] = _as_stored(state[weight + ending], name, config, architecture)
    return tensors


def _as_stored(values: np.ndarray, name: str, config: Any, architecture: str) -> np.ndarray:
    if architecture == "gemma2" and "norm" in name:
        return values + 1
    heads = {"attn_q.": config.num_attention_heads, "attn_k.": config.num_key_value_heads}.get(name.split(".", 2)[-1])
    if architecture != "llama" or heads is None:
        return values
    # Rotated pairs lie side by side in llama.cpp, and half a head apart in transformers.
    return values.reshape(heads, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def write_gguf(
    path: Path,
    architecture: str,
    config: Any,
    tensors: dict[str, np.ndarray],
    kind: Type | Callable[[str], Type] = Type.F32,
    settings: Callable[[GGUFWriter], object] = lambda writer: None,
) -> None:
    """Write tensors with the settings of a config; matrices as `kind` (arrays of bytes are codes already)."""
    writer = GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_rope_dimension_count(head_dim)
    if architecture in ("gemma2", "qwen3moe"):
        writer.add_key_length(head_dim)
    if architecture == "qwen3moe":
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    settings(writer)
    for name, values in tensors.items():
        chosen = kind(name) if callable(kind) else kind
        # llama.cpp keeps short tensors, and what decides which expert is used, as float32.
        own = Type.F32 if values.ndim < 2 or "gate_inp" in name else chosen
        writer.add_tensor(name, values if values.dtype == np.uint8 else quantize(values, own), raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
