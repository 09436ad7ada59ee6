"""The fit of what is behind the blocks: against closed forms in float64, on what transformers' models give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from refinement_models import MODELS, N_EXPERTS, padded, prompts, save_models
from torch import Tensor
from transformers import GPT2Config, GPT2ForSequenceClassification

from hf_frmerge.calibration.blocks.blockwise_model import BlockwiseModel
from hf_frmerge.calibration.blocks.streams import Batch
from hf_frmerge.calibration.blocks.weights import WeightReader
from hf_frmerge.calibration.fits import last_layers
from hf_frmerge.calibration.fits.last_layers import LastLayer, find_last_layers
from hf_frmerge.calibration.fits.least_squares import FitOptions
from hf_frmerge.calibration.fits.sweep_state import SweepOptions
from hf_frmerge.calibration.sweep import FittedBlock, Sweep
from hf_frmerge.kernels.load import load_kernels
from hf_frmerge.merging.arguments.merging_arguments import MergingArguments
from hf_frmerge.merging.planning.build_plan import build_plan

SHARES, RIDGE, KAPPA = [0.25, 0.75], 0.3, 5.0
FITTED, HELD_OUT = slice(0, 12), slice(12, 16)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_models(folder)
    return folder


def swept(models: Path, kind: str, held_out: slice = HELD_OUT) -> Sweep:
    """A sweep over a linear merge of two experts that fits no block, in float32."""
    experts = [str(models / kind / f"full{number}") for number in range(N_EXPERTS)]
    plan = build_plan(experts, MergingArguments(method="linear", space="deltas"), SHARES, str(models / kind / "base"))
    model = BlockwiseModel(*MODELS[kind], torch.device("cpu"), torch.float32)
    batches = [
        Batch(expert, padded(prompts(expert)[rows]), is_held_out)
        for expert in range(N_EXPERTS)
        for is_held_out, rows in ((False, FITTED), (True, held_out))
    ]
    options = SweepOptions(FitOptions(update_prior=KAPPA), fits_outer=True)
    reader = WeightReader(plan, load_kernels("cpu"), model)
    sweep = Sweep(model, reader, batches, SHARES, options, is_full=True, offers_table=True)
    sweep.begin()
    for index in range(len(model.blocks)):
        sweep.fit_block(index, FittedBlock({}, {}))
    return sweep


def model_of(models: Path, kind: str, name: str) -> Any:
    return MODELS[kind][0].from_pretrained(models / kind / name, dtype=torch.float64).eval()


def linear_merge(models: Path, kind: str) -> Any:
    base, *experts = (model_of(models, kind, name) for name in ("base", *(f"full{n}" for n in range(N_EXPERTS))))
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            own = [dict(expert.named_parameters())[name] for expert in experts]
            parameter.copy_(parameter + sum(share * (values - parameter) for share, values in zip(SHARES, own)))
    return base


def entering(model: Any, layer: str, expert: int, rows: slice, *, by_token: bool) -> Tensor:
    """What enters a layer, float64; of tokens without padding."""
    inputs, seen = padded(prompts(expert)[rows]), []
    handle = model.get_submodule(layer).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    (values,) = seen
    return values[inputs["attention_mask"].bool()] if by_token else values


def with_one(values: Tensor) -> Tensor:
    return torch.cat([values, torch.ones(len(values), 1, dtype=values.dtype)], dim=1)


def closed_form(models: Path, kind: str, layer: str, merge: Any) -> Tensor:
    """Weight and bias, as a last column, by the equations of docs/function_space.md, one row for every prompt."""
    base, experts = model_of(models, kind, "base"), [model_of(models, kind, f"full{n}") for n in range(N_EXPERTS)]

    def matrix(model: Any) -> Tensor:
        module = model.get_submodule(layer)
        return torch.cat([module.weight, module.bias[:, None]], dim=1).detach()

    origin, own = matrix(base), [matrix(expert) for expert in experts]
    n_in = origin.shape[1] - 1
    deltas = [(weight - origin)[:, :n_in] for weight in own]
    grams = [share * KAPPA * d.T @ d / (d.T @ d).diagonal().mean() for share, d in zip(SHARES, deltas)]
    pulls = [gram @ d.T for gram, d in zip(grams, deltas)]
    eye = torch.eye(n_in, dtype=torch.float64)
    start = matrix(merge)
    start[:, :n_in] = origin[:, :n_in] + torch.linalg.solve(sum(grams) + 0.3 * KAPPA / N_EXPERTS * eye, sum(pulls)).T
    gram, pull = torch.zeros(n_in + 1, n_in + 1).double(), torch.zeros(n_in + 1, len(origin)).double()
    for number, expert in enumerate(experts):
        x = with_one(entering(merge, layer, number, FITTED, by_token=False))
        x_own = with_one(entering(expert, layer, number, FITTED, by_token=False))
        target = (x + x_own) / 2 @ own[number].T
        gram += SHARES[number] * x.T @ x / len(x)
        pull += SHARES[number] * x.T @ (target - x @ start.T) / len(x)
    mean = gram.diagonal()[:n_in].mean()
    system = gram + RIDGE * torch.diag(torch.cat([mean.expand(n_in), gram[-1:, -1]]))
    system[:n_in, :n_in] += mean * sum(grams)
    pull[:n_in] += mean * (sum(pulls) + sum(grams) @ (origin - start)[:, :n_in].T)
    return start + torch.linalg.solve(system, pull).T


def test_pooler_and_head_of_a_classifier_are_closed_forms_one_after_the_other(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(last_layers.LastLayersFit, "_keep_if_nearer", lambda *_: None)
    found = swept(models, "classifier").fit_last_layers()
    assert set(found.corrections) == {
        f"{n}.{p}" for n in ("bert.pooler.dense", "classifier") for p in ("weight", "bias")
    }
    assert not found.factors
    merge = linear_merge(models, "classifier")
    for layer in ("bert.pooler.dense", "classifier"):
        expected, module = closed_form(models, "classifier", layer, merge), merge.get_submodule(layer)
        with torch.no_grad():
            weight = module.weight + found.corrections[f"{layer}.weight"]
            bias = module.bias + found.corrections[f"{layer}.bias"]
            torch.testing.assert_close(torch.cat([weight, bias[:, None]], dim=1), expected, rtol=1e-4, atol=1e-4)
            module.weight.copy_(weight), module.bias.copy_(bias)  # the next layer gets what this one gives


@pytest.mark.parametrize("kind", ["classifier", "headless"])
@pytest.mark.parametrize("held_out", [FITTED, HELD_OUT], ids=["seen", "unseen"])
def test_a_layer_is_kept_if_it_gives_what_is_nearer_on_prompts_held_out(
    models: Path, kind: str, held_out: slice
) -> None:
    layer = "bert.pooler.dense" if kind == "classifier" else "pooler.dense"
    sweep = swept(models, kind, held_out)
    found = sweep.fit_last_layers()
    assert found.corrections.keys() == found.coefficients.keys() == sweep.fitted_outer().keys()

    merge, errors = linear_merge(models, kind), []
    module = merge.get_submodule(layer)
    start = torch.cat([module.weight, module.bias[:, None]], dim=1).detach()
    for weight in (start, closed_form(models, kind, layer, merge)):
        error = 0.0
        for number in range(N_EXPERTS):
            expert = model_of(models, kind, f"full{number}")
            with torch.no_grad():
                target = expert.get_submodule(layer)(entering(expert, layer, number, held_out, by_token=False))
            given = with_one(entering(merge, layer, number, held_out, by_token=False)) @ weight.T
            error += float((given - target).square().sum())
        errors.append(error)
    is_kept = f"{layer}.weight" in found.corrections
    assert is_kept == (errors[1] < errors[0])
    assert is_kept == (held_out == FITTED)  # both happen


def test_layers_are_found_by_running_them(models: Path) -> None:
    """Not those before the blocks, nor a head that is fitted by itself; and how many rows they have."""
    found = {}
    for kind in ("classifier", "headless"):
        sweep = swept(models, kind)
        prompt = sweep.state.batches[0].prompt(0)
        hidden = sweep.state.merged[0][:1]
        found[kind] = find_last_layers(sweep.state.model, sweep.outer(None), hidden, prompt)
    assert found["headless"] == [LastLayer("pooler.dense", is_by_token=False)]
    names = [(layer.name, layer.is_by_token) for layer in found["classifier"]]
    assert names == [("bert.pooler.dense", False), ("classifier", False)]

    config = GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=16, num_labels=3, pad_token_id=0)
    model = BlockwiseModel(GPT2ForSequenceClassification, config, torch.device("cpu"), torch.float32)
    weights = dict(GPT2ForSequenceClassification(config).named_parameters())
    outer = {name: weights[name].detach() for name in model.outer_parameters()}
    block = {name: weights[f"{model.blocks[0]}.{name}"].detach() for name in model.block_parameters(model.blocks[0])}
    inputs = {"input_ids": torch.arange(5)[None]}
    hidden, _ = model.begin(outer, block, inputs)
    assert find_last_layers(model, outer, hidden, inputs) == [
        LastLayer("transformer.ln_f", True),
        LastLayer("score", True),
    ]
