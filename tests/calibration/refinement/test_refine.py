"""Refinements against transformers' whole models: loss and gradient of a step, and what comes out of all steps."""

from __future__ import annotations

import json
import re
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
import transformers
from jsonschema import Draft202012Validator
from torch.func import functional_call

from hf_frmerge.calibration import calibrate
from hf_frmerge.calibration.blocks.blockwise_model import Outputs
from hf_frmerge.calibration.blocks.streams import Batch
from hf_frmerge.calibration.held_out import distances, forms_of
from hf_frmerge.calibration.prompts.read_prompts import read_prompts, split_prompts
from hf_frmerge.calibration.refinement.corrected_merge import corrections_to_refine, read_start
from hf_frmerge.calibration.refinement.expert_updates import coefficients_to_refine
from hf_frmerge.calibration.refinement.losses import row_losses
from hf_frmerge.calibration.refinement.refine import Refinement, RefineOptions, rate_at
from hf_frmerge.calibration.sweep import FittedBlock
from hf_frmerge.errors import ArgumentError
from hf_frmerge.merging.record.manifest import SCHEMA_FILE, read_manifest
from hf_frmerge.provenance.merge_again import reproduce
from hf_frmerge.provenance.verify import verify
from tests.refinement_models import (
    MODELS,
    N_EXPERTS,
    VOCABULARY,
    expert_weights,
    load_whole,
    merger,
    padded,
    plain_losses,
    prompts,
    some_corrections,
    swept,
)


@pytest.mark.parametrize("loss", ["kl", "fisher_rao"])
@pytest.mark.parametrize(
    ("kind", "form", "expert"),
    [(kind, form, "full") for kind in MODELS for form in ("dense", "low_rank", "table")]
    + [("llama", "table", "lora"), ("llama", "table", "mixed")],
)
def test_loss_and_gradient_are_those_of_the_whole_models(
    models: Path, kind: str, form: str, expert: str, loss: str
) -> None:
    sweep = swept(models, kind, expert)
    corrections = some_corrections(sweep, form)
    options = RefineOptions(1, partial(row_losses, loss=loss), 1e-3, batch_size=1000, seed=0)
    refinement = Refinement(sweep, read_start(sweep.state), corrections, options)
    n_steps = 3  # as many as there are batches: one of each takes part in a step
    value = sum(refinement.take_gradients(step) for step in range(n_steps)) / n_steps

    model_class = MODELS[kind][0]
    weights = {name: values.double() for name, values in read_start(sweep.state).items()}
    leaves = {name: values.double().requires_grad_() for name, values in corrections.items()}
    base = {n: p.double() for n, p in model_class.from_pretrained(models / kind / "base").named_parameters()}
    experts = [expert_weights(models, kind, expert, number) for number in range(N_EXPERTS)]
    for name, leaf in leaves.items():
        parameter, _, factor = name.rpartition(".")
        if factor == "coefficients":
            for column, of_expert in zip(leaf.T, experts, strict=True):
                scale = column.reshape(-1, *[1] * (base[parameter].ndim - 1))
                weights[parameter] = weights[parameter] + scale * (of_expert[parameter] - base[parameter])
        elif factor == "up":
            weights[parameter] = weights[parameter] + leaf @ leaves[f"{parameter}.down"]
        elif factor != "down":
            weights[name] = weights[name] + leaf
    model = model_class.from_pretrained(models / kind / "base", dtype=torch.float64).eval()
    expected = torch.zeros((), dtype=torch.float64)
    for number, share in enumerate((0.25, 0.75)):
        inputs = padded(prompts(number)[:12])
        with torch.no_grad():
            target = functional_call(model, experts[number], (), inputs)
        merged = functional_call(model, weights, (), inputs)
        expected = expected + share * plain_losses(kind, merged, target, inputs, loss).mean()
    expected.backward()
    assert value == pytest.approx(float(expected.detach()), rel=1e-4)
    for name, leaf in leaves.items():
        reference = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad  # the pooler gives no hidden states
        gradient = refinement.values[name].grad
        assert gradient is not None
        scale = float(reference.abs().max())
        torch.testing.assert_close(gradient.double() / n_steps, reference, rtol=1e-3, atol=1e-3 * scale + 1e-8)


