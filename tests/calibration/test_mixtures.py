"""Mixtures of experts, which transformers stores one by one and runs in one tensor: fitted, loaded and checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_frmerge import FisherRaoMerger, MergingArguments
from hf_frmerge.calibration.blocks.blockwise_model import BlockwiseModel
from hf_frmerge.calibration.blocks.layers import find_layers
from hf_frmerge.calibration.blocks.streams import in_batches
from hf_frmerge.calibration.blocks.weights import WeightReader
from hf_frmerge.calibration.fits import block_fit
from hf_frmerge.calibration.fits.equations import diagonal_files
from hf_frmerge.calibration.fits.sweep_state import SweepOptions
from hf_frmerge.calibration.inputs import open_model
from hf_frmerge.calibration.prompts.read_prompts import Prompts
from hf_frmerge.calibration.sweep import Sweep
from hf_frmerge.checkpoints.names.model_names import names_of
from hf_frmerge.fisher.diagonal import diagonal_fisher
from hf_frmerge.kernels.load import load_kernels
from hf_frmerge.merging.planning.build_plan import build_plan
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
    args = MergingArguments(
        output_dir=str(out), space="deltas", max_calibration_length=LENGTH, disable_tqdm=True, **options
    )
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


def test_buffers_are_weights_only_where_transformers_loads_them() -> None:
    class_name, config = MODELS["DeepSeek"]
    bias, frequencies = "model.layers.1.mlp.gate.e_score_correction_bias", "model.rotary_emb.inv_freq"
    stored = {bias: (4,), frequencies: (2,)}
    model = BlockwiseModel(getattr(transformers, class_name), config, torch.device("cpu"), torch.float32, stored)
    assert {bias, frequencies} <= {name for name, _ in model.model.named_buffers()}
    assert bias in model.parameters() and frequencies not in model.parameters()


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


def float64_fit(
    inputs: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, start: torch.Tensor
) -> torch.Tensor:
    """Return the ridge solution around the start, with a weight for each token, from all tokens at once."""
    x, target, d, w = inputs.double(), targets.double(), weights.double()[:, None], start.double()
    gram = x.T @ (d * x)
    ridge = 0.03 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    return w + torch.linalg.solve(gram + ridge, x.T @ (d * (target - x @ w.T))).T


@pytest.mark.parametrize("name", ["Mixtral", "Qwen3-MoE"])
def test_an_expert_of_a_mixture_is_fitted_to_the_tokens_that_the_merge_sends_to_it(tmp_path: Path, name: str) -> None:
    base, experts = family(tmp_path, name)
    plan = build_plan(experts, MergingArguments(method="linear", space="deltas"), None, base)
    class_, config = getattr(transformers, MODELS[name][0]), MODELS[name][1]
    shapes = {step.name: step.shape for step in plan.steps}
    model = BlockwiseModel(class_, config, torch.device("cpu"), torch.float32, shapes)
    reader = WeightReader(plan, load_kernels("cpu"), model)
    batches = [
        batch
        for number in range(2)
        for batch in in_batches(
            [np.array(ids) for ids in prompts(number)], number, 8, 0, is_held_out=False, device=model.device
        )
    ]
    sweep = Sweep(model, reader, batches, [0.3, 0.7], SweepOptions(), is_full=False)
    sweep.begin()
    entered = [hidden.clone() for hidden in sweep.state.merged], [hidden.clone() for hidden in sweep.state.expert]
    found = sweep.fit_block(0)

    block = model.blocks[0]
    keys = model.block_parameters(block)
    of_experts = [{key: reader.expert(i, f"{block}.{key}") for key in keys} for i in range(2)]
    start = {key: reader.start(f"{block}.{key}") for key in keys}
    fitted = {key: value + found.corrections.get(key, 0) for key, value in start.items()}
    mixture = model.block(block).get_submodule("mlp.experts")
    (step,) = find_layers(model, block, model.computed(start), entered[0][0], batches[0].calls[0]).mixtures

    def entering(weights: dict[str, torch.Tensor], hidden: torch.Tensor, b: int) -> list[torch.Tensor]:
        called: list[Any] = []
        handle = mixture.register_forward_pre_hook(lambda _, args: called.append(args))
        model.run_block(block, weights, hidden, batches[b].calls[0])
        handle.remove()
        return called[0]

    tokens: list[list[torch.Tensor]] = []
    for b, batch in enumerate(batches):
        x, places, shares = entering(fitted, entered[0][b], b)
        x_e, *_ = entering(of_experts[batch.expert], entered[1][b], b)
        whose = torch.full((len(x),), batch.expert)
        tokens.append([x, x_e, places, shares, whose])
    x, x_e, places, shares, whose = (torch.cat(part) for part in zip(*tokens))
    per_token = torch.tensor([0.3, 0.7])[whose] / torch.bincount(whose)[whose]
    assert len(step.experts) > 2
    for place, (gate, up, down) in enumerate(step.experts):
        at = (places == place).any(1)
        assert at.sum() >= 32
        weights = per_token[at] * shares[places == place] ** 2
        for layer in (gate, up):
            key = f"{layer}.weight"
            theirs = torch.stack([of_experts[int(i)][key] for i in whose[at]])
            target = torch.einsum("toi,ti->to", theirs, 0.5 * x[at] + 0.5 * x_e[at])
            expected = float64_fit(x[at], target, weights, start[key])
            torch.testing.assert_close(fitted[key].double(), expected, rtol=1e-3, atol=1e-4)
        silu = torch.nn.functional.silu
        inner = [
            torch.stack([silu(w[f"{gate}.weight"] @ row) * (w[f"{up}.weight"] @ row) for w, row in pairs])
            for pairs in (
                [(fitted, row) for row in x[at]],
                [(of_experts[int(i)], row) for i, row in zip(whose[at], x_e[at])],
            )
        ]
        key = f"{down}.weight"
        theirs = torch.stack([of_experts[int(i)][key] for i in whose[at]])
        target = torch.einsum("toi,ti->to", theirs, 0.5 * inner[0] + 0.5 * inner[1])
        expected = float64_fit(inner[0], target, weights, start[key])
        torch.testing.assert_close(fitted[key].double(), expected, rtol=1e-3, atol=1e-4)


def test_an_expert_of_a_mixture_that_few_tokens_reach_stays_as_merged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(block_fit, "FEWEST_TOKENS", 1000)  # all prompts have fewer
    base, experts = family(tmp_path, "Mixtral")
    merge(base, experts, tmp_path / "few", calibration_form="dense")
    corrections = load_file(tmp_path / "few" / "merge_corrections.safetensors")
    assert any("self_attn" in name for name in corrections)
    assert not any("experts" in name for name in corrections)
    assert any("6 experts of mixtures got fewer than" in record.getMessage() for record in caplog.records)


def test_experts_that_are_stored_in_one_tensor_are_said_to_stay(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base, experts = family(tmp_path, "gpt-oss")
    merge(base, experts, tmp_path / "out", calibration_form="dense")
    (said,) = (r.getMessage() for r in caplog.records if "stays as merged" in r.getMessage())
    assert "model.layers.0.mlp.experts.gate_up_proj" in said
    assert not any(".experts." in name for name in load_file(tmp_path / "out" / "merge_corrections.safetensors"))


@pytest.mark.parametrize(
    "options",
    [
        {"method": "regmean"},
        {"method": "fisher"},
        {"method": "mats", "max_iter": 2},
        {"fisher": "diagonal"},
        {"refine_steps": 2, "refine_lmbda": 0.5},
        {"refine_steps": 2, "calibration_form": "table"},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["Mixtral", "DeepSeek"])
def test_whatever_is_made_of_prompts_can_be_made_of_a_mixture(
    tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    base, experts = family(tmp_path, name)
    merge(base, experts, tmp_path / "out", **options)
    assert verify(str(tmp_path / "out")).ok
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("name", ["Mixtral", "Qwen3-MoE", "DeepSeek"])
def test_fisher_information_of_an_expert_of_a_mixture_is_its_part_of_the_stack(tmp_path: Path, name: str) -> None:
    base, experts = family(tmp_path, name)
    plan = build_plan(experts, MergingArguments(method="fisher"), None, base, has_prompts=True)
    token_ids = tuple(np.array(ids) for ids in prompts(0))
    (file,) = diagonal_files(plan, open_model(plan), [Prompts(0, token_ids, "dataset")], is_silent=True)
    model = AutoModelForCausalLM.from_pretrained(experts[0], dtype=torch.float32)
    stacks = {key: value for key, value in model.named_parameters() if value.ndim == 3}
    found, _ = diagonal_fisher(model, token_ids, list(stacks), labels="sampled", seed=plan.args.seed)
    stored = load_file(Path(experts[0]) / "model.safetensors")
    n_parts = 0
    for key, stack in stacks.items():
        for step in plan.steps:
            # Which part it is, is known by its values.
            part = stored[step.name]
            same = [
                (place, first)
                for place in range(len(stack))
                for first in (0, stack.shape[1] // 2)
                if torch.equal(stack[place, first : first + len(part)], part)
            ]
            if part.ndim == 2 and same:
                (place, first), *_ = same
                expected = found[key][place, first : first + len(part)]
                actual = file.read(step.name.replace("block_sparse_moe", "mlp")) * file.record.norm
                torch.testing.assert_close(actual, expected, rtol=1e-2, atol=1e-8)
                n_parts += 1
    assert n_parts == 3 * sum(len(stack) for stack in stacks.values()) / 2
