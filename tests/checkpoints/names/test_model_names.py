"""Names in memory, against the tensors that transformers itself loads under them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import BertConfig, LlavaConfig, MixtralConfig, ViTConfig

from hf_frmerge.checkpoints.names.model_names import read_names

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
IMAGES = {"image_size": 8, "patch_size": 4}
MODELS = {
    "BertForMaskedLM": BertConfig(**SIZES, vocab_size=40, max_position_embeddings=16),
    "LlavaForConditionalGeneration": LlavaConfig(
        text_config={**SIZES, "vocab_size": 40, "model_type": "llama"},
        vision_config={**SIZES, **IMAGES, "model_type": "clip_vision_model"},
    ),
    "MixtralForCausalLM": MixtralConfig(**SIZES, vocab_size=40, num_local_experts=2, num_key_value_heads=1),
    "ViTForImageClassification": ViTConfig(**SIZES, **IMAGES, num_labels=3),
}


def old_names(name: str) -> str:
    """Names as BERT had them in 2018."""
    return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")


@pytest.fixture(params=MODELS)
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Any]:
    """A model under the names that repositories on the Hub have."""
    torch.manual_seed(0)
    model = getattr(transformers, request.param)(MODELS[request.param])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape))  # biases and norms too, so that no two are equal
    model.save_pretrained(tmp_path, save_original_format=True)
    weights = tmp_path / "model.safetensors"
    save_file({old_names(name): tensor for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    return tmp_path, model


def test_every_stored_tensor_is_loaded_under_its_name(saved: tuple[Path, Any]) -> None:
    folder, model = saved
    loaded, info = type(model).from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    stored, in_memory = load_file(folder / "model.safetensors"), loaded.state_dict()
    config = model.config.to_dict() | {"architectures": [type(model).__name__]}
    names = read_names(config, "model")
    assert names is not None and names.in_memory == set(in_memory)
    canonical = names.canonical(stored)
    assert len(set(canonical.values())) == len(stored)
    whole = {name: own for name, own in canonical.items() if own in in_memory}
    assert all(torch.equal(in_memory[own], stored[name]) for name, own in whole.items())
    # The others are parts of a tensor in memory: experts that are stored one by one.
    assert all(".experts." in name for name in stored.keys() - whole.keys())
    assert any(name != own for name, own in canonical.items()) == (stored.keys() != in_memory.keys())
    # Names in memory are canonical themselves.
    assert names.canonical(in_memory) == {name: name for name in in_memory}


def test_a_prefix_comes_and_goes_with_the_class() -> None:
    config = MODELS["BertForMaskedLM"].to_dict()
    for architecture, own in (("BertForMaskedLM", "bert."), ("BertModel", "")):
        names = read_names(config | {"architectures": [architecture]}, "model")
        assert names is not None
        rest = "encoder.layer.1.output.LayerNorm"
        stored = [f"bert.{rest}.gamma", f"{rest}.gamma", f"{rest}.weight"]
        assert set(names.canonical(stored).values()) == {f"{own}{rest}.weight"}


def test_parts_of_a_model_have_the_prefix_of_their_own_class() -> None:
    config = MODELS["LlavaForConditionalGeneration"].to_dict()
    names = read_names(config | {"architectures": ["LlavaForConditionalGeneration"]}, "model")
    assert names is not None
    prefix = transformers.LlamaForCausalLM.base_model_prefix
    assert {path for path, own in names.parts.items() if own == prefix} == {"model", "model.language_model"}


@pytest.mark.parametrize("config", [{}, {"architectures": ["MyModel"], "model_type": "mine"}])
def test_an_unknown_class_has_no_names(config: dict[str, Any]) -> None:
    assert read_names(config, "model") is None