@pytest.mark.parametrize("teacher", ["expert", "barycentre"])
def test_prompts_that_were_written_count_token_by_token_as_the_given_ones(models: Path, teacher: str) -> None:
    sweep = swept(models, "llama")
    written = [
        Batch(number, padded(prompts(number, 24)[16:]), is_held_out=False) for number in range(N_EXPERTS)
    ]  # fmt: skip
    options = RefineOptions(
        1, partial(row_losses, loss="kl"), 1e-3, batch_size=1000, seed=0, is_barycentre=teacher == "barycentre"
    )
    corrections = some_corrections(sweep, "dense")
    refinement = Refinement(sweep, read_start(sweep.state), corrections, options, written)
    n_steps = 4  # three batches of given prompts, and one of written ones
    value = sum(refinement.take_gradients(step) for step in range(n_steps)) / n_steps

    model = load_whole(models, models / "llama" / "base", "llama").double()
    experts = [expert_weights(models, "llama", "full", number) for number in range(N_EXPERTS)]
    start = read_start(sweep.state)
    merged = {name: values.double() + corrections.get(name, torch.zeros(())) for name, values in start.items()}
    expected = 0.0
    for number, share in enumerate((0.25, 0.75)):
        inputs = padded([*prompts(number)[:12], *prompts(number, 24)[16:]])
        mask = inputs["attention_mask"].bool()
        with torch.no_grad():
            q, *ps = (functional_call(model, w, (), inputs).logits[mask].softmax(-1) for w in (merged, *experts))
        p = ps[number] if teacher == "expert" else barycentre(ps, (0.25, 0.75))
        expected += share * float((p * (p / q).log()).sum(-1).mean())
    assert value == pytest.approx(expected, rel=1e-4)


def barycentre(predictions: list[torch.Tensor], shares: tuple[float, float]) -> torch.Tensor:
    """Of two predictions: the point of the great circle between their square roots at the second one's share."""
    one, other = (p.sqrt() for p in predictions)
    angle = torch.arccos((one * other).sum(-1, keepdim=True).clamp(max=1))
    return ((torch.sin(shares[0] * angle) * one + torch.sin(shares[1] * angle) * other) / torch.sin(angle)).square()


