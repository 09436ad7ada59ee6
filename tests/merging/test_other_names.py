"""Merges of models that store the same tensors under other names, against float64 means by the name in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import BertConfig, LlamaConfig, LlavaConfig, PreTrainedConfig

from hf_frmerge.checkpoints.adapters.match import find_targets
from hf_frmerge.checkpoints.resolve import Source
from hf_frmerge.checkpoints.tensors.reader import open_checkpoint
from hf_frmerge.errors import CheckpointError
from hf_frmerge.extraction.extract_lora import ExtractOptions, extract_lora
from hf_frmerge.merging.arguments.merging_arguments import MergingArguments
from hf_frmerge.merging.engine.engine import StepObserver
from hf_frmerge.merging.engine.processes import Processes
from hf_frmerge.merging.planning.build_plan import build_plan
from hf_frmerge.merging.run import run_merge

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
IMAGES = {"image_size": 8, "patch_size": 4}
LLAVA = LlavaConfig(
    text_config={**SIZES, "vocab_size": 40, "model_type": "llama"},
    vision_config={**SIZES, **IMAGES, "model_type": "clip_vision_model"},
    image_token_index=39,
)
BERT = BertConfig(**SIZES, vocab_size=40, max_position_embeddings=16)
Rename = Callable[[str], str]


def save(folder: Path, architecture: str, config: PreTrainedConfig, seed: int, rename: Rename | None = None) -> Any:
    """Save a model in the names of the installed version, or in those that `rename` makes of them."""
    torch.manual_seed(0)
    model = getattr(transformers, architecture)(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder, save_original_format=False)
    if rename is not None:
        tensors = load_file(folder / "model.safetensors")
        renamed = {rename(name): tensor for name, tensor in tensors.items()}
        assert renamed.keys() != tensors.keys()
        save_file(renamed, folder / "model.safetensors", {"format": "pt"})
        assert not type(model).from_pretrained(folder, output_loading_info=True)[1]["missing_keys"]
    return model


def as_on_the_hub(name: str) -> str:
    """LLaVA's names in repositories of 2024."""
    if name.startswith("model.language_model."):
        return name.replace("model.language_model.", "language_model.model.", 1)
    return f"language_model.{name}" if name.startswith("lm_head.") else name.removeprefix("model.")


def as_in_2018(name: str) -> str:
    return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")


def merge(experts: list[Path], out: Path, base: Path | None = None, **options: Any) -> Any:
    plan = build_plan(
        list(map(str, experts)), MergingArguments(str(out), **options), None, str(base) if base else None
    )
    run_merge(plan, StepObserver(), Processes())
    return plan


CASES = {
    "prefixes": ("LlavaForConditionalGeneration", LLAVA, as_on_the_hub),
    "gamma and beta": ("BertForMaskedLM", BERT, as_in_2018),
    "no prefix": ("BertForMaskedLM", BERT, lambda name: name.removeprefix("bert.")),
}


@pytest.mark.parametrize("first", ["old", "new"])
@pytest.mark.parametrize("case", CASES)
def test_two_versions_of_names_have_one_mean(tmp_path: Path, case: str, first: str) -> None:
    architecture, config, rename = CASES[case]
    models = {
        "new": save(tmp_path / "new", architecture, config, 1),
        "old": save(tmp_path / "old", architecture, config, 2, rename),
    }
    second = "new" if first == "old" else "old"
    plan = merge([tmp_path / first, tmp_path / second], tmp_path / "out", method="linear")
    merged, info = type(models["new"]).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    one, two = models["new"].state_dict(), models["old"].state_dict()
    for name, tensor in merged.state_dict().items():
        mean = one[name] if not one[name].is_floating_point() else (one[name].double() + two[name].double()) / 2
        assert torch.equal(tensor, mean.to(tensor.dtype)), name
    stored = [load_file(tmp_path / name / "model.safetensors").keys() for name in (first, "out")]
    assert stored[0] == stored[1]  # the names of the first model, whose config it has
    (note,) = [note for note in plan.notes if "have other names" in note]
    assert str(tmp_path / second) in note


def test_a_base_in_old_names_gives_deltas(tmp_path: Path) -> None:
    models = [
        save(tmp_path / name, "BertForMaskedLM", BERT, seed, as_in_2018 if name == "base" else None)
        for seed, name in enumerate(("base", "a", "b"))
    ]
    options = {"method": "task_arithmetic", "space": "deltas", "scale": 0.5}
    merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out", tmp_path / "base", **options)
    merged = type(models[0]).from_pretrained(tmp_path / "out").state_dict()
    for name, base in models[0].state_dict().items():
        if base.is_floating_point():
            a, b = (model.state_dict()[name].double() - base.double() for model in models[1:])
            torch.testing.assert_close(merged[name], (base.double() + 0.5 * (a + b)).to(base.dtype))


