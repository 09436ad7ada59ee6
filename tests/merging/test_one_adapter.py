"""A single adapter folded into its base, against PEFT's `merge_and_unload`."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from click_runner import click_runner
from jsonschema import Draft202012Validator
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from hf_frmerge import FisherRaoMerger, MergingArguments
from hf_frmerge.cli.main import main
from hf_frmerge.errors import ArgumentError, MergeError
from hf_frmerge.merging.callbacks.callback import MergeCallback
from hf_frmerge.merging.record.manifest import SCHEMA_FILE
from hf_frmerge.provenance.merge_again import reproduce
from hf_frmerge.provenance.verify import verify

LLAMA = LlamaConfig(
    vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, tie_word_embeddings=False,
)  # fmt: skip
TARGETS = ["q_proj", "v_proj", "down_proj"]
CONFIGS: dict[str, dict[str, Any]] = {
    "lora": {"r": 4, "lora_alpha": 7},
    "rslora": {"r": 4, "use_rslora": True, "rank_pattern": {"q_proj": 3}},
    "dora": {"r": 4, "use_dora": True},
    "whole head": {"r": 4, "modules_to_save": ["lm_head"]},
}


def save_pair(root: Path, dtype: torch.dtype, config: dict[str, Any]) -> tuple[str, str]:
    """Save a base and an adapter with a change in every module; return their folders."""
    torch.manual_seed(0)
    LlamaForCausalLM(LLAMA).to(dtype).save_pretrained(root / "base")
    model = get_peft_model(
        LlamaForCausalLM.from_pretrained(root / "base"), LoraConfig(target_modules=TARGETS, **config)
    )
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            parameter.data = parameter.data * 0.9 + 0.1 * noise
    model.save_pretrained(root / "adapter")
    return str(root / "base"), str(root / "adapter")


def folded_by_peft(base: str, adapter: str) -> dict[str, torch.Tensor]:
    loaded = LlamaForCausalLM.from_pretrained(base, dtype=torch.float64)
    return PeftModel.from_pretrained(loaded, adapter).double().merge_and_unload().state_dict()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CONFIGS)
def test_one_adapter_becomes_what_peft_makes_of_it(tmp_path: Path, case: str, dtype: torch.dtype) -> None:
    base, adapter = save_pair(tmp_path, dtype, CONFIGS[case])
    wanted = folded_by_peft(base, adapter)
    out = str(tmp_path / "out")
    result = click_runner().invoke(main, ["merge", adapter, "--base-model", base, "--output-dir", out])
    assert result.exit_code == 0, result.output
    folded, origin = load_file(f"{out}/model.safetensors"), load_file(f"{base}/model.safetensors")
    assert folded.keys() == wanted.keys()
    for name, tensor in folded.items():
        assert tensor.dtype == dtype
        # The delta is a product in float32; then the sum is rounded once, which may fall on either side of a tie.
        changed = wanted[name].to(dtype)
        rounding = torch.finfo(dtype).eps
        torch.testing.assert_close(tensor, changed, rtol=rounding, atol=1e-7)
        assert (tensor != changed).float().mean() < (0.01 if dtype == torch.bfloat16 else 1.0), name
    touched = {name for name in wanted if not torch.equal(folded[name], origin[name])}
    assert touched == {name for name in wanted if not torch.equal(wanted[name], origin[name].double())}
    assert verify(out).ok
    assert reproduce(out).identical
    manifest = json.loads((tmp_path / "out/merge_manifest.json").read_text())
    schema = json.loads(files("hf_frmerge.merging.record").joinpath(SCHEMA_FILE).read_text())
    Draft202012Validator(schema).validate(manifest)
    assert [model["id"] for model in manifest["experts"]] == ["adapter"] and manifest["base_model"]["id"] == "base"
    card = (tmp_path / "out/README.md").read_text()
    assert "a base model with one adapter folded into it" in card
    assert "apart in the median" not in card + result.output  # an angle takes two
    assert "one adapter alone, whose mean is itself" in result.output
    # Nothing of a method that decided nothing, and no advice that only a merge of several needs.
    for of_several in ("karcher", "Functionality-Oriented", "bibtex", "any one expert"):
        assert of_several not in card, of_several
    assert "expect of it what `adapter` does on its base" in card


class _Stop(MergeCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_merge_stop = True


def test_a_fold_resumes_to_the_same_bits(tmp_path: Path) -> None:
    base, adapter = save_pair(tmp_path, torch.bfloat16, CONFIGS["lora"])
    whole = FisherRaoMerger([adapter], MergingArguments(str(tmp_path / "whole")), base_model=base).merge()
    args = MergingArguments(str(tmp_path / "parts"))
    with pytest.raises(MergeError, match="was stopped after"):
        FisherRaoMerger([adapter], args, base_model=base, callbacks=[_Stop]).merge()
    again = FisherRaoMerger([adapter], args, base_model=base).merge(resume_from_checkpoint=True)
    assert whole.is_merged and again.is_merged
    file = "model.safetensors"
    assert (tmp_path / "parts" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_one_adapter_can_be_compressed(tmp_path: Path) -> None:
    _, adapter = save_pair(tmp_path, torch.float32, CONFIGS["lora"])
    args = MergingArguments(str(tmp_path / "out"), adapter_output="adapter", adapter_rank=2)
    FisherRaoMerger([adapter], args).merge()
    tensors, small = (load_file(f"{each}/adapter_model.safetensors") for each in (adapter, tmp_path / "out"))
    card = (tmp_path / "out/README.md").read_text()
    assert "a LoRA adapter written anew" in card and "made out of 1" not in card and "adapter_rank" in card
    for name, down in tensors.items():
        if "lora_A" in name:
            up = name.replace("lora_A", "lora_B")
            u, s, v = torch.linalg.svd(7 / 4 * tensors[up].double() @ down.double())
            config = json.loads((tmp_path / "out/adapter_config.json").read_text())
            scale = config["lora_alpha"] / config["r"]
            assert config["r"] == 2
            best = u[:, :2] * s[:2] @ v[:2]
            torch.testing.assert_close(scale * small[up].double() @ small[name].double(), best, rtol=1e-4, atol=1e-5)


def test_nothing_is_made_of_one_model_alone(tmp_path: Path) -> None:
    base, adapter = save_pair(tmp_path, torch.float32, CONFIGS["lora"])
    args = MergingArguments(str(tmp_path / "out"))
    with pytest.raises(ArgumentError, match="a full model, of which a merge would be a copy"):
        FisherRaoMerger([base], args).merge()
    with pytest.raises(ArgumentError, match=r"pass base_model \(--base-model\), the model that this adapter"):
        FisherRaoMerger([adapter], args).merge()
    FisherRaoMerger([adapter], args, base_model=base).merge()  # the advice works
    with pytest.raises(MergeError, match="slerp joins exactly 2 experts, got 1"):
        other = MergingArguments(str(tmp_path / "other"), method="slerp")
        FisherRaoMerger([adapter], other, base_model=base).merge()