def test_what_begins_at_the_start_is_the_start(models: Path, tmp_path: Path) -> None:
    """With a vanishing step size the first point that is judged is where it began, and gradients reach all factors."""
    sweep = swept(models, "llama")
    start = read_start(sweep.state)
    blocks = []
    for name in sweep.state.model.blocks:
        fitted = {key: torch.randn(values.shape) for key, values in sweep.state.model.block(name).named_parameters()}
        factors = {k: (torch.randn(len(v), 2), torch.randn(2, v.shape[1])) for k, v in fitted.items() if v.ndim == 2}
        blocks.append(FittedBlock(fitted, factors, {k: torch.randn(len(v), N_EXPERTS) for k, v in fitted.items()}))
    expected = distances(sweep, forms_of(sweep))["start"]
    for form in ("dense", "low_rank", "table"):
        if form == "table":
            corrections = coefficients_to_refine(sweep.state, start, blocks, from_fit=False)
        else:
            corrections = corrections_to_refine(sweep.state, start, blocks, form, from_fit=False)
        options = RefineOptions(1, partial(row_losses, loss="kl"), 1e-12, batch_size=4, seed=0)
        refinement = Refinement(sweep, start, corrections, options)
        best = refinement.run(tmp_path / form, silent=True)
        assert best is not None and best.distances == pytest.approx(expected, rel=1e-5)
        ups = [values.grad for name, values in refinement.values.items() if not name.endswith(".down")]
        assert ups and all(bool(gradient.any()) for gradient in ups if gradient is not None)
    only = corrections_to_refine(sweep.state, start, blocks, "low_rank", factors_only=True)
    assert all(name.endswith((".up", ".down")) for name in only)
    for name, (up, down) in ((f"{sweep.state.model.blocks[0]}.{k}", pair) for k, pair in blocks[0].factors.items()):
        torch.testing.assert_close(only[f"{name}.up"] @ only[f"{name}.down"], up @ down, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(only[f"{name}.up"].norm(dim=0), only[f"{name}.down"].norm(dim=1))


@pytest.mark.parametrize("form", ["dense", "table"])
def test_a_sharpness_aware_step_takes_the_gradients_uphill(models: Path, form: str) -> None:
    """At the corrections plus rho g / |g|, over all of them together; and it goes from where they were."""
    sweep, rho = swept(models, "llama"), 0.3
    start, corrections = read_start(sweep.state), some_corrections(sweep, form)
    options = RefineOptions(1, partial(row_losses, loss="kl"), 1e-3, batch_size=8, seed=0, rho=rho)
    found, plain = (Refinement(sweep, start, corrections, options) for _ in range(2))
    found.take_gradients(0)
    found.take_gradients_uphill(0)
    lower = plain.take_gradients(0)
    gradients = {name: tensor.grad.double() for name, tensor in plain.values.items() if tensor.grad is not None}
    norm = float(sum(gradient.square().sum() for gradient in gradients.values())) ** 0.5
    uphill = {name: (corrections[name] + rho / norm * gradient).float() for name, gradient in gradients.items()}
    there = Refinement(sweep, start, uphill, options)
    assert there.take_gradients(0) > lower
    for name, tensor in found.values.items():
        expected = there.values[name].grad
        assert expected is not None and tensor.grad is not None
        torch.testing.assert_close(tensor.grad, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()) + 1e-8)
        assert torch.equal(tensor, corrections[name])


def test_losses_of_equal_outputs_are_flat() -> None:
    torch.manual_seed(0)
    values = torch.randn(4, 9)
    for is_logits in (True, False):
        for loss in ("kl", "reverse_kl", "jsd", "fisher_rao"):
            merged = values.clone().requires_grad_()
            losses = row_losses(Outputs(merged, is_logits), Outputs(values, is_logits), loss)
            losses.sum().backward()
            assert float(losses.detach().abs().max()) < 1e-5
            assert merged.grad is not None and float(merged.grad.abs().max()) < 1e-5


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_divergences_are_those_of_scipy(beta: float) -> None:
    torch.manual_seed(0)
    q_RV, p_RV = torch.randn(2, 5, 9, dtype=torch.float64)
    outputs = Outputs(q_RV, True), Outputs(p_RV, True)
    q, p = (torch.softmax(values, -1).numpy() for values in (q_RV, p_RV))
    mixed = beta * p + (1 - beta) * q
    expected = {
        "kl": scipy.stats.entropy(p, q, axis=1),
        "reverse_kl": scipy.stats.entropy(q, p, axis=1),
        "jsd": beta * scipy.stats.entropy(p, mixed, axis=1) + (1 - beta) * scipy.stats.entropy(q, mixed, axis=1),
    }
    for loss, values in expected.items():
        np.testing.assert_allclose(row_losses(*outputs, loss, beta).numpy(), values, rtol=1e-12)


@pytest.mark.parametrize("steps", [1, 3, 5, 40])
def test_the_learning_rate_is_that_of_transformers_one_step_earlier_in_the_warm_up(steps: int) -> None:
    """Which spends its first step on a rate of zero."""
    optimizer = torch.optim.SGD([torch.zeros(1)], 1.0)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, 5, max(steps, 6))
    (rate,) = schedule.lr_lambdas
    for step in range(steps):
        late = min(1.0, (steps - step) / max(1, steps - 5))
        expected = min(rate(min(step + 1, 5)) if step < 5 else rate(step), late)
        assert rate_at(step, steps) == pytest.approx(expected)
    assert rate_at(steps - 1, steps) > 0


