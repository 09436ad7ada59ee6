"""The correction of a fitted merge as an adapter of the merge without data, as PEFT merges it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click_runner import click_runner
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from hf_frmerge import FisherRaoMerger, MergingArguments
from hf_frmerge.cli.main import main

VOCABULARY, LENGTH = 40, 16


def experts(folder: Path, architecture: str) -> list[str]:
    """A base, and two LoRA experts of it, each trained on walks through tokens of its own."""
    torch.manual_seed(0)
    if architecture == "llama":
        config: Any = LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, initializer_range=0.1,
        )  # fmt: skip
        model: Any = LlamaForCausalLM(config)
        lora: dict[str, Any] = {"target_modules": "all-linear"}
    else:
        model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=32))
        lora = {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}
    model.save_pretrained(folder / "base")
    for number in range(2):
        torch.manual_seed(number + 1)
        base = AutoModelForCausalLM.from_pretrained(folder / "base")
        expert = get_peft_model(base, LoraConfig(r=2, lora_alpha=4, **lora))
        optimizer = torch.optim.Adam((p for p in expert.parameters() if p.requires_grad), 1e-2)
        for step in range(60):
            ids = torch.tensor(walks(number, seed=100 + step))
            optimizer.zero_grad()
            expert(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
        expert.save_pretrained(folder / f"expert{number}")
    return [str(folder / f"expert{number}") for number in range(2)]


def walks(expert: int, seed: int = 0) -> list[list[int]]:
    half = VOCABULARY // 2
    follows = np.random.default_rng(expert).permutation(half)
    ids = np.random.default_rng([seed, expert]).integers(0, half, (32, LENGTH))
    for place in range(1, LENGTH, 2):
        ids[:, place] = follows[ids[:, place - 1]]
    return (half * expert + ids).tolist()


def merge(folder: Path, names: list[str], out: str, form: str | None) -> None:
    prompts = {name: walks(number) for number, name in enumerate(names)}
    args = MergingArguments(
        output_dir=str(folder / out), method="linear", disable_tqdm=True, max_calibration_length=LENGTH,
        adapter_output="merged", num_calibration_samples=32, calibration_form=form or "auto", calibration_rank=4,
    )  # fmt: skip
    FisherRaoMerger(
        names, args, base_model=str(folder / "base"), calibration_dataset=prompts if form is not None else None
    ).merge()


def extract(folder: Path, model: str, base: str) -> Any:
    command = ["extract-lora", str(folder / model), "--base-model", str(folder / base), "--correction"]
    return click_runner().invoke(main, [*command, "--output-dir", str(folder / "adapter")])


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_start_with_the_adapter_is_the_fitted_merge(tmp_path: Path, architecture: str) -> None:
    """GPT-2 stores its weights the other way round."""
    names = experts(tmp_path, architecture)
    merge(tmp_path, names, "start", None)
    merge(tmp_path, names, "fitted", "low_rank")
    result = extract(tmp_path, "fitted", "start")
    assert result.exit_code == 0, result.stderr
    start, fitted = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("start", "fitted"))
    before = {name: values.clone() for name, values in start.state_dict().items()}
    merged = PeftModel.from_pretrained(start, tmp_path / "adapter").merge_and_unload().state_dict()
    assert any(not torch.equal(before[name], values) for name, values in merged.items())
    for name, values in fitted.state_dict().items():
        if name.endswith(".weight") and values.ndim == 2:
            torch.testing.assert_close(merged[name], values, rtol=1e-5, atol=1e-6)


def test_what_is_no_such_correction_is_refused_with_what_helps(tmp_path: Path) -> None:
    names = experts(tmp_path, "llama")
    merge(tmp_path, names, "start", None)
    merge(tmp_path, names, "fitted", "low_rank")
    merge(tmp_path, names, "dense", "dense")
    for model, base, message in (
        ("start", "base", "it is no merge that a fit added something to. Merge with --calibration and"),
        ("dense", "start", "a number for every weight, which no factors hold. Merge with --calibration-form low_rank"),
        (
            "fitted",
            "base",
            "by more than the correction that the fit added. The base has to be the same merge",
        ),
    ):
        result = extract(tmp_path, model, base)
        assert result.exit_code == 1 and message in " ".join(result.stderr.split()), result.stderr
        assert not (tmp_path / "adapter" / "adapter_config.json").exists()
    assert extract(tmp_path, "fitted", "start").exit_code == 0
