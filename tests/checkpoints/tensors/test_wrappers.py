"""Checkpoints saved inside a wrapper: the same names and bytes as without, and no loader is left to guess."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from hf_frmerge.checkpoints.adapters.adapter import open_adapter
from hf_frmerge.checkpoints.alignment.align import align
from hf_frmerge.checkpoints.resolve import Source
from hf_frmerge.checkpoints.tensors.wrappers import unwrapped, unwrapped_pattern
from hf_frmerge.errors import CheckpointError
from hf_frmerge.evaluation.suite.inputs import find_inputs
from hf_frmerge.evaluation.suite.settings import ModelSet

WRAPPERS = {
    "compiled": torch.compile,
    "data parallel": torch.nn.DataParallel,
    "compiled, then data parallel": lambda model: torch.nn.DataParallel(torch.compile(model)),
    "data parallel, then compiled": lambda model: torch.compile(torch.nn.DataParallel(model)),
    "data parallel twice": lambda model: torch.nn.DataParallel(torch.nn.DataParallel(model)),
}


def compile_layers(model: LlamaForCausalLM) -> LlamaForCausalLM:
    model.model.layers = torch.nn.ModuleList(map(torch.compile, model.model.layers))
    return model


@pytest.mark.parametrize("wrapper", [*WRAPPERS.values(), compile_layers], ids=[*WRAPPERS, "layers compiled"])
def test_a_wrapped_model_is_read_as_the_model_in_it(tmp_path, save_model, open_folder_as, wrapper):
    save_model(tmp_path / "plain", seed=1)
    wrapped = shutil.copytree(tmp_path / "plain", tmp_path / "wrapped")
    state = wrapper(LlamaForCausalLM.from_pretrained(wrapped, dtype="auto")).state_dict()
    save_file(state, wrapped / "model.safetensors", {"format": "pt"})
    plain, actual = open_folder_as(tmp_path / "plain"), open_folder_as(wrapped, "wrapped")
    assert set(state) != set(plain.tensors)
    assert set(actual.tensors) == set(plain.tensors)
    assert all(np.array_equal(actual.read(name), plain.read(name)) for name in plain.tensors)
    assert actual.wrapped in state
    with pytest.raises(CheckpointError, match=r"'[^']*wrapped' was saved inside a wrapper"):
        find_inputs(ModelSet({"m": wrapped}, {"m": "expert"}), {"t": ["a b"]}, block_size=8, packing=True)
    (note,) = align([plain, actual]).notes
    assert "'wrapped' was saved inside a wrapper" in note
    assert actual.wrapped in note


def test_shards_are_checked_under_the_names_they_store(tmp_path, save_model, open_folder_as):
    save_model(tmp_path / "m", seed=1, max_shard_size="10KB")
    index = json.loads((tmp_path / "m/model.safetensors.index.json").read_text())
    for shard in set(index["weight_map"].values()):
        tensors = {f"_orig_mod.{name}": tensor for name, tensor in load_file(tmp_path / "m" / shard).items()}
        save_file(tensors, tmp_path / "m" / shard, {"format": "pt"})
    index["weight_map"] = {f"_orig_mod.{name}": shard for name, shard in index["weight_map"].items()}
    (tmp_path / "m/model.safetensors.index.json").write_text(json.dumps(index))
    save_model(tmp_path / "plain", seed=1)
    assert set(open_folder_as(tmp_path / "m").tensors) == set(open_folder_as(tmp_path / "plain").tensors)


def test_a_module_of_that_name_inside_a_model_stays():
    names = ["encoder.module.weight", "module.weight", "head.weight"]
    assert unwrapped(names) == {name: name for name in names}
    assert unwrapped(["module", "module.weight"]) == {"module": "module", "module.weight": "module.weight"}


def test_two_tensors_that_become_one_are_refused(tmp_path, save_model, open_folder_as):
    save_model(tmp_path / "m")
    tensors = load_file(tmp_path / "m/model.safetensors")
    tensors["_orig_mod.model.norm.weight"] = tensors["model.norm.weight"].clone()
    save_file(tensors, tmp_path / "m/model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"norm\.weight' is 'model\.norm\.weight', which is stored as well"):
        open_folder_as(tmp_path / "m")


@pytest.mark.parametrize(("before", "after"), [("", "base_model.model._orig_mod."), ("module.", "base_model.model.")])
def test_wrapped_adapters_have_the_modules_and_scales_of_plain_ones(tmp_path, save_model, before, after):
    model = get_peft_model(
        save_model(tmp_path / "base"),
        LoraConfig(target_modules=["q_proj", "v_proj"], alpha_pattern={r"layers\.0\.self_attn\.q_proj": 64}),
    )
    model.save_pretrained(tmp_path / "plain")
    wrapped = Path(shutil.copytree(tmp_path / "plain", tmp_path / "wrapped"))
    tensors = load_file(wrapped / "adapter_model.safetensors")
    renamed = {before + after + name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}
    save_file(renamed, wrapped / "adapter_model.safetensors", {"format": "pt"})
    config = json.loads((wrapped / "adapter_config.json").read_text())
    config["alpha_pattern"] = {r"_orig_mod\.model\.layers\.0\.self_attn\.q_proj": 64}
    (wrapped / "adapter_config.json").write_text(json.dumps(config))
    plain, actual = (open_adapter(Source(name, "adapter", str(tmp_path / name))) for name in ("plain", "wrapped"))
    assert {name: delta.scale for name, delta in actual.deltas.items()} == {
        name: delta.scale for name, delta in plain.deltas.items()
    }
    assert len({delta.scale for delta in actual.deltas.values()}) == 2


def test_wrappers_leave_patterns_of_every_spelling():
    assert unwrapped_pattern(r"_orig_mod\.model\.layers") == r"model\.layers"
    assert unwrapped_pattern("model._orig_mod.layers") == "model.layers"
    assert unwrapped_pattern("q_proj") == "q_proj"
