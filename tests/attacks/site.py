"""Checkpoints and merges to attack, and what must hold of the folder of a merge at any moment."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from attacks import children

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_hidden_layers": 1,
    "intermediate_size": 24,
    "vocab_size": 32,
    "tie_word_embeddings": False,
}
TOKENIZER = {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}, "added_tokens": []}


@dataclass(frozen=True, eq=False)
class Site:
    """
    Files under attack.

    Attributes:
        root: everything lies below it; `secret` lies in it, outside of every folder that a command is given.
        merges: commands of merges, by name, without their output folder.
        wanted: what each of them writes if nobody disturbs it: name -> content.
        inputs: content of every file of the inputs, by path.
    """

    root: Path
    merges: dict[str, list[str]]
    wanted: dict[str, dict[str, bytes]]
    inputs: dict[Path, bytes]

    @property
    def log(self) -> Path:
        return self.root / "log"

    def inputs_are_untouched(self) -> bool:
        return files_below(self.root / "in") == self.inputs

    def trouble(self, name: str, out: Path) -> str:
        """Say what is wrong with the folder of a merge, which must be no model, or the one that was wanted."""
        config = "adapter_config.json" if name == "adapters" else "config.json"
        if not (out / config).exists():
            return ""
        if not (out / "merge_manifest.json").exists():
            return "a loader takes it for a model before its record is there"
        differing = [file for file, content in self.wanted[name].items() if _content(out / file) != content]
        return f"a loader takes it for a model, and {differing[0]} is another" if differing else ""


def build_site(root: Path) -> Site:
    """Write checkpoints, and merge them undisturbed."""
    children.warm_up()
    inputs = root / "in"
    for seed, name in enumerate(("base", "a", "b")):
        write_model(inputs / name, seed)
    for seed, name in enumerate(("x", "y")):
        _write_adapter(inputs / name, seed)
    (root / "secret").write_text("secret")
    full = [str(inputs / "a"), str(inputs / "b")]
    merges = {
        "full": ["merge", *full, "--max-shard-size", "3KB", "--num-workers", "1"],
        "sparse": ["merge", *full, "--base-model", str(inputs / "base"), "--method", "ties", "--num-workers", "1"],
        "adapters": ["merge", str(inputs / "x"), str(inputs / "y"), "--num-workers", "1"],
    }
    site = Site(root, merges, {}, files_below(inputs))
    for name, command in merges.items():
        out = root / f"wanted-{name}"
        ended = children.run([*command, "--output-dir", out], site.log)
        assert ended.code == 0, ended
        site.wanted[name] = {path.name: path.read_bytes() for path in out.iterdir() if _is_same_every_time(path)}
    return site


def write_model(folder: Path, seed: int) -> None:
    """Write a model of one layer with its tokenizer and card."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(seed)
    layer = "model.layers.0."
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (32, 16),
        f"{layer}self_attn.q_proj.weight": (16, 16),
        f"{layer}mlp.down_proj.weight": (16, 24),
        f"{layer}input_layernorm.bias": (16,),  # small, and beside the next: written with one call
        f"{layer}input_layernorm.weight": (16,),
        "lm_head.weight": (32, 16),
    }
    tensors = {name: generator.normal(size=shape).astype("f") for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{x}}", "name": folder.name}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "temperature": 0.5 + seed}))
    (folder / "README.md").write_text("---\nlicense: mit\nlanguage: [en]\ntags: [x]\n---\nHello")


def _write_adapter(folder: Path, seed: int) -> None:
    folder.mkdir(parents=True)
    generator = np.random.default_rng(seed)
    tensors = {}
    for module, n_out, n_in in (("self_attn.q_proj", 16, 16), ("mlp.down_proj", 16, 24)):
        prefix = f"base_model.model.model.layers.0.{module}"
        tensors[f"{prefix}.lora_A.weight"] = generator.normal(size=(4, n_in)).astype("f")
        tensors[f"{prefix}.lora_B.weight"] = generator.normal(size=(n_out, 4)).astype("f")
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "rank_pattern": {"q_proj": 4},
        "alpha_pattern": {r".*layers\.0\..*down_proj": 4},
        "target_modules": ["q_proj", "down_proj"],
        "base_model_name_or_path": "org/base",
        "task_type": "CAUSAL_LM",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))


def files_below(folder: Path) -> dict[Path, bytes]:
    """Return the content of every file below a folder."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def empty(folder: Path) -> Path:
    """Return a folder that does not exist any more."""
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def _is_same_every_time(path: Path) -> bool:
    """Whether a file of a merge holds neither times nor paths."""
    return path.is_file() and path.name not in ("merge_manifest.json", ".frmerge_sources.json", "README.md")


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None
