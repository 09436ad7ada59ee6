"""Mixtures of experts, which transformers stores one by one and runs in one tensor: fitted, loaded and checked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
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
    "Qwen3.5-MoE": (
        "Qwen3_5MoeForCausalLM",
        transformers.Qwen3_5MoeTextConfig(
            **SIZES, head_dim=8, moe_intermediate_size=16, shared_expert_intermediate_size=16, num_experts=4,
            layer_types=["full_attention"] * 2,
        ),
    ),
    "Granite-MoE": ("GraniteMoeForCausalLM", transformers.GraniteMoeConfig(**SIZES, num_local_experts=4)),
    "Llama 4": (
        "Llama4ForCausalLM",
        transformers.Llama4TextConfig(
            **{**SIZES, "num_experts_per_tok": 1}, head_dim=8, intermediate_size_mlp=24, num_local_experts=4
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
        torch.testing.assert_close(logits, whole(input_ids=ids, use_cache=False).logits, rtol=1e-4, atol=1e-5)


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
    inputs: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, start: torch.Tensor, *, has_bias: bool
) -> torch.Tensor:
    """Return the ridge solution around the start, with a weight for each token, from all tokens at once."""
    x, target, d, w = inputs.double(), targets.double(), weights.double()[:, None], start.double()
    gram = x.T @ (d * x)
    ridge = 0.03 * gram.diagonal()
    ridge[: len(ridge) - has_bias] = ridge[: len(ridge) - has_bias].mean()
    return w + torch.linalg.solve(gram + ridge.diag(), x.T @ (d * (target - x @ w.T))).T


Matrices = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Layout:
    """
    Where a checkpoint has an expert of a mixture, and what its class makes of what comes out of the first matrices.

    Attributes:
        first, last: return matrices `(out, in)`, with a bias as the last column, from the weights of a block.
        gate: returns what enters the last one.
    """

    first: Callable[[dict[str, torch.Tensor], int], Matrices]
    last: Callable[[dict[str, torch.Tensor], int], Matrices]
    gate: Callable[[torch.Tensor], torch.Tensor]
    has_bias: bool = False


def silu_gate(both: torch.Tensor) -> torch.Tensor:
    gate, up = both.chunk(2)
    return torch.nn.functional.silu(gate) * up


def clamped_gate(both: torch.Tensor) -> torch.Tensor:
    """That of gpt-oss, whose gate and up lie one beside the other."""
    gate, up = both[::2].clamp(max=7.0), both[1::2].clamp(-7.0, 7.0)
    return gate * torch.sigmoid(1.702 * gate) * (up + 1)


def flipped(weights: dict[str, torch.Tensor], place: int, name: str) -> Matrices:
    matrix, bias = weights[f"mlp.experts.{name}"][place].T, weights[f"mlp.experts.{name}_bias"][place]
    return (torch.cat([matrix, bias[:, None]], dim=1),)


LAYOUTS = {
    "Mixtral": Layout(
        lambda w, e: (w[f"mlp.experts.{e}.w1.weight"], w[f"mlp.experts.{e}.w3.weight"]),
        lambda w, e: (w[f"mlp.experts.{e}.w2.weight"],),
        silu_gate,
    ),
    "Qwen3-MoE": Layout(
        lambda w, e: (w[f"mlp.experts.{e}.gate_proj.weight"], w[f"mlp.experts.{e}.up_proj.weight"]),
        lambda w, e: (w[f"mlp.experts.{e}.down_proj.weight"],),
        silu_gate,
    ),
    "Granite-MoE": Layout(
        lambda w, e: (w["block_sparse_moe.experts.gate_up_proj"][e],),
        lambda w, e: (w["block_sparse_moe.experts.down_proj"][e],),
        silu_gate,
    ),
    "gpt-oss": Layout(
        lambda w, e: flipped(w, e, "gate_up_proj"), lambda w, e: flipped(w, e, "down_proj"), clamped_gate, True
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_an_expert_of_a_mixture_is_fitted_to_the_tokens_that_the_merge_sends_to_it(tmp_path: Path, name: str) -> None:
    if name == "Granite-MoE" and transformers.__version__ == "5.2.0":
        pytest.skip("the lowest version runs it by code of its own")
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
    (mixture,) = (module for module in model.block(block).modules() if hasattr(module, "_apply_gate"))

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
    layout, n_fitted = LAYOUTS[name], 0

    def check(matrices_of: Callable[[dict[str, torch.Tensor]], Matrices], own: Matrices, theirs: Matrices) -> None:
        """Compare what was found with the solution for some inputs, of the merge and of the expert."""
        one = torch.ones(len(own), int(layout.has_bias))
        inputs, inputs_e = (torch.cat([torch.stack(values), one], dim=1) for values in (own, theirs))
        of_start, of_fit = matrices_of(start), matrices_of(fitted)
        for part in range(len(of_start)):
            wanted = torch.stack([matrices_of(of_experts[int(i)])[part] for i in whose[at]])
            target = torch.einsum("toi,ti->to", wanted, 0.5 * inputs + 0.5 * inputs_e)
            expected = float64_fit(inputs, target, weights, of_start[part], has_bias=layout.has_bias)
            torch.testing.assert_close(of_fit[part].double(), expected, rtol=1e-3, atol=1e-4)

    def inner(weights: dict[str, torch.Tensor], row: torch.Tensor, place: int) -> torch.Tensor:
        one = torch.ones(int(layout.has_bias))
        return layout.gate(torch.cat(layout.first(weights, place)) @ torch.cat([row, one]))

    for place in range(int(places.max()) + 1):
        at = (places == place).any(1)
        weights = per_token[at] * shares[places == place] ** 2
        if at.sum() < 32:
            assert torch.equal(*(torch.cat(layout.first(w, place)) for w in (fitted, start)))
            continue
        n_fitted += 1
        check(lambda w: layout.first(w, place), tuple(x[at]), tuple(x_e[at]))  # noqa: B023 (called at once)
        own = tuple(inner(fitted, row, place) for row in x[at])
        theirs = tuple(inner(of_experts[int(i)], row, place) for i, row in zip(whose[at], x_e[at]))
        check(lambda w: layout.last(w, place), own, theirs)  # noqa: B023
    assert n_fitted > 2


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


def test_experts_that_cannot_be_fitted_are_said_to_stay(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base, experts = family(tmp_path, "Llama 4")
    merge(base, experts, tmp_path / "out", calibration_form="dense")
    (said,) = (r.getMessage() for r in caplog.records if "stays as merged" in r.getMessage())
    assert "model.layers.0.feed_forward.experts.gate_up_proj" in said
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
