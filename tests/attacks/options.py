"""Random options together: what a plan accepts is merged, and what is merged can be computed again."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from click.testing import Result
from click_runner import click_runner
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import save_llama_family
from transformers import AutoModelForCausalLM

from attacks.disturbances import Tally
from attacks.site import empty
from hf_frmerge.cli.main import main
from hf_frmerge.methods.table import CHOICES

WORDS = ("house", "of", "wisdom", "has", "many", "rooms", "each", "opens", "on", "another", "where", "dogs", "sleep")

VALUES: dict[str, tuple[str, ...]] = {
    "method": tuple(name for name in CHOICES if name != "given"),
    "space": ("weights", "deltas"),
    "block": ("tensor", "row", "head", "layer", "model"),
    "norm": ("median", "max"),
    "beta": ("0.5", "-1"),
    "scale": ("0.5",),
    "density": ("0.5",),
    "weights": ("2,1", "nan"),
    "weight-rules": ("q_proj=0.9,0.1",),
    "layer-scales": ("1:0.5:1",),
    "post-step": ("svc",),
    "leave-out": ("norm",),
    "take": ("norm=1",),
    "fisher": ("diagonal", "kfac"),
    "calibration-form": ("table", "low_rank", "dense"),
    "calibration-rank": ("4",),
    "refine": ("3",),
    "refine-loss": ("reverse_kl", "jsd", "fisher_rao"),
    "refine-teacher": ("barycentre",),
    "refine-lmbda": ("0.5",),
    "refine-written-samples": ("4",),
    "refine-rho": ("0.05",),
    "dtype": ("bfloat16", "float16", "float32", "float64"),
    "max-shard-size": ("3KB",),
    "adapter-output": ("adapter", "merged"),
    "adapter-rank": ("4", "40"),
    "adapter-energy": ("0.9",),
    "adapter-rank-pattern": ("uniform",),
    "on-ambiguous": ("linear",),
    "settings-from": ("base", "1"),
    "memory-budget": ("64MiB",),
    "num-workers": ("1", "3"),
}
"""Options that decide about the result, or about what fits into memory -> values other than the default."""


class OptionAttack:
    """
    Merges of small language models, full, LoRA or both, by a few options drawn at random.

    Args:
        root: Folder for models and outputs.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        save_llama_family(root, WORDS, 0.1, eos_token="<eos>")
        _share_tensors(root)
        for seed, name in enumerate(("lora-a", "lora-b")):
            torch.manual_seed(seed)
            base = AutoModelForCausalLM.from_pretrained(root / "base")
            lora = LoraConfig(r=2 + seed, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
            get_peft_model(base, lora).save_pretrained(str(root / name))
        words = random.Random(0).choices(WORDS, k=1000)
        (root / "prompts.txt").write_text("\n\n".join(" ".join(words[i : i + 50]) for i in range(0, 1000, 50)))

    def __call__(self, rng: random.Random, tally: Tally) -> None:
        """Plan, merge and verify with random options."""
        experts = rng.choice((("math", "code"), ("lora-a", "lora-b"), ("math", "lora-b"), ("math", "code", "lora-a")))
        drawn = rng.sample(sorted(VALUES), rng.randint(1, 5))
        options = [word for name in drawn for word in (f"--{name}", rng.choice(VALUES[name]))]
        source = rng.choice((None, "self", str(self.root / "prompts.txt")))
        few = ("--num-calibration-samples", "8", "--max-calibration-length", "16")
        prompts = ["--calibration", source, *few] if source is not None else []
        models = [str(self.root / name) for name in (*experts, "base")]
        command = [*models[:-1], "--base-model", models[-1], *prompts, *options]
        tally.add(" ".join(command), self._troubles(command, tally))

    def _troubles(self, command: list[str], tally: Tally) -> list[str]:
        out = empty(self.root / "out")
        planned, merged = (_run(verb, *command, "--output-dir", str(out)) for verb in ("plan", "merge"))
        if planned.exit_code != merged.exit_code:
            return [f"the plan says {planned.stderr[-300:]!r}, and the merge {merged.stderr[-300:]!r}"]
        if merged.exit_code:
            tally.seen["refused"] += 1
            return [] if merged.exit_code == 2 and not out.exists() else [f"not refused: {merged.stderr[-300:]}"]
        tally.seen["merged"] += 1
        tally.seen["fitted"] += (out / "merge_corrections.safetensors").exists()
        verified = _run("verify", str(out))
        return [] if verified.exit_code == 0 else [f"not verified: {verified.stdout[-300:]}"]


def _share_tensors(root: Path) -> None:
    """Let the full experts have some tensors alike, as fine-tunes do: one is the base's, and one is not."""
    base, math, code = (root / name / "model.safetensors" for name in ("base", "math", "code"))
    norm, up = "model.norm.weight", "model.layers.0.mlp.up_proj.weight"
    alike = {norm: load_file(base)[norm], up: load_file(math)[up]}
    for file in (math, code):
        save_file(load_file(file) | alike, file, {"format": "pt"})


def _run(*words: str) -> Result:
    ended = click_runner().invoke(main, words)
    assert ended.exception is None or isinstance(ended.exception, SystemExit), ended.exception
    return ended
