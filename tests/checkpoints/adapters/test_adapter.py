"""Reading LoRA adapters: every delta against PEFT's own, and every refusal by its message."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    PhiConfig,
    PhiForCausalLM,
)

from hf_frmerge.checkpoints.adapters.adapter import Adapter, open_adapter
from hf_frmerge.checkpoints.adapters.config import AdapterConfig
from hf_frmerge.checkpoints.model_structure import ModelStructure
from hf_frmerge.checkpoints.resolve import Source
from hf_frmerge.checkpoints.tensors.reader import open_checkpoint
from hf_frmerge.errors import CheckpointError, NonFiniteError

LLAMA = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


TIED = "model.embed_tokens.weight"


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Give every LoRA parameter random values: PEFT starts `up` at zero, which would test nothing."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float32).to(parameter.dtype)


def save_adapter(model: torch.nn.Module, folder: Path, seed: int = 0, dtype=torch.float32, **config) -> PeftModel:
    peft_model = get_peft_model(model, LoraConfig(**config))
    randomise(peft_model, seed)
    peft_model = peft_model.to(dtype)
    peft_model.save_pretrained(folder)
    return peft_model


def read(folder: Path) -> Adapter:
    return open_adapter(Source(str(folder), "adapter", str(folder)))


def untied() -> ModelStructure:
    return ModelStructure(tied=frozenset(), conv1d=frozenset())


def shapes_of(folder: Path) -> dict[str, tuple[int, ...]]:
    with open_checkpoint(Source(str(folder), "full", str(folder))) as base:
        return {name: info.shape for name, info in base.tensors.items()}


def peft_deltas(peft_model: PeftModel) -> dict[str, torch.Tensor]:
    """Dense deltas by PEFT's own code, by tensor name in the base model."""
    return {
        name + ".weight": module.get_delta_weight("default").detach().double()
        for name, module in peft_model.get_base_model().named_modules()
        if hasattr(module, "get_delta_weight")
    }


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(LlamaConfig(**LLAMA)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("gpt2")
    GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=4)).save_pretrained(folder)
    return folder


LLAMA_CASES = {
    "plain": {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "down_proj"]},
    "rslora": {"r": 5, "lora_alpha": 8, "use_rslora": True, "target_modules": ["k_proj", "gate_proj"]},
    "rank_pattern": {
        "r": 4,
        "rank_pattern": {r"layers\.1\..*": 6, "v_proj": 3},
        "target_modules": ["q_proj", "v_proj"],
    },
    "alpha_pattern": {
        "r": 4,
        "alpha_pattern": {"layers.0.self_attn.q_proj": 7, "q_proj": 9},
        "target_modules": "all-linear",
    },
    "patterns_rslora": {
        "r": 4,
        "use_rslora": True,
        "rank_pattern": {"^model.layers.1.mlp.up_proj": 2},
        "alpha_pattern": {"up_proj": 3},
        "target_modules": ["up_proj"],
    },
    "embedding": {"r": 3, "lora_alpha": 6, "target_modules": ["embed_tokens", "q_proj"]},
}


@pytest.mark.parametrize("case", LLAMA_CASES)
def test_deltas_equal_those_of_peft(llama: Path, tmp_path: Path, case: str) -> None:
    config = dict(LLAMA_CASES[case])
    if config["target_modules"] == "all-linear":
        config["target_modules"] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    peft_model = save_adapter(LlamaForCausalLM.from_pretrained(llama), tmp_path, **config)
    adapter = read(tmp_path).match(shapes_of(llama), untied)
    expected = peft_deltas(peft_model)
    assert set(adapter.deltas) == set(expected)
    for target, delta in adapter.deltas.items():
        left, right = delta.factors()
        assert left.dtype == right.dtype == np.float32
        reference = expected[target].numpy()
        assert delta.shape == reference.shape
        np.testing.assert_allclose(left @ right, reference, rtol=0, atol=1e-6 * np.abs(reference).max())


