"""Adapters of every kind that PEFT folds layer by layer, against its `merge_and_unload` of the whole model."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from transformers import GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from hf_frmerge.checkpoints.adapters.by_peft import fold_by_peft
from hf_frmerge.checkpoints.adapters.config import FOLDED_BY_PEFT
from hf_frmerge.checkpoints.adapters.folded import folded_within
from hf_frmerge.checkpoints.resolve import resolve
from hf_frmerge.checkpoints.tensors.floats import widen
from hf_frmerge.checkpoints.tensors.reader import Checkpoint, open_checkpoint

LLAMA = LlamaConfig(
    vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, tie_word_embeddings=False, attention_bias=True,
)  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 10},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 16},
    "FOURIERFT": {"n_frequency": 50},
    "IA3": {"feedforward_modules": ["down_proj"]},
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "MISS": {"r": 4},
    "OFT": {"oft_block_size": 4},
    "RANDLORA": {"r": 4},
    "ROAD": {"group_size": 8},
    "SHIRA": {"r": 4},
    "TRAINABLE_TOKENS": {"target_modules": ["embed_tokens"], "token_indices": [1, 3]},
    "VBLORA": {"vector_length": 16, "num_vectors": 8},
    "WAVEFT": {"n_frequency": 50},
}


def save_base(folder: Path, model: PreTrainedModel | None = None) -> PreTrainedModel:
    torch.manual_seed(0)
    model = model or LlamaForCausalLM(LLAMA)
    model.save_pretrained(folder)
    return model


def save_adapter(base: PreTrainedModel, kind: str, folder: Path, **options: Any) -> None:
    """Save an adapter with a change in every trained tensor."""
    torch.manual_seed(1)
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(kind)]
    options = {"target_modules": ["q_proj", "v_proj", "down_proj"]} | OPTIONS.get(kind, {}) | options
    model = get_peft_model(copy.deepcopy(base), config_class(task_type="CAUSAL_LM", **options))
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    model.save_pretrained(folder)


def folded_as_a_whole(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    architecture = json.loads((base / "config.json").read_text())["architectures"][0]
    model_class = {"LlamaForCausalLM": LlamaForCausalLM, "GPT2LMHeadModel": GPT2LMHeadModel}[architecture]
    model = model_class.from_pretrained(base, dtype=torch.float64)
    return PeftModel.from_pretrained(model, adapter).double().merge_and_unload().state_dict()


@pytest.fixture
def base(tmp_path: Path) -> Iterator[tuple[PreTrainedModel, Checkpoint]]:
    model = save_base(tmp_path / "base")
    with closing(open_checkpoint(resolve(str(tmp_path / "base")))) as checkpoint:
        yield model, checkpoint


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", sorted(FOLDED_BY_PEFT))
def test_every_kind_is_folded_as_peft_folds_the_whole_model(
    kind: str, base: tuple[PreTrainedModel, Checkpoint], tmp_path: Path
) -> None:
    model, checkpoint = base
    if kind not in peft.PeftType.__members__:
        pytest.skip("this PEFT does not have it")
    save_adapter(model, kind, tmp_path / "adapter")
    fold_by_peft(resolve(str(tmp_path / "adapter")), checkpoint)
    wanted = folded_as_a_whole(tmp_path / "base", tmp_path / "adapter")
    origin = model.state_dict()
    assert checkpoint.tensors.keys() == wanted.keys()
    changed = [name for name in wanted if not torch.equal(wanted[name], origin[name].double())]
    assert changed
    for name, info in checkpoint.tensors.items():
        values = widen(checkpoint.read(name), info.dtype).reshape(info.shape)
        np.testing.assert_array_equal(values, wanted[name].float().numpy(), err_msg=name)
        if name in changed:
            (recipe,) = folded_within(info)
            again = recipe.read_wide(checkpoint, 3, info.numel - 2)  # pieces that begin and end anywhere
            np.testing.assert_array_equal(again, values.reshape(-1)[3:-2])
