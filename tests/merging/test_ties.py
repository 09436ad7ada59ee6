"""Tied tensors that all models store: by bytes and class, not by one key of a config; against models in memory."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_frmerge.errors import CheckpointError
from hf_frmerge.merging.arguments.merging_arguments import MergingArguments
from hf_frmerge.merging.engine.engine import StepObserver
from hf_frmerge.merging.engine.processes import Processes
from hf_frmerge.merging.planning.build_plan import build_plan
from hf_frmerge.merging.run import run_merge

TEXT: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip
VISION = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8,
    "patch_size": 4,
}  # fmt: skip
MODELS: dict[str, tuple[Any, Any, str, str]] = {
    # class, config, output layer and embedding as they are in memory
    "llama": (LlamaForCausalLM, LlamaConfig(**TEXT, tie_word_embeddings=True), "lm_head", "model.embed_tokens"),
    "gpt2": (
        GPT2LMHeadModel, GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=1, n_head=2), "lm_head",
        "transformer.wte",
    ),
    "bert": (
        BertForMaskedLM,
        BertConfig(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
                   max_position_embeddings=16),
        "cls.predictions.decoder", "bert.embeddings.word_embeddings",
    ),
    "t5": (
        T5ForConditionalGeneration, T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=1), "lm_head",
        "shared",
    ),
    "nested": (
        Gemma3ForConditionalGeneration,
        Gemma3Config(text_config=TEXT, vision_config=VISION, mm_tokens_per_image=4, tie_word_embeddings=True),
        "lm_head", "model.language_model.embed_tokens",
    ),
}  # fmt: skip


BY_CLASS = [kind for kind in MODELS if kind != "llama"]  # which ties by default, without a word in the config


def save(folder: Path, kind: str, seed: int, *, apart: bool, keys: bool = True) -> dict[str, torch.Tensor]:
    """Save a model with its output layer stored beside the embedding, equal or apart; return its tensors in memory."""
    model_class, config, head, embedding = MODELS[kind]
    torch.manual_seed(seed)
    model: PreTrainedModel = model_class(config)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape) * 0.1
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(folder)
    stored = load_file(folder / "model.safetensors")
    state[f"{head}.weight"] = state[f"{embedding}.weight"] + (torch.randn(40, 16) if apart else 0)
    assert f"{head}.weight" not in stored
    stored[f"{head}.weight"] = state[f"{head}.weight"]
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    if not keys:
        strip(folder)
    return state


def strip(folder: Path) -> None:
    """Leave the tie to the class, as configs do that say only what is not the default."""
    written = json.loads((folder / "config.json").read_text())
    for level in (written, *(value for value in written.values() if isinstance(value, dict))):
        level.pop("tie_word_embeddings", None)
    (folder / "config.json").write_text(json.dumps(written))


def merge(root: Path, names: str, **options: Any) -> Any:
    plan = build_plan([str(root / name) for name in names], MergingArguments(str(root / "out"), **options))
    run_merge(plan, StepObserver(), Processes())
    return plan


@pytest.mark.parametrize(("kind", "keys"), [*((kind, True) for kind in MODELS), *((kind, False) for kind in BY_CLASS)])
def test_what_repeats_another_in_all_models_is_merged_once(tmp_path: Path, kind: str, keys: bool) -> None:
    model_class, _, head, embedding = MODELS[kind]
    states = [save(tmp_path / name, kind, seed, apart=False, keys=keys) for seed, name in enumerate("ab")]
    plan = merge(tmp_path, "ab", method="linear")
    assert any(f"{head}.weight repeats" in note and "in all models" in note for note in plan.notes)
    assert plan.left_out[f"{head}.weight"] == "tied and stored twice"
    merged, info = model_class.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    now = merged.state_dict()
    assert merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
    wanted = (states[0][f"{embedding}.weight"].double() + states[1][f"{embedding}.weight"].double()) / 2
    assert torch.equal(now[f"{head}.weight"], wanted.float())


@pytest.mark.parametrize(("kind", "keys"), [*((kind, True) for kind in MODELS), *((kind, False) for kind in BY_CLASS)])
@pytest.mark.parametrize("order", ["ab", "ba"])
def test_what_one_model_has_apart_is_not_tied_in_the_output(tmp_path: Path, kind: str, keys: bool, order: str) -> None:
    model_class, _, head, embedding = MODELS[kind]
    states = [save(tmp_path / name, kind, i, apart=name == "b", keys=keys) for i, name in enumerate("ab")]
    if kind == "bert":
        with pytest.raises(CheckpointError, match=r"would start cls\.predictions\.decoder\.bias at random") as caught:
            merge(tmp_path, order, method="linear")
        lost, source = re.search(r"start (\S+) at random.*a copy of (\S+) under", str(caught.value)).groups()
        for name in "ab":
            stored = load_file(tmp_path / name / "model.safetensors")
            save_file(stored | {lost: stored[source].clone()}, tmp_path / name / "model.safetensors")
    plan = merge(tmp_path, order, method="linear")
    assert any(f"{head}.weight is not" in note and f"'{tmp_path / 'b'}'" in note for note in plan.notes)
    config = json.loads((tmp_path / "out/config.json").read_text())
    stated = [level.get("tie_word_embeddings") for level in (config, *config.values()) if isinstance(level, dict)]
    assert config["tie_word_embeddings"] is False and True not in stated
    merged, info = model_class.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert merged.get_output_embeddings().weight is not merged.get_input_embeddings().weight
    now = merged.state_dict()
    for name in (head, embedding):
        wanted = (states[0][f"{name}.weight"].double() + states[1][f"{name}.weight"].double()) / 2
        torch.testing.assert_close(now[f"{name}.weight"], wanted.float(), rtol=0, atol=1e-7)


def test_random_methods_keep_the_tie(tmp_path: Path) -> None:
    for seed, name in enumerate("abc"):
        save(tmp_path / name, "llama", seed, apart=False)
    options = MergingArguments(str(tmp_path / "out"), method="dare_linear", density=0.5, space="deltas")
    plan = build_plan([str(tmp_path / name) for name in "ab"], options, None, str(tmp_path / "c"))
    run_merge(plan, StepObserver(), Processes())
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert merged.lm_head.weight is merged.model.embed_tokens.weight


def test_what_a_config_unties_is_kept_also_where_it_is_equal(tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):
        save(tmp_path / name, "llama", seed, apart=False)
        config = json.loads((tmp_path / name / "config.json").read_text())
        (tmp_path / name / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    plan = merge(tmp_path, "ab", method="linear")
    assert "lm_head.weight" in load_file(tmp_path / "out/model.safetensors") and not plan.left_out