@pytest.mark.parametrize(
    ("kind", "expert", "form", "options"),
    [
        ("llama", "full", "dense", {"refine_loss": "fisher_rao"}),
        ("llama", "lora", "low_rank", {"adapter_output": "auto", "refine_learning_rate": 1e-3}),
        ("tied", "full", "low_rank", {"refine_learning_rate": 3e-3}),
        ("headless", "full", "dense", {"refine_learning_rate": 1e-3}),
        ("llama", "full", "table", {"space": "deltas"}),
        ("llama", "lora", "table", {"adapter_output": "merged", "refine_rho": 0.02}),
        (
            "llama",
            "full",
            "low_rank",
            {"refine_loss": "reverse_kl", "refine_lmbda": 0.5, "refine_learning_rate": 3e-3},
        ),
        ("llama", "full", "dense", {"refine_written_samples": 40, "refine_learning_rate": 1e-3}),
    ],
)
def test_a_refined_merge_is_closer_and_its_record_checks(
    models: Path, tmp_path: Path, kind: str, expert: str, form: str, options: dict[str, Any]
) -> None:
    wanted = {} if options.get("adapter_output") == "auto" else {"calibration_form": form}
    merging = merger(models, tmp_path / "out", kind, expert, refine_steps=12, **wanted, **options)
    merging.merge()
    record = read_manifest(tmp_path / "out").calibration
    assert record is not None and record.refinement is not None and record.form == form
    assert record.is_refined and record.refinement.began_from in (form, "start")
    assert record.refinement.loss == ("angle" if kind == "headless" else options.get("refine_loss", "kl"))
    assert record.mean_distance("refined") < min(record.mean_distance(form), record.mean_distance("start"))

    check_schema(tmp_path / "out")
    report = verify(str(tmp_path / "out"))
    assert report.ok, report.problems
    assert not reproduce(str(tmp_path / "out")).differences

    # The distances that are recorded are those of the model that is written.
    args = merging.args
    data = dict(merging.calibration_dataset)
    read = read_prompts(
        data, None, experts=list(data), n_samples=64, max_length=12, seed=args.seed, vocab_size=VOCABULARY,
        packing=kind != "headless",
    )  # fmt: skip
    _, held_out = split_prompts(read, 1 / 8, args.seed)
    merged = load_whole(models, tmp_path / "out", kind)
    for own, distance in zip(held_out, record.distances["refined"], strict=True):
        inputs = padded([ids.tolist() for ids in own.token_ids])
        teacher = load_whole(models, models / kind / f"{expert}{own.expert}", kind)
        with torch.no_grad():
            found = plain_losses(kind, merged(**inputs), teacher(**inputs), inputs, "fisher_rao")
        assert distance == pytest.approx(float(found.mean()), rel=0.1)  # matrices in bfloat16


def check_schema(out: Path) -> None:
    schema = json.loads(files("hf_frmerge.merging.record").joinpath(SCHEMA_FILE).read_text(encoding="utf-8"))
    Draft202012Validator(schema).validate(json.loads((out / "merge_manifest.json").read_text()))


def written_file(form: str) -> str:
    """Where a form is kept."""
    return "merge_coefficients.safetensors" if form == "table" else "merge_corrections.safetensors"


