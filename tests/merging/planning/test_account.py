"""Accounts of merges, against the tensors that the files of the models hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonschema import Draft202012Validator
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import save_llama_family
from transformers import LlamaForCausalLM

import hf_frmerge.merging.record as record
from hf_frmerge import FisherRaoMerger, MergeCallback, MergingArguments
from hf_frmerge.errors import CheckpointError
from hf_frmerge.merging.planning.account import ModelAccount, account
from hf_frmerge.merging.planning.build_plan import build_plan
from hf_frmerge.merging.record.manifest import SCHEMA_FILE, read_manifest
from hf_frmerge.wording.account import account_sentence


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """`base`, `math` and `code`, with 20 tensors each, tied."""
    save_llama_family(tmp_path, ["one", "two"], 0.05)
    return tmp_path


def add(folder: Path, **tensors: torch.Tensor) -> None:
    weights = folder / "model.safetensors"
    save_file(load_file(weights) | tensors, weights, {"format": "pt"})


def merge(models: Path, experts: list[str], base: str | None = None, callbacks: Any = None, **options: Any) -> Any:
    """Merge, and return the accounts in the manifest; they balance."""
    args = MergingArguments(str(models / "out"), disable_tqdm=True, overwrite=True, **options)
    specs = [str(models / name) for name in experts]
    FisherRaoMerger(specs, args, None, str(models / base) if base else None, callbacks=callbacks).merge()
    accounts = read_manifest(models / "out").report.accounts
    for name, each in zip([*experts, *([base] if base else [])], accounts, strict=True):
        file = next(f for f in (models / name).glob("*model.safetensors"))
        assert each.n_tensors == len(load_file(file))
        assert each.n_tensors == each.n_merged + each.n_copied + sum(each.unused.values())
    schema = json.loads((Path(str(record.__file__)).parent / SCHEMA_FILE).read_text())
    Draft202012Validator(schema).validate(json.loads((models / "out/merge_manifest.json").read_text()))
    return accounts


def test_all_tensors_of_equal_models_are_merged(models: Path) -> None:
    assert merge(models, ["math", "code"]) == (ModelAccount(20, 20, 0), ModelAccount(20, 20, 0))


def test_the_base_is_read_in_delta_space_only(models: Path) -> None:
    assert merge(models, ["math", "code"], "base", space="deltas")[2] == ModelAccount(20, 20, 0)
    reason = "of the base, which is not part of a merge in weight space"
    assert merge(models, ["math", "code"], "base", space="weights")[2] == ModelAccount(20, 0, 0, {reason: 20})


def test_what_is_left_out_has_a_reason(models: Path) -> None:
    tied = load_file(models / "code/model.safetensors")["model.embed_tokens.weight"].clone()
    constant = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.rand(4)}
    for name in ("math", "code"):
        add(models / name, mask=torch.ones(3, dtype=torch.bool))
    add(models / "code", **{"lm_head.weight": tied}, **constant)
    math, code = merge(models, ["math", "code"])
    assert math == ModelAccount(21, 20, 1)
    reasons = {"that gave way to another model's", "tied and stored twice", "constant, computed by the model itself"}
    assert code == ModelAccount(23, 20, 0, dict.fromkeys(reasons, 1))
    # A tied weight of the donor is kept, and read by the other from the tensor it repeats.
    assert merge(models, ["code", "math"])[1] == ModelAccount(21, 20, 0, {"that gave way to another model's": 1})


class SkipNorms(MergeCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        control.should_skip_tensor = "norm" in state.current_tensor
        return control


def test_what_a_callback_skips_is_copied(models: Path) -> None:
    n_norms = sum("norm" in name for name in load_file(models / "math/model.safetensors"))
    math, code = merge(models, ["math", "code"], callbacks=[SkipNorms()])
    assert math == ModelAccount(20, 20 - n_norms, n_norms)
    assert code == ModelAccount(20, 20 - n_norms, 0, {"skipped by a callback": n_norms})


def test_factors_and_copies_of_adapters(models: Path) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    for name in ("a", "b"):
        get_peft_model(LlamaForCausalLM.from_pretrained(models / "base"), config).save_pretrained(models / name)
    factors = ModelAccount(8, 8, 0)
    held = {"of the base, which a merged adapter does not hold": 20}
    assert merge(models, ["a", "b"], "base") == (factors, factors, ModelAccount(20, 0, 0, held))
    merged = merge(models, ["a", "b"], "base", adapter_output="merged")
    assert merged == (factors, factors, ModelAccount(20, 4, 16))


def test_a_tensor_without_a_fate_is_refused(models: Path) -> None:
    plan = build_plan([str(models / name) for name in ("math", "code")], MergingArguments(str(models / "out")))
    lost = plan.steps.pop().name
    with pytest.raises(CheckpointError, match=rf"math': {lost} would be neither merged nor copied"):
        account(plan)
    plan.close()


def test_the_sentence_has_every_tensor_in_it() -> None:
    accounts = [ModelAccount(21, 20, 1), ModelAccount(23, 20, 0, {"tied and stored twice": 2, "lost": 1})]
    sentence = "Accounted for all 44 tensors of 2 models: 40 merged, 1 copied, 1 lost, 2 tied and stored twice."
    assert account_sentence(accounts) == sentence
    assert account_sentence([ModelAccount(3, 3, 0)] * 2) == "Accounted for all 6 tensors of 2 models: 6 merged."
