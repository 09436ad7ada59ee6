"""Adapters of every kind that PEFT folds layer by layer, against its `merge_and_unload` of the whole model."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
)

from hf_frmerge.checkpoints.adapters.by_peft import fold_by_peft
from hf_frmerge.checkpoints.adapters.config import FOLDED_BY_PEFT, kind_folded_by_peft
from hf_frmerge.checkpoints.adapters.folded import folded_within
from hf_frmerge.checkpoints.folders import open_folder
from hf_frmerge.checkpoints.names.empty_model import build_empty
from hf_frmerge.checkpoints.names.model_names import names_of
from hf_frmerge.checkpoints.resolve import resolve
from hf_frmerge.checkpoints.tensors.floats import widen
from hf_frmerge.checkpoints.tensors.reader import Checkpoint, open_checkpoint
from hf_frmerge.errors import CheckpointError

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
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
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
    check_folded(checkpoint, tmp_path)


def check_folded(checkpoint: Checkpoint, folder: Path, in_memory: Mapping[str, str] | None = None) -> None:
    """
    Fold `folder/adapter` into `folder/base`; every weight must be what PEFT makes of the whole model in float64.

    `in_memory` are the names in memory of tensors that are stored under others.
    """
    known = in_memory or {}
    adapter = fold_by_peft(resolve(str(folder / "adapter")), checkpoint)
    assert adapter.targets.keys() == adapter.checkpoint.tensors.keys()
    wanted = folded_as_a_whole(folder / "base", folder / "adapter")
    origin = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float64).state_dict()
    names = {name: known.get(name, name) for name in checkpoint.tensors}
    changed = [name for name, own in names.items() if not torch.equal(wanted[own], origin[own])]
    assert changed
    for name, info in checkpoint.tensors.items():
        values = widen(checkpoint.read(name), info.dtype).reshape(info.shape)
        np.testing.assert_array_equal(values, wanted[names[name]].float().numpy(), err_msg=name)
        if name in changed:
            (recipe,) = folded_within(info)
            again = recipe.read_wide(checkpoint, 3, info.numel - 2)  # pieces that begin and end anywhere
            np.testing.assert_array_equal(again, values.reshape(-1)[3:-2])


TINY = {
    "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "tie_word_embeddings": False, "num_local_experts": 4,
}  # fmt: skip
PHI = {
    "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip
STACKS = {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
LORAS: dict[str, tuple[Callable[[], PreTrainedModel], dict[str, Any]]] = {
    "stacked experts": (lambda: GptOssForCausalLM(GptOssConfig(**TINY, head_dim=8, num_experts_per_tok=2)), STACKS),
    "biases of its layers": (lambda: LlamaForCausalLM(LLAMA), {"target_modules": ["q_proj"], "bias": "lora_only"}),
    "biases of factors": (lambda: LlamaForCausalLM(LLAMA), {"target_modules": ["q_proj"], "lora_bias": True}),
    "stacked experts and an output layer, which PEFT copies": (
        lambda: GptOssForCausalLM(GptOssConfig(**TINY, head_dim=8, num_experts_per_tok=2)),
        {**STACKS, "target_modules": ["lm_head"]},
    ),
    "the bias of an output layer, of which PEFT copies the weight": (
        lambda: PhiForCausalLM(PhiConfig(**PHI)),
        {"target_modules": ["lm_head"], "bias": "lora_only"},
    ),
    "rows of tokens": (
        lambda: LlamaForCausalLM(LLAMA),
        {"target_modules": ["q_proj"], "trainable_token_indices": [1, 4]},
    ),
}


@pytest.mark.parametrize("case", LORAS)
def test_loras_that_are_more_than_factors(case: str, tmp_path: Path) -> None:
    make, options = LORAS[case]
    model = save_base(tmp_path / "base", make())
    save_adapter(model, "LORA", tmp_path / "adapter", r=2, **options)
    source = resolve(str(tmp_path / "adapter"))
    assert (kind_folded_by_peft(open_folder(source.path), "x") or "").startswith("LORA with ")
    with closing(open_checkpoint(resolve(str(tmp_path / "base")))) as checkpoint:
        check_folded(checkpoint, tmp_path)


def test_a_copy_of_another_base_is_refused(tmp_path: Path) -> None:
    model = save_base(tmp_path / "base", PhiForCausalLM(PhiConfig(**PHI)))
    save_adapter(model, "LORA", tmp_path / "adapter", target_modules=["lm_head"], bias="lora_only")
    file = str(tmp_path / "adapter" / "adapter_model.safetensors")
    tensors = load_file(file)
    tensors["base_model.model.lm_head.base_layer.weight"][7, 3] += 1
    save_file(tensors, file)
    with (
        closing(open_checkpoint(resolve(str(tmp_path / "base")))) as checkpoint,
        pytest.raises(CheckpointError, match=r"copy of 'lm_head.weight' that differs"),
    ):
        fold_by_peft(resolve(str(tmp_path / "adapter")), checkpoint)


def test_factors_of_stacks_on_experts_that_are_stored_one_by_one(tmp_path: Path) -> None:
    model = save_base(tmp_path / "base", MixtralForCausalLM(MixtralConfig(**TINY)))
    save_adapter(model, "LORA", tmp_path / "adapter", r=2, **STACKS)
    with closing(open_checkpoint(resolve(str(tmp_path / "base")))) as checkpoint:
        assert "model.layers.0.block_sparse_moe.experts.3.w1.weight" in checkpoint.tensors
        shares = {name for name in checkpoint.tensors if "experts" not in name}
        names = names_of(build_empty(checkpoint.config(), "base"))
        assert names is not None
        check_folded(checkpoint, tmp_path, names.canonical(shares))


def test_square_layers_are_folded_as_their_class_stores_them(tmp_path: Path) -> None:
    """GPT-2's `c_proj` is square and stored as (in, out)."""
    config = GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=4, tie_word_embeddings=False)
    model = save_base(tmp_path / "base", GPT2LMHeadModel(config))
    save_adapter(model, "LORA", tmp_path / "adapter", target_modules=["attn.c_proj", "c_attn"], lora_bias=True)
    with closing(open_checkpoint(resolve(str(tmp_path / "base")))) as checkpoint:
        check_folded(checkpoint, tmp_path)


