"""
Synthetic Llama checkpoints for the benchmarks: one base and N fine-tunes of it, bf16, sharded, never loadable by luck.

    python scripts/bench_models.py --size 0.5b --experts 8 --output-dir /tmp/bench/0.5b

Weights are pseudo-random; what matters is that shapes, dtypes and angles are those of real fine-tunes (norm of a delta
0.01 to 0.30 of the weights').
"""

from __future__ import annotations

import argparse
import json
import struct
from pathlib import Path

import numpy as np

# name: (hidden, intermediate, layers, key-value width, vocabulary)
SIZES = {
    "tiny": (64, 176, 2, 32, 512),
    "0.1b": (768, 2048, 12, 768, 32000),
    "0.5b": (1024, 2816, 30, 1024, 40000),
    "1.1b": (2048, 5632, 22, 256, 32000),
}
_SHARD_BYTES = 400_000_000
_POOL = 1 << 22  # noise is drawn once and read from different places: drawing it all would take minutes


def shapes(size: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Llama model's tensors."""
    hidden, inner, layers, kv, vocabulary = SIZES[size]
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        tensors |= {
            prefix + "self_attn.q_proj.weight": (hidden, hidden),
            prefix + "self_attn.k_proj.weight": (kv, hidden),
            prefix + "self_attn.v_proj.weight": (kv, hidden),
            prefix + "self_attn.o_proj.weight": (hidden, hidden),
            prefix + "mlp.gate_proj.weight": (inner, hidden),
            prefix + "mlp.up_proj.weight": (inner, hidden),
            prefix + "mlp.down_proj.weight": (hidden, inner),
            prefix + "input_layernorm.weight": (hidden,),
            prefix + "post_attention_layernorm.weight": (hidden,),
        }
    return tensors | {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}


def write_model(folder: Path, size: str, expert: int | None) -> None:
    """Write one model; `expert=None` is the base."""
    folder.mkdir(parents=True, exist_ok=True)
    hidden, inner, layers, kv, vocabulary = SIZES[size]
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
        "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": hidden // 64,
        "num_key_value_heads": kv // 64 or 1, "head_dim": 64 if kv >= 64 else 32, "vocab_size": vocabulary,
        "rms_norm_eps": 1e-5, "hidden_act": "silu", "max_position_embeddings": 2048, "dtype": "bfloat16",
        "tie_word_embeddings": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    groups: list[dict[str, tuple[int, ...]]] = [{}]
    held = 0
    for name, shape in shapes(size).items():
        nbytes = 2 * int(np.prod(shape))
        if held and held + nbytes > _SHARD_BYTES:
            groups.append({})
            held = 0
        groups[-1][name] = shape
        held += nbytes
    files = ["model.safetensors"]
    if len(groups) > 1:
        files = [f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))]
        weight_map = {name: file for file, group in zip(files, groups) for name in group}
        index = {"metadata": {"total_size": sum(2 * int(np.prod(s)) for g in groups for s in g.values())}}
        (folder / "model.safetensors.index.json").write_text(json.dumps({**index, "weight_map": weight_map}))
    pool = np.random.default_rng(0).standard_normal(_POOL, dtype=np.float32)
    for file, group in zip(files, groups):
        _write_shard(folder / file, group, pool, expert)


def _write_shard(path: Path, group: dict[str, tuple[int, ...]], pool: np.ndarray, expert: int | None) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, shape in group.items():
        nbytes = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [position, position + nbytes]}
        position += nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for number, (name, shape) in enumerate(group.items()):
            spread = 0.01 * 30 ** ((number % 8) / 7)  # relative norm of the delta, 0.01 to 0.30
            scale = 1.0 if "norm" in name else shape[-1] ** -0.5
            numel = int(np.prod(shape))
            for start in range(0, numel, _POOL):
                count = min(_POOL, numel - start)
                values = np.roll(pool, 7919 * number + start)[:count] * scale
                if expert is not None:
                    values = values + np.roll(pool, 104729 * (expert + 1) + 31 * number)[:count] * (scale * spread)
                bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
                file.write(((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16).tobytes())


def ensure_models(folder: Path, size: str, experts: int) -> tuple[Path, list[Path]]:
    """Return the base and the experts below `folder`, written where they are missing."""
    paths = [folder / "base", *(folder / f"expert-{i}" for i in range(experts))]
    for number, path in enumerate(paths):
        if not (path / "done").exists():
            write_model(path, size, None if number == 0 else number - 1)
            (path / "done").touch()
    return paths[0], paths[1:]


def main() -> None:
    """Write models from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="0.5b")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--output-dir", type=Path, required=True)
    options = parser.parse_args()
    base, experts = ensure_models(options.output_dir, options.size, options.experts)
    print(f"{base} and {len(experts)} experts: {sum(np.prod(s) for s in shapes(options.size).values()):,} parameters")


if __name__ == "__main__":
    main()
