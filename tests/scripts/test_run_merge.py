from __future__ import annotations

import ast
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SCRIPT = Path(__file__).parents[2] / "scripts" / "run_merge.py"
TEXT = "It was a dark and stormy night. " * 20


def save_tiny_model(folder: Path, seed: int) -> None:
    letters = {letter: index for index, letter in enumerate(["<unk>", *sorted(set(TEXT))])}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(letters), max_position_embeddings=64, **sizes)).save_pretrained(folder)


@pytest.mark.slow
def test_merge_and_evaluation_from_a_configuration_file(tmp_path: Path) -> None:
    for seed, name in enumerate(["a", "b"]):
        save_tiny_model(tmp_path / name, seed)
    (tmp_path / "night.txt").write_text(TEXT)
    config = {
        "experts": ["a", "b"], "weights": [1, 3], "method": "linear", "output_dir": "out", "disable_tqdm": True,
        "do_eval": True, "eval_files": ["night.txt"], "use_cpu": True,
    }  # fmt: skip
    (tmp_path / "merge.yml").write_text(yaml.safe_dump(config))
    run = subprocess.run(
        [sys.executable, str(SCRIPT), "merge.yml"],
        cwd=tmp_path, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr

    merged, a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "a", "b"))
    assert set(merged) == set(a)
    for name, tensor in merged.items():
        torch.testing.assert_close(
            tensor, (a[name].double() / 4 + b[name].double() * 3 / 4).float(), rtol=2e-7, atol=0
        )

    # The dataset first, then what was measured over all of them.
    metrics, overall = map(ast.literal_eval, run.stdout.splitlines()[-2:])
    assert "eval_effective_rank" in overall
    model = LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")
    ids = tokenizer(TEXT[:64], return_tensors="pt").input_ids
    with torch.no_grad():
        loss = model(ids, labels=ids).loss.item()
    # The text repeats every 32 letters, so any window of it has nearly the same loss.
    assert math.isclose(float(metrics["eval_night_loss"]), loss, rel_tol=0.05)
    assert math.isclose(
        float(metrics["eval_night_perplexity"]), math.exp(float(metrics["eval_night_loss"])), rel_tol=2e-3
    )
    record = json.loads((tmp_path / "out" / "merge_evaluation.json").read_text())
    assert {score["n_tokens"] for score in record["scores"]} == {len(TEXT) - 1}
