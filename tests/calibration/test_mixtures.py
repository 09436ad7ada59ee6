"""Mixtures of experts, which transformers stores one by one and runs in one tensor: fitted, loaded and checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_frmerge import FisherRaoMerger, MergingArguments
from hf_frmerge.calibration.blocks.blockwise_model import BlockwiseModel
from hf_frmerge.checkpoints.names.model_names import names_of
from hf_frmerge.merging.record.manifest import read_manifest
from hf_frmerge.provenance.merge_again import reproduce
from hf_frmerge.provenance.verify import verify

SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "num_key_value_heads": 1,
    "num_experts_per_tok": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MODELS = {
    "Mixtral": ("MixtralForCausalLM", transformers.MixtralConfig(**SIZES, num_local_experts=3)),
    "Qwen3-MoE": (
        "Qwen3MoeForCausalLM",
        transformers.Qwen3MoeConfig(**SIZES, head_dim=8, moe_intermediate_size=16, num_experts=4),
    ),
    "DeepSeek": (
        "DeepseekV3ForCausalLM",
        transformers.DeepseekV3Config(
            **{**SIZES, "num_key_value_heads": 2}, moe_intermediate_size=16, n_routed_experts=4, n_group=1,
            topk_group=1, q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8,
            first_k_dense_replace=1,
        ),
    ),
    "gpt-oss": ("GptOssForCausalLM", transformers.GptOssConfig(**SIZES, head_dim=8, num_local_experts=4)),
}  # fmt: skip
LENGTH, N_PROMPTS = 12, 32


def prompts(expert: int, seed: int = 0) -> list[list[int]]:
    """Every expert has tokens of its own half of the vocabulary."""
    draw = torch.Generator().manual_seed(10 * expert + seed)
    return (torch.randint(1, 25, (N_PROMPTS, LENGTH), generator=draw) + 24 * expert).tolist()


def family(folder: Path, name: str) -> tuple[str, list[str]]:
    """Write a base and two fine-tunes of it; return their folders."""
    class_name, config = MODELS[name]
    torch.manual_seed(0)
    model = getattr(transformers, class_name)(config).float()
    with torch.no_grad():
        for values in model.state_dict().values():  # buffers, too: routers of DeepSeek choose by one
            values.add_(0.2 * torch.randn_like(values))
    base = {key: value.clone() for key, value in model.state_dict().items()}
    model.save_pretrained(folder / "base")
    for expert in range(2):
        torch.manual_seed(expert + 1)
        with torch.no_grad():
            for key, values in model.state_dict().items():
                values.copy_(base[key] + 0.1 * torch.randn_like(values))
        model.save_pretrained(folder / f"expert{expert}")
    return str(folder / "base"), [str(folder / f"expert{expert}") for expert in range(2)]


def merge(base: str, experts: list[str], out: Path, **options: Any) -> None:
    args = MergingArguments(output_dir=str(out), space="deltas", max_calibration_length=LENGTH, **options)
    data = {expert: [{"input_ids": ids} for ids in prompts(i)] for i, expert in enumerate(experts)}
    FisherRaoMerger(experts, args, base_model=base, calibration_dataset=data).merge()


def distance(out: str, experts: list[str]) -> float:
    """Return the mean squared Fisher-Rao distance to each expert on new prompts of its own, by transformers alone."""
    total = 0.0
    for i, expert in enumerate(experts):
        ids = torch.tensor(prompts(i, seed=1))
        both = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for path in (out, expert)]
        with torch.no_grad():
            one, other = (model(input_ids=ids).logits.double().softmax(-1).sqrt() for model in both)
        total += float((2 * (one * other).sum(-1).clamp(max=1).arccos()).square().mean()) / len(experts)
    return total


@pytest.mark.parametrize("name", MODELS)
def test_blocks_run_with_experts_as_they_are_stored(tmp_path: Path, name: str) -> None:
    class_name, config = MODELS[name]
    base, _ = family(tmp_path, name)
    whole = getattr(transformers, class_name).from_pretrained(base).eval()
    stored = load_file(Path(base) / "model.safetensors")
    shapes = {key: tuple(value.shape) for key, value in stored.items()}
    model = BlockwiseModel(type(whole), config, torch.device("cpu"), torch.float32, shapes)
    names = names_of(model.model)
    assert names is not None
    weights = {names.rename(key): value for key, value in stored.items()}
    assert sorted(model.parameters()) == sorted(weights)
    ids = torch.tensor(prompts(0))
    hidden, calls = model.begin(
        {key: weights[key] for key in model.outer_parameters()},
        {key: weights[f"{model.blocks[0]}.{key}"] for key in model.block_parameters(model.blocks[0])},
        {"input_ids": ids},
    )
    for block, call in zip(model.blocks, calls):
        own = {key: weights[f"{block}.{key}"] for key in model.block_parameters(block)}
        hidden = model.run_block(block, model.computed(own), hidden, call)
    logits = model.finish({key: weights[key] for key in model.outer_parameters()}, hidden, {"input_ids": ids}).values
    with torch.no_grad():
        torch.testing.assert_close(logits, whole(input_ids=ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["table", "low_rank", "dense"])
@pytest.mark.parametrize("name", MODELS)
def test_a_mixture_is_fitted_and_can_be_checked(tmp_path: Path, name: str, form: str) -> None:
    base, experts = family(tmp_path, name)
    merge(base, experts, tmp_path / "out", calibration_form=form)
    record = read_manifest(tmp_path / "out").calibration
    assert record is not None and record.form == form
    start = MergingArguments(output_dir=str(tmp_path / "start"), space="deltas")
    FisherRaoMerger(experts, start, base_model=base).merge()
    before, after = (distance(str(tmp_path / folder), experts) for folder in ("start", "out"))
    assert after < before
    assert verify(str(tmp_path / "out")).ok
    assert not reproduce(str(tmp_path / "out")).differences
