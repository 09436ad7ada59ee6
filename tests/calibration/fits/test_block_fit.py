"""The first layer of a block as a fit leaves it, against float64 solutions for what transformers and PEFT compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from hf_frmerge import MergingArguments
from hf_frmerge.calibration.blocks.blockwise_model import BlockwiseModel
from hf_frmerge.calibration.blocks.streams import in_batches
from hf_frmerge.calibration.blocks.weights import WeightReader
from hf_frmerge.calibration.fits.least_squares import FitOptions
from hf_frmerge.calibration.fits.sweep_state import SweepOptions
from hf_frmerge.calibration.sweep import Sweep
from hf_frmerge.kernels.load import load_kernels
from hf_frmerge.merging.planning.build_plan import build_plan

SHARES = [0.3, 0.7]
LLAMA = transformers.LlamaConfig(
    vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
)
# Class, configuration, the first layer of the first block, and whether it stores what goes in first.
MODELS: dict[str, tuple[Any, Any, str, bool]] = {
    "Llama": (transformers.LlamaForCausalLM, LLAMA, "self_attn.q_proj", False),
    "GPT-2": (
        transformers.GPT2LMHeadModel,
        transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2),
        "attn.c_attn",
        True,
    ),
}
KAPPA = {"full": 5.0, "adapter": 0.8}


def family(folder: Path, name: str, kinds: tuple[str, ...]) -> tuple[str, list[str]]:
    """Write a base and two experts of it: full fine-tunes, or LoRA adapters of the first layer."""
    class_, config, layer, is_flipped = MODELS[name]
    torch.manual_seed(0)
    base = class_(config)
    base.save_pretrained(folder / "base")
    for number, kind in enumerate(kinds):
        torch.manual_seed(number + 1)
        expert = class_.from_pretrained(folder / "base")
        if kind == "adapter":
            expert = get_peft_model(
                expert, LoraConfig(r=2, target_modules=[layer.split(".")[-1]], fan_in_fan_out=is_flipped)
            )
        with torch.no_grad():
            for key, values in expert.named_parameters():
                if kind == "full" or "lora_" in key:
                    values.add_(0.2 * torch.randn_like(values))
        expert.save_pretrained(folder / f"expert{number}")
    return str(folder / "base"), [str(folder / f"expert{number}") for number in range(2)]


def loaded(name: str, base: str, expert: str, kind: str) -> torch.nn.Module:
    class_ = MODELS[name][0]
    if kind == "full":
        return class_.from_pretrained(expert).eval()
    return PeftModel.from_pretrained(class_.from_pretrained(base), expert).merge_and_unload().eval()


@pytest.mark.parametrize("kinds", [("full", "full"), ("adapter", "adapter"), ("full", "adapter")], ids="+".join)
@pytest.mark.parametrize("name", MODELS)
def test_every_expert_pulls_the_fit_along_its_own_update(tmp_path: Path, name: str, kinds: tuple[str, ...]) -> None:
    class_, config, layer, is_flipped = MODELS[name]
    base, experts = family(tmp_path, name, kinds)
    args = MergingArguments(method="linear", space="deltas", adapter_output="merged")
    plan = build_plan(experts, args, SHARES, base)
    model = BlockwiseModel(class_, config, torch.device("cpu"), torch.float32)
    reader = WeightReader(plan, load_kernels("cpu"), model)
    prompts = [torch.randint(50, (20, 9), generator=torch.Generator().manual_seed(i)) for i in range(2)]
    batches = [
        batch
        for i in range(2)
        for batch in in_batches([p.numpy() for p in prompts[i]], i, 8, 0, is_held_out=False, device=model.device)
    ]
    options = SweepOptions(FitOptions(update_prior=KAPPA["full"], adapter_prior=KAPPA["adapter"]))
    is_full = set(kinds) == {"full"}
    sweep = Sweep(model, reader, batches, SHARES, options, is_full=is_full)
    sweep.begin()
    found = sweep.fit_block(0)

    block = model.blocks[0]
    key = f"{block}.{layer}.weight"
    start = reader.start(key)
    fitted = start + found.corrections[f"{layer}.weight"]

    def matrix(weight: Tensor) -> Tensor:
        return (weight.T if is_flipped else weight).detach().double()

    models = [loaded(name, base, expert, kind) for expert, kind in zip(experts, kinds)]
    merged = class_.from_pretrained(base).eval()
    with torch.no_grad():
        for parameter, values in merged.named_parameters():
            values.copy_(reader.start(parameter))
        # A norm of the experts, if they differ, was fitted before.
        for parameter, values in found.corrections.items():
            if ("norm" in parameter or "ln_1" in parameter) and not parameter.startswith(("post", "ln_2")):
                merged.get_parameter(f"{block}.{parameter}").add_(values)

    def entering(of: torch.nn.Module, ids: Tensor) -> Tensor:
        seen: list[Tensor] = []
        handle = of.get_submodule(f"{block}.{layer}").register_forward_pre_hook(lambda _, a: seen.append(a[0]))
        with torch.no_grad():
            of(input_ids=ids)
        handle.remove()
        return seen[0].flatten(0, 1).double()

    has_bias = f"{layer}.bias" in found.corrections
    n_in, w_base = matrix(start).shape[1], matrix(class_.from_pretrained(base).get_parameter(key))
    deltas = [matrix(of.get_parameter(key)) - w_base for of in models]
    grams = [d.T @ d / torch.trace(d.T @ d) * n_in for d in deltas]
    if is_full:  # a fit of full fine-tunes starts from what their updates say
        weighted = [2 * share * c for share, c in zip(SHARES, grams)]
        pulls = sum(c @ d.T for c, d in zip(weighted, deltas))
        of_updates = torch.linalg.solve(sum(weighted) + 0.3 * torch.eye(n_in), pulls)
        w_start = w_base + of_updates.T
    else:
        w_start = matrix(start)
    system, pull = (torch.zeros(n_in + has_bias, size, dtype=torch.float64) for size in (n_in + has_bias, len(w_base)))
    whole_start = w_start
    if has_bias:
        whole_start = torch.cat([w_start, reader.start(f"{block}.{layer}.bias").double()[:, None]], dim=1)
    for of, share, ids in zip(models, SHARES, prompts):
        x, x_e, w = entering(merged, ids), entering(of, ids), matrix(of.get_parameter(key))
        if has_bias:
            x, x_e = (torch.cat([each, torch.ones(len(each), 1)], dim=1) for each in (x, x_e))
            w = torch.cat([w, of.get_parameter(f"{block}.{layer}.bias").detach().double()[:, None]], dim=1)
        target = 0.5 * x_e @ w.T + 0.5 * x @ w.T
        system += share / len(x) * x.T @ x
        pull += share / len(x) * x.T @ (target - x @ whole_start.T)
    mean = system.diagonal()[:n_in].mean()
    system.diagonal()[:n_in] += 0.03 * mean
    if has_bias:
        system[-1, -1] *= 1.03
    for kind, share, c, d in zip(kinds, SHARES, grams, deltas):
        # The pull to an adapter is half as strong where its update has a tenth of the weight's norm.
        kappa = KAPPA[kind] / (1 if kind == "full" else 1 + d.square().sum() / (0.1**2 * w_base.square().sum()))
        system[:n_in, :n_in] += share * kappa * mean * c
        pull[:n_in] += share * kappa * mean * c @ (w_base + d - w_start).T
    expected = whole_start + torch.linalg.solve(system, pull).T
    torch.testing.assert_close(matrix(fitted), expected[:, :n_in], rtol=1e-3, atol=2e-4)