@pytest.mark.parametrize(
    ("form", "rate", "steps"),
    [("dense", 1.0, 3), ("dense", 1e30, 3), ("dense", 1e30, 1), ("table", 30.0, 3), ("table", 1e30, 3)],
)
def test_what_is_worse_than_the_fit_is_left_out(
    models: Path, tmp_path: Path, form: str, rate: float, steps: int, caplog: pytest.LogCaptureFixture
) -> None:
    # From the base alone, so that the fit has something to gain.
    options: dict[str, Any] = {"calibration_form": form, "adapter_output": "merged", "scale": 0.0}
    merger(models, tmp_path / "fit", "llama", "lora", **options).merge()
    options |= {"refine_steps": steps, "refine_learning_rate": rate}
    merger(models, tmp_path / "out", "llama", "lora", **options).merge()
    record = read_manifest(tmp_path / "out").calibration
    assert record is not None and record.refinement is not None and record.refinement.best_step == 0
    assert not record.is_refined and record.form == record.refinement.began_from == form
    check_schema(tmp_path / "out")
    for file in ("model.safetensors", written_file(form)):
        assert (tmp_path / "fit" / file).read_bytes() == (tmp_path / "out" / file).read_bytes()
    if rate == 1e30:
        assert "refined" not in record.distances and "values that are not finite" in caplog.text
    else:
        assert record.mean_distance("refined") >= record.mean_distance(form)
    assert verify(str(tmp_path / "out")).ok


@pytest.mark.parametrize("wanted", ["table", "low_rank"])
def test_a_fit_without_gain_is_refined_from_the_start_in_the_form_that_is_asked_for(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: str
) -> None:
    monkeypatch.setattr(calibrate, "choose_form", lambda *_: "start")
    options = {"space": "deltas", "calibration_form": wanted, "refine_learning_rate": 3e-3}
    merger(models, tmp_path / "out", refine_steps=6, **options).merge()
    record = read_manifest(tmp_path / "out").calibration
    assert record is not None and record.refinement is not None
    assert record.form == wanted and record.refinement.began_from == "start"
    assert record.mean_distance("refined") < record.mean_distance("start")
    assert (tmp_path / "out" / written_file(wanted)).exists()
    assert verify(str(tmp_path / "out")).ok


class Killed(Exception):
    pass


@pytest.mark.parametrize(
    ("form", "further"),
    [
        ("dense", {}),
        ("low_rank", {"refine_lmbda": 0.5, "refine_loss": "reverse_kl"}),
        ("table", {"refine_teacher": "barycentre"}),
        ("dense", {"refine_written_samples": 20}),
    ],
)
def test_an_interrupted_refinement_goes_on_to_the_same_bits(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, further: dict[str, Any]
) -> None:
    out, whole, take = tmp_path / "out", tmp_path / "whole", Refinement.take_gradients
    options = {
        "calibration_form": form, "refine_steps": 14, "refine_learning_rate": 1e-3, "refine_rho": 0.01,
        "space": "deltas", **further,
    }  # fmt: skip
    taken: list[int] = []

    def take_gradients(self: Refinement, step: int) -> float:
        taken.append(step)
        if step == 12 and not (tmp_path / "killed").exists():
            (tmp_path / "killed").touch()
            raise Killed
        return take(self, step)

    monkeypatch.setattr(Refinement, "take_gradients", take_gradients)
    with pytest.raises(Killed):
        merger(models, out, **options).merge()
    assert not (out / "config.json").exists()
    taken.clear()
    merger(models, out, **options).merge(resume_from_checkpoint=True)
    # The state was kept after ten steps; gradients of a sharpness-aware step are taken twice.
    assert taken == [10, 10, 11, 11, 12, 12, 13, 13]
    merger(models, whole, **options).merge()
    record = read_manifest(out).calibration
    assert record is not None and record.is_refined
    for name in ("model.safetensors", written_file(form)):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name


def test_a_refinement_needs_prompts_and_is_named_on_the_card(models: Path, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="calibration_dataset"):
        merger(models, tmp_path / "out", calibration=None, refine_steps=2).merge()
    with pytest.raises(ArgumentError, match="at least 0"):
        merger(models, tmp_path / "out", refine_steps=-1)
    assert not (tmp_path / "out").exists()
    merger(models, tmp_path / "out", calibration=None).merge()  # left out, as it says
    merger(models, tmp_path / "refined", refine_steps=2, calibration_form="dense", refine_learning_rate=1e-3).merge()
    card = (tmp_path / "refined/README.md").read_text()
    assert "--refine-steps 2" in card and "refine_steps=2" in card
    assert re.search(r"and refined all layers together|then trained to predict", card)
