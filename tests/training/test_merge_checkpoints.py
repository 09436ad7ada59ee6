"""The callback in a real run of `transformers.Trainer`, against float64 means of the checkpoints it saved."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from click_runner import click_runner
from merge_reference import naive_karcher
from peft import LoraConfig, get_peft_model
from safetensors.numpy import load_file
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from hf_frmerge import MergeCheckpointsCallback, MergingArguments
from hf_frmerge.cli.main import main
from hf_frmerge.errors import ArgumentError
from hf_frmerge.provenance.verify import verify

STEPS = 6
TEXT = [{"input_ids": [1, 5, 9, 2, 7, 3], "labels": [1, 5, 9, 2, 7, 3]} for _ in range(8)]


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=32
    )
    return LlamaForCausalLM(config)


def train(folder: Path, callback: MergeCheckpointsCallback, model: torch.nn.Module | None = None, **options) -> Path:
    """Train for six steps, save every second, and return the folder of the run."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **{"save_strategy": "steps", "save_steps": 2, **options},
    )
    Trainer(model or tiny_model(), arguments, train_dataset=TEXT, callbacks=[callback]).train()
    return folder


def tensors(folder: Path) -> dict[str, np.ndarray]:
    return {name: value.astype(np.float64) for name, value in load_file(folder / "model.safetensors").items()}


def linear(**options) -> MergingArguments:
    return MergingArguments(method="linear", **options)


def test_the_last_two_checkpoints_are_averaged(tmp_path: Path) -> None:
    run = train(tmp_path / "run", MergeCheckpointsCallback(last=2, args=linear(output_dir=str(tmp_path / "mean"))))
    fourth, sixth = tensors(run / "checkpoint-4"), tensors(run / "checkpoint-6")
    merged = load_file(tmp_path / "mean" / "model.safetensors")
    assert merged.keys() == fourth.keys()
    assert any((fourth[name] != sixth[name]).any() for name in fourth)
    for name, value in merged.items():
        np.testing.assert_array_equal(value, ((fourth[name] + sixth[name]) / 2).astype(np.float32))
    assert LlamaForCausalLM.from_pretrained(tmp_path / "mean").config.vocab_size == 32
    assert verify(str(tmp_path / "mean")).ok


def test_the_karcher_mean_is_the_default_and_lies_in_the_run(tmp_path: Path) -> None:
    run = train(tmp_path / "run", MergeCheckpointsCallback(last=3))
    checkpoints = [tensors(run / f"checkpoint-{step}") for step in (2, 4, 6)]
    for name, value in load_file(run / "merged" / "model.safetensors").items():
        points = np.stack([checkpoint[name].ravel() for checkpoint in checkpoints])
        expected = naive_karcher(points, [1 / 3] * 3)
        np.testing.assert_allclose(value.ravel(), expected, rtol=0, atol=2e-7 * np.abs(expected).max())


def test_weights_go_by_step(tmp_path: Path) -> None:
    options = linear(output_dir=str(tmp_path / "m"))
    run = train(tmp_path / "run", MergeCheckpointsCallback(weights="ema:0.5", args=options))
    checkpoints = [tensors(run / f"checkpoint-{step}") for step in (2, 4, 6)]
    for name, value in load_file(tmp_path / "m" / "model.safetensors").items():
        expected = sum(weight * checkpoint[name] for weight, checkpoint in zip((1 / 7, 2 / 7, 4 / 7), checkpoints))
        np.testing.assert_allclose(value, expected, rtol=2e-7, atol=1e-12)


def test_adapters_are_merged_into_an_adapter(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    run = train(tmp_path / "run", MergeCheckpointsCallback(last=2), model)
    factors = [load_file(run / f"checkpoint-{step}" / "adapter_model.safetensors") for step in (4, 6)]
    merged = load_file(run / "merged" / "adapter_model.safetensors")
    down = next(name for name in merged if "lora_A" in name)
    up = down.replace("lora_A", "lora_B")
    scale = 8 / 2  # PEFT's alpha over the rank
    points = np.stack([(scale * (f[up].astype(np.float64) @ f[down])).ravel() for f in factors])
    made = _scale_of(run / "merged") * (merged[up].astype(np.float64) @ merged[down]).ravel()
    np.testing.assert_allclose(made, naive_karcher(points, [0.5, 0.5]), rtol=0, atol=1e-6 * np.abs(points).max())


def _scale_of(folder: Path) -> float:
    config = json.loads((folder / "adapter_config.json").read_text())
    return config["lora_alpha"] / config["r"]


def test_checkpoints_of_an_earlier_run_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoint-60").mkdir(parents=True)  # broken, too: a merge with it would fail
    run = train(tmp_path / "run", MergeCheckpointsCallback(last=2))
    assert (run / "merged" / "config.json").is_file()


def test_what_would_leave_too_few_checkpoints_is_refused_before_the_training(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="save_strategy is 'no'"):
        train(tmp_path / "a", MergeCheckpointsCallback(), save_strategy="no")
    with pytest.raises(ArgumentError, match="Set save_total_limit=3 or more"):
        train(tmp_path / "b", MergeCheckpointsCallback(last=3), save_total_limit=2)
    run = train(tmp_path / "c", MergeCheckpointsCallback(last=3), save_total_limit=3)  # what the message says
    assert (run / "merged" / "config.json").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"last": 1}, "at least 2"),
        ({"weights": "nan"}, "'uniform', 'linear', '1-sqrt'"),
        ({"weights": "0.5,0.5"}, "'uniform', 'linear', '1-sqrt'"),
        ({"args": MergingArguments(method="task_arithmetic")}, "differences to a base model"),
        ({"args": MergingArguments(method="mats")}, "method='mats' asks what models do on prompts"),
        ({"args": MergingArguments(refine_steps=2)}, "fisher or refine_steps asks what models do on prompts"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        MergeCheckpointsCallback(**options)


def test_checkpoints_are_merged_with_prompts_after_the_training_as_the_message_says(
    tmp_path: Path,
) -> None:
    with pytest.raises(ArgumentError, match="Leave it out here, and merge the checkpoints afterwards, with `frmerge"):
        MergeCheckpointsCallback(args=MergingArguments(method="regmean"))
    run = train(tmp_path / "run", MergeCheckpointsCallback())
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"input_ids": row["input_ids"]}) + "\n" for row in TEXT))
    checkpoints = [str(run / f"checkpoint-{step}") for step in (4, 6)]
    options = ["--method", "regmean", "--calibration", str(prompts), "--output-dir", str(tmp_path / "out")]
    one_prompt = click_runner().invoke(main, ["merge", *checkpoints, *options])
    assert one_prompt.exit_code != 0 and "shorter prompts (max_calibration_length) are more" in one_prompt.output
    result = click_runner().invoke(main, ["merge", *checkpoints, *options, "--max-calibration-length", "8"])
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "out" / "merge_manifest.json").read_text())["arguments"]["method"] == "regmean"


def test_a_merge_that_fails_does_not_end_the_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("not a folder")
    callback = MergeCheckpointsCallback(args=linear(output_dir=str(tmp_path / "file")))
    with caplog.at_level(logging.WARNING, logger="hf_frmerge"):
        run = train(tmp_path / "run", callback)
    assert (run / f"checkpoint-{STEPS}").is_dir()
    assert "The last 2 checkpoints were not merged at step 4, and the training goes on" in caplog.text
