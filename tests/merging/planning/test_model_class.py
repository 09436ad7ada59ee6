"""What is asked of a model's class, against the model itself as transformers loads it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from transformers import (
    BertConfig,
    Gemma2Config,
    Gemma3Config,
    GPT2Config,
    LlamaConfig,
    LlavaConfig,
    PreTrainedConfig,
    T5Config,
)
from transformers.pytorch_utils import Conv1D

from hf_frmerge.checkpoints.resolve import Source
from hf_frmerge.checkpoints.tensors.reader import Checkpoint, open_checkpoint
from hf_frmerge.merging.planning.model_class import read_structure

SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
TEXT = {**SIZES, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
IMAGES = {"image_size": 8, "patch_size": 4}

MODELS: dict[str, tuple[str, PreTrainedConfig]] = {
    "gemma2": ("Gemma2ForCausalLM", Gemma2Config(**TEXT)),
    "gpt2": ("GPT2LMHeadModel", GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=1, n_head=2)),
    "gpt2-untied": (
        "GPT2LMHeadModel",
        GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=1, n_head=2, tie_word_embeddings=False),
    ),
    "t5": ("T5ForConditionalGeneration", T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=1)),
    "bert": ("BertForMaskedLM", BertConfig(**SIZES, num_attention_heads=2, max_position_embeddings=16)),
    "classifier": (
        "BertForSequenceClassification",
        BertConfig(**SIZES, num_attention_heads=2, max_position_embeddings=16),
    ),
    "llama": ("LlamaForCausalLM", LlamaConfig(**TEXT)),
    "llama-tied": ("LlamaForCausalLM", LlamaConfig(**TEXT, tie_word_embeddings=True)),
    "nested": (
        "Gemma3ForConditionalGeneration",
        Gemma3Config(text_config=TEXT, vision_config={**VISION, **IMAGES}, mm_tokens_per_image=4),
    ),
    "llava": (
        "LlavaForConditionalGeneration",
        LlavaConfig(
            text_config={**TEXT, "model_type": "llama"},
            vision_config={**VISION, **IMAGES, "model_type": "clip_vision_model"},
        ),
    ),
}


def saved(folder: Path, architecture: str, config: PreTrainedConfig) -> Checkpoint:
    """Save a model whose config leaves the tie to its class where that is the default, as transformers 4 wrote it."""
    torch.manual_seed(0)
    getattr(transformers, architecture)(config).save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text())
    for level in (written, *(value for value in written.values() if isinstance(value, dict))):
        if "tie_word_embeddings" in level and level["tie_word_embeddings"] == type(config)().tie_word_embeddings:
            del level["tie_word_embeddings"]
    (folder / "config.json").write_text(json.dumps(written))
    return open_checkpoint(Source(str(folder), "full", str(folder)))


@pytest.mark.parametrize("name", MODELS)
def test_the_structure_is_that_of_the_loaded_model(tmp_path: Path, name: str) -> None:
    architecture, config = MODELS[name]
    checkpoint = saved(tmp_path, architecture, config)
    model = getattr(transformers, architecture).from_pretrained(tmp_path)
    owners: dict[int, list[str]] = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(parameter.data_ptr(), []).append(path)
    structure = read_structure(checkpoint)
    assert structure.tied == {path for paths in owners.values() if len(paths) > 1 for path in paths}
    assert structure.conv1d == {path for path, module in model.named_modules() if isinstance(module, Conv1D)}


def test_the_models_above_are_of_both_kinds(tmp_path: Path) -> None:
    read = {name: read_structure(saved(tmp_path / name, *MODELS[name])) for name in MODELS}
    assert {name for name, structure in read.items() if structure.conv1d} == {"gpt2", "gpt2-untied"}
    assert {name for name, structure in read.items() if structure.tied} == {
        "gemma2",
        "gpt2",
        "t5",
        "bert",
        "llama-tied",
        "nested",
    }


@pytest.mark.parametrize(
    ("entries", "stored", "known"),
    [
        ({}, ["embed"], False),
        ({}, ["embed", "head"], True),
        ({"tie_word_embeddings": False}, ["embed"], True),
        ({"tie_word_embeddings": True}, ["embed", "head"], False),
        ({"text_config": {"tie_word_embeddings": True}}, ["embed", "head"], False),
    ],
)
def test_an_unknown_class_is_untied_if_config_or_tensors_say_so(
    tmp_path: Path, entries: dict, stored: list[str], known: bool
) -> None:
    from safetensors.torch import save_file

    save_file({f"{name}.weight": torch.ones(40, 16) for name in stored}, tmp_path / "model.safetensors")
    config = {"architectures": ["MyModelForCausalLM"], "model_type": "mine", "vocab_size": 40, **entries}
    (tmp_path / "config.json").write_text(json.dumps(config))
    structure = read_structure(open_checkpoint(Source("mine", "full", str(tmp_path))))
    assert (structure.tied, structure.conv1d) == (frozenset() if known else None, None)