def test_two_tensors_of_one_name_in_memory_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "a", "BertForMaskedLM", BERT, 1)
    save(tmp_path / "b", "BertForMaskedLM", BERT, 2)
    weights = tmp_path / "b/model.safetensors"
    tensors = load_file(weights)
    name = "bert.embeddings.LayerNorm.weight"
    save_file(tensors | {as_in_2018(name): tensors[name] + 1}, weights, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"LayerNorm\.gamma' and .*LayerNorm\.weight', which transformers both"):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out")


@pytest.mark.parametrize("holder", ["a", "b"])
def test_constant_buffers_never_decide(tmp_path: Path, holder: str) -> None:
    config = LlamaConfig(**SIZES, vocab_size=40)
    models = [save(tmp_path / name, "LlamaForCausalLM", config, seed) for seed, name in enumerate("ab")]
    weights = tmp_path / holder / "model.safetensors"
    constants = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.rand(4) for i in range(2)}
    save_file(load_file(weights) | constants, weights, {"format": "pt"})
    plan = merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out", method="linear")
    merged = load_file(tmp_path / "out/model.safetensors")
    # As the model whose config the output gets stores them, or not at all.
    kept = constants if holder == "a" else {}
    assert {name: merged.pop(name).tolist() for name in kept} == {name: t.tolist() for name, t in kept.items()}
    one, two = (model.state_dict() for model in models)
    assert merged.keys() == one.keys()
    assert all(torch.equal(merged[name], ((one[name].double() + two[name].double()) / 2).float()) for name in merged)
    assert any("constants that models compute themselves" in note for note in plan.notes)


def text_adapter(base: Path, folder: Path) -> Any:
    """Save an adapter of the language model as if that had been trained alone; return the whole model with it."""
    config = LoraConfig(r=2, target_modules=r".*language_model.*(q|v)_proj", init_lora_weights=False)
    model = get_peft_model(transformers.LlavaForConditionalGeneration.from_pretrained(base), config)
    model.save_pretrained(folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors = {name.replace("model.model.language_model.", "model.model."): tensor for name, tensor in tensors.items()}
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    return model.merge_and_unload()


@pytest.mark.parametrize("rename", [None, as_on_the_hub])
def test_an_adapter_of_a_text_model_fits_the_text_part(tmp_path: Path, rename: Rename | None) -> None:
    save(tmp_path / "base", "LlavaForConditionalGeneration", LLAVA, 1, rename)
    wanted = text_adapter(tmp_path / "base", tmp_path / "adapter").state_dict()
    merge([tmp_path / "adapter"] * 2, tmp_path / "out", tmp_path / "base", adapter_output="merged")
    merged = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "out").state_dict()
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, wanted[name])


def test_a_part_is_told_by_its_class_alone() -> None:
    shapes = {f"model.{part}.layers.0.q_proj.weight": (8, 8) for part in ("language_model", "vision_tower")}
    wanted = {"model.layers.0.q_proj.weight": (8, 8)}
    with pytest.raises(CheckpointError, match="could mean several tensors"):
        find_targets("adapter", wanted, shapes)


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_is_extracted_from_renamed_modules(tmp_path: Path) -> None:
    vit = transformers.ViTConfig(**SIZES, **IMAGES, num_labels=3)
    torch.manual_seed(0)
    base = transformers.ViTForImageClassification(vit)
    base.save_pretrained(tmp_path / "base", save_original_format=True)
    base.save_pretrained(tmp_path / "new", save_original_format=False)
    tuned = transformers.ViTForImageClassification.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "attention" in name and name.endswith("weight"):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    tuned.save_pretrained(tmp_path / "tuned")
    if load_file(tmp_path / "new/model.safetensors").keys() == load_file(tmp_path / "tuned/model.safetensors").keys():
        pytest.skip("this version of transformers has one name for each of these tensors")
    pixels = torch.randn(1, 3, 8, 8)
    for name in ("base", "new"):
        merged, original = (open_checkpoint(Source(each, "full", str(tmp_path / each))) for each in ("tuned", name))
        with merged, original:
            extract_lora(merged, original, tmp_path / f"lora-{name}", ExtractOptions(rank=16))
        loaded = transformers.ViTForImageClassification.from_pretrained(tmp_path / name)
        adapted = PeftModel.from_pretrained(loaded, tmp_path / f"lora-{name}").eval()
        with torch.no_grad():
            torch.testing.assert_close(adapted(pixels).logits, tuned.eval()(pixels).logits, rtol=1e-4, atol=1e-5)