def tied(folder: Path) -> None:
    model = save_base(folder / "base", LlamaForCausalLM(LlamaConfig(**{**TINY, "tie_word_embeddings": True})))
    save_adapter(model, "TRAINABLE_TOKENS", folder / "adapter")


def of_another_size(folder: Path) -> None:
    save_base(folder / "base")
    wider = LlamaForCausalLM(LlamaConfig(**{**TINY, "hidden_size": 64}))
    save_adapter(wider, "LOHA", folder / "adapter")


def all_biases(folder: Path) -> None:
    save_adapter(save_base(folder / "base"), "LORA", folder / "adapter", target_modules=["q_proj"], bias="all")


def with_a_lost_tensor(folder: Path) -> None:
    save_adapter(save_base(folder / "base"), "LOHA", folder / "adapter")
    file = str(folder / "adapter" / "adapter_model.safetensors")
    tensors = load_file(file)
    save_file({**tensors, "base_model.model.model.layers.9.q_proj.hada_w1_a": torch.ones(2, 2)}, file)


def with_a_copy_of_no_layer(folder: Path) -> None:
    save_adapter(save_base(folder / "base"), "LOHA", folder / "adapter")
    file = str(folder / "adapter" / "adapter_model.safetensors")
    save_file({**load_file(file), "base_model.model.lm_head.base_layer.weight": torch.ones(40, 32)}, file)


def with_an_unknown_option(folder: Path) -> None:
    save_adapter(save_base(folder / "base"), "LOHA", folder / "adapter")
    file = folder / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "use_twisted": True}))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (tied, "the model ties model.embed_tokens.weight to another weight"),
        (of_another_size, "size mismatch"),
        (all_biases, "beside its layers"),
        (with_a_lost_tensor, "do not fit together"),
        (with_a_copy_of_no_layer, "carries base_model.model.lm_head.base_layer.weight, and changes no such layer"),
        (with_an_unknown_option, "does not know use_twisted"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_would_be_lost_is_refused(make: Callable[[Path], None], reason: str, tmp_path: Path) -> None:
    make(tmp_path)
    with (
        closing(open_checkpoint(resolve(str(tmp_path / "base")))) as checkpoint,
        pytest.raises(CheckpointError, match=f"(?s)layer by layer.*{reason}.*If PEFT can fold it into its base"),
    ):
        fold_by_peft(resolve(str(tmp_path / "adapter")), checkpoint)


@pytest.mark.filterwarnings("ignore")
def test_advice_that_peft_would_not_follow_is_not_given(tmp_path: Path) -> None:
    options = {"target_modules": ["mlp.up_proj"], "lora_bias": True}
    save_adapter(save_base(tmp_path / "base"), "LORA", tmp_path / "adapter", **options)
    with pytest.raises(RuntimeError, match="the base layer has no bias") as of_peft:
        folded_as_a_whole(tmp_path / "base", tmp_path / "adapter")
    with (
        closing(open_checkpoint(resolve(str(tmp_path / "base")))) as checkpoint,
        pytest.raises(CheckpointError, match=r"does not with `merge_and_unload`, either.*leave it out") as of_ours,
    ):
        fold_by_peft(resolve(str(tmp_path / "adapter")), checkpoint)
    assert str(of_peft.value).rstrip(". ") in str(of_ours.value)


def test_an_expression_that_would_not_end_is_refused(tmp_path: Path) -> None:
    save_adapter(save_base(tmp_path / "base"), "LOHA", tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "target_modules": "(a+)+$"}))
    with (
        closing(open_checkpoint(resolve(str(tmp_path / "base")))) as checkpoint,
        pytest.raises(CheckpointError, match="target_modules"),
    ):
        fold_by_peft(resolve(str(tmp_path / "adapter")), checkpoint)