def test_conv1d_is_transposed_also_where_it_is_square(gpt2: Path, tmp_path: Path) -> None:
    # c_proj of the attention is 16 x 16; its orientation cannot be read off its shape.
    config = {"r": 4, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
    peft_model = save_adapter(GPT2LMHeadModel.from_pretrained(gpt2), tmp_path, **config)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    expected = peft_deltas(peft_model)
    conv1d = frozenset(target.removesuffix(".weight") for target in expected)
    for flag in (True, False):  # a wrong flag is corrected by shapes and, where those do not tell, by the class
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings | {"fan_in_fan_out": flag}))
        adapter = read(tmp_path).match(shapes_of(gpt2), lambda: ModelStructure(frozenset(), conv1d))
        assert set(adapter.deltas) == set(expected)
        for target, delta in adapter.deltas.items():
            assert delta.transposed
            left, right = delta.factors()
            np.testing.assert_allclose(left @ right, expected[target].numpy(), rtol=0, atol=1e-5)


def test_convolutions_flatten_their_kernels(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 6, 1))
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    peft_model = save_adapter(model, tmp_path, r=2, lora_alpha=6, target_modules=["0", "1"])
    adapter = read(tmp_path).match(shapes)
    for target, expected in peft_deltas(peft_model).items():
        delta = adapter.deltas[target]
        left, right = delta.factors()
        assert delta.kind == "conv"
        assert delta.shape == tuple(expected.shape)
        np.testing.assert_allclose((left @ right).reshape(delta.shape), expected.numpy(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_factors_keep_every_stored_bit(llama: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    save_adapter(LlamaForCausalLM.from_pretrained(llama), tmp_path, r=4, target_modules=["q_proj"], dtype=dtype)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    for delta in read(tmp_path).deltas.values():
        up, down = delta.read()
        np.testing.assert_array_equal(down, stored[delta.down.name].double().numpy())
        np.testing.assert_array_equal(up, stored[delta.up.name].double().numpy())


def test_dora_rows_equal_the_weight_peft_merges(llama: Path, tmp_path: Path) -> None:
    config = {"r": 4, "lora_alpha": 12, "use_dora": True, "target_modules": ["q_proj", "up_proj"]}
    base = LlamaForCausalLM.from_pretrained(llama, dtype=torch.float32)
    weights = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    peft_model = save_adapter(base, tmp_path, **config)
    merged = peft_model.merge_and_unload(safe_merge=True).state_dict()
    adapter = read(tmp_path).match(shapes_of(llama))
    assert adapter.uses_dora
    for target, delta in adapter.deltas.items():
        dora = delta.dora_weight()
        base_rows = weights[target].numpy()
        halves = [dora.rows(base_rows[:5], 0), dora.rows(base_rows[5:], 5)]
        np.testing.assert_allclose(np.concatenate(halves), merged[target].numpy(), rtol=2e-6, atol=1e-6)
        np.testing.assert_array_equal(np.concatenate(halves), dora.rows(base_rows, 0))  # pieces change no bit
        with pytest.raises(CheckpointError, match=r'use_dora is set.*adapter_output="merged"'):
            delta.factors()


def test_modules_to_save_and_stored_base_layers_are_told_apart(llama: Path, tmp_path: Path) -> None:
    config = {"r": 4, "target_modules": ["embed_tokens"], "modules_to_save": ["lm_head"]}
    save_adapter(LlamaForCausalLM.from_pretrained(llama), tmp_path, **config)
    adapter = read(tmp_path).match(shapes_of(llama), untied)
    assert list(adapter.dense) == ["lm_head.weight"]
    assert list(adapter.base_layers) == ["model.embed_tokens.weight"]
    with open_checkpoint(Source("base", "full", str(llama))) as base:
        adapter.check_base_layers(base)
        tensors = load_file(tmp_path / "adapter_model.safetensors")
        tensors["base_model.model.model.embed_tokens.base_layer.weight"][3, 2] += 1
        save_file(tensors, tmp_path / "adapter_model.safetensors")
        with pytest.raises(CheckpointError, match=r"copy of 'model.embed_tokens.weight' that differs.*'base'"):
            read(tmp_path).match(shapes_of(llama), untied).check_base_layers(base)


def test_copies_of_an_output_layer_with_a_bias_are_no_factors(tmp_path: Path) -> None:
    config = PhiConfig(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    model = PhiForCausalLM(config)
    model.save_pretrained(tmp_path / "base")
    peft_model = save_adapter(model, tmp_path / "adapter", r=2, target_modules=["lm_head"])
    adapter = read(tmp_path / "adapter").match(shapes_of(tmp_path / "base"), untied)
    assert set(adapter.base_layers) == {"lm_head.weight", "lm_head.bias"}
    left, right = adapter.deltas["lm_head.weight"].factors()
    expected = peft_deltas(peft_model)["lm_head.weight"].numpy()
    np.testing.assert_allclose(left @ right, expected, rtol=0, atol=1e-6)
    with open_checkpoint(Source("base", "full", str(tmp_path / "base"))) as base:
        adapter.check_base_layers(base)
        tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
        tensors["base_model.model.lm_head.base_layer.bias"][3] += 1
        save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
        with pytest.raises(CheckpointError, match=r"copy of 'lm_head.bias' that differs"):
            read(tmp_path / "adapter").match(shapes_of(tmp_path / "base"), untied).check_base_layers(base)


def test_prefixes_of_the_base_are_found(llama: Path, tmp_path: Path) -> None:
    shapes = shapes_of(llama)
    save_adapter(LlamaModel.from_pretrained(llama), tmp_path / "bare", r=2, target_modules=["q_proj", "down_proj"])
    with_head = read(tmp_path / "bare").match(shapes)
    assert set(with_head.deltas) <= set(shapes)
    assert "model.layers.1.mlp.down_proj.weight" in with_head.deltas

    save_adapter(LlamaForCausalLM.from_pretrained(llama), tmp_path / "lm", r=2, target_modules=["q_proj"])
    bare = {name.removeprefix("model."): shape for name, shape in shapes.items()}
    assert set(read(tmp_path / "lm").match(bare).deltas) == {f"layers.{i}.self_attn.q_proj.weight" for i in (0, 1)}

    two_towers = {f"text.{name}": shape for name, shape in shapes.items()}
    two_towers |= {f"vision.{name}": shape for name, shape in shapes.items()}
    with pytest.raises(CheckpointError, match=r"could mean several tensors.*text\.model\.layers.*vision\.model"):
        read(tmp_path / "lm").match(two_towers)


def test_a_module_the_base_lacks_is_named(llama: Path, gpt2: Path, tmp_path: Path) -> None:
    save_adapter(LlamaForCausalLM.from_pretrained(llama), tmp_path, r=2, target_modules=["q_proj"])
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.self_attn\.q_proj\.weight.*does not have"):
        read(tmp_path).match(shapes_of(gpt2))
    wrong = {name: (*shape[:-1], shape[-1] + 1) for name, shape in shapes_of(llama).items()}
    with pytest.raises(CheckpointError, match=r"shape \(16, 16\), but .*has shape \(16, 17\)"):
        read(tmp_path).match(wrong)


def test_a_tied_embedding_is_refused(llama: Path, tmp_path: Path) -> None:
    save_adapter(LlamaForCausalLM.from_pretrained(llama), tmp_path, r=2, target_modules=["embed_tokens", "q_proj"])
    with pytest.raises(CheckpointError, match=r"changes model\.embed_tokens, but the base ties"):
        read(tmp_path).match(shapes_of(llama), lambda: ModelStructure(frozenset({TIED}), frozenset()))
    with pytest.raises(CheckpointError, match=r"changes model\.embed_tokens, and nothing tells whether"):
        read(tmp_path).match(shapes_of(llama))
    position = ModelStructure(frozenset({"model.embed_positions.weight"}), frozenset())  # a tie, but not of this one
    assert TIED in read(tmp_path).match(shapes_of(llama), lambda: position).deltas
    assert TIED in read(tmp_path).match(shapes_of(llama), into_adapter=True).deltas


@pytest.fixture
def plain(llama: Path, tmp_path: Path) -> Path:
    save_adapter(LlamaForCausalLM.from_pretrained(llama), tmp_path, r=4, target_modules=["q_proj"])
    return tmp_path


def edit_config(folder: Path, **fields) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


REFUSED = [
    ({"peft_type": "OSF"}, r"(?s)peft_type is 'OSF'.*If PEFT can fold it into its base.*merge_and_unload"),
    ({"peft_type": []}, r"peft_type in adapter_config\.json is \[\], expected a name"),
    ({"peft_type": {}}, r"peft_type in adapter_config\.json is \{\}, expected a name"),
    ({"peft_type": "PROMPT_TUNING"}, r"peft_type is 'PROMPT_TUNING'.*changes no weights"),
    ({"bias": "all"}, r"bias='all'"),
    ({"lora_bias": True}, r"lora_bias is set"),
    ({"trainable_token_indices": [1, 2]}, r"trainable_token_indices is set"),
    ({"layer_replication": [[0, 1], [0, 2]]}, r"layer_replication is set"),
    ({"target_parameters": ["mlp.experts.gate_up_proj"]}, r"target_parameters is set"),
    ({"alora_invocation_tokens": [5]}, r"alora_invocation_tokens is set.*so no weights equal it.*leave it out"),
    ({"use_qalora": True}, r"use_qalora is set"),
    ({"use_bdlora": {"nblocks": 2}}, r"use_bdlora is set"),
    ({"arrow_config": {"top_k": 3}}, r"arrow_config is set.*routes between adapters.*leave it out"),
    ({"kasa_config": {"beta": 1e-4}}, r"kasa_config is set"),
    ({"velora_config": {"num_groups": 4}}, r"velora_config is set"),
    ({"monteclora_config": {"num_samples": 2}}, r"monteclora_config is set"),
    ({"init_lora_weights": "pissa_niter_4"}, r"init_lora_weights='pissa_niter_4'.*path_initial_model"),
    ({"init_lora_weights": "olora"}, r"init_lora_weights='olora'"),
    ({"init_lora_weights": "corda"}, r"init_lora_weights='corda'"),
    ({"init_lora_weights": "loftq"}, r"init_lora_weights='loftq'"),
    ({"init_lora_weights": "mica"}, r"init_lora_weights='mica'"),
    ({"init_lora_weights": "lora_ga"}, r"init_lora_weights='lora_ga'"),
    ({"use_something_new": True}, r"use_something_new=True is an option this version does not know"),
    ({"use_dora": True}, r"use_dora is True but its magnitude vector is missing"),
    ({"r": 5}, r"configuration says rank 5"),
]


@pytest.mark.parametrize(
    ("fields", "message"), REFUSED, ids=[next(iter(fields)) + str(i) for i, (fields, _) in enumerate(REFUSED)]
)
def test_what_is_not_a_plain_lora_is_refused_by_name(plain: Path, fields: dict, message: str) -> None:
    edit_config(plain, **fields)
    with pytest.raises(CheckpointError, match=message) as caught:
        read(plain)
    assert repr(str(plain)) in str(caught.value)


def test_broken_weights_are_named(plain: Path) -> None:
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    path = plain / "adapter_model.safetensors"
    tensors = load_file(path)

    save_file(tensors | {key: torch.full_like(tensors[key], float("nan"))}, path)
    with pytest.raises(NonFiniteError, match=r"q_proj\.lora_B\.weight' holds 64 NaN"):
        read(plain).deltas["model.layers.0.self_attn.q_proj.weight"].factors()

    save_file({name: tensor for name, tensor in tensors.items() if name != key}, path)
    with pytest.raises(CheckpointError, match=r"layers\.0\.self_attn\.q_proj': lora_B is missing"):
        read(plain)

    save_file(tensors | {key: tensors[key].flatten()}, path)
    with pytest.raises(CheckpointError, match=r"layers\.0\.self_attn\.q_proj': factors of shapes"):
        read(plain)

    save_file(tensors | {key.replace("weight", "bias"): torch.zeros(16)}, path)
    with pytest.raises(CheckpointError, match=r"lora_B\.bias' is not a factor"):
        read(plain)

    save_file(tensors | {key: tensors[key].to(torch.float8_e4m3fn)}, path)
    with pytest.raises(CheckpointError, match=r"lora_B\.weight' has dtype F8_E4M3"):
        read(plain)


def test_a_folder_without_config_is_refused(plain: Path) -> None:
    (plain / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no adapter_config\.json"):
        read(plain)


def test_the_first_matching_pattern_wins_as_in_peft() -> None:
    from peft.utils.other import get_pattern_key

    patterns = {"layers.1.q_proj": 2, "q_proj": 3, r".*\.v_proj": 5, "^model.k_proj": 7}
    config = AdapterConfig({"r": 9, "rank_pattern": patterns}, None, None, False, False, False)
    for module in (
        "model.layers.1.q_proj",
        "model.layers.11.q_proj",
        "my_q_proj",
        "a.v_proj",
        "v_proj",
        "model.k_proj",
        "x.model.k_proj",
    ):
        assert config.rank(module) == patterns.get(get_pattern_key(patterns, module), 9)
