"""The barycentre as a teacher, against fixed points over whole vectors in float64 and transformers' whole models."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from hf_frmerge.calibration.blocks.blockwise_model import Outputs
from hf_frmerge.calibration.refinement.corrected_merge import read_start
from hf_frmerge.calibration.refinement.losses import row_losses
from hf_frmerge.calibration.refinement.refine import Refinement, RefineOptions
from hf_frmerge.calibration.refinement.teachers import barycentre_of
from hf_frmerge.merging.record.manifest import read_manifest
from hf_frmerge.provenance.verify import verify
from tests.refinement_models import (
    MODELS,
    N_EXPERTS,
    assert_loss_and_gradients,
    expert_weights,
    merger,
    padded,
    prompts,
    some_corrections,
    swept,
)

SHARES = (0.25, 0.75)


def plain_karcher(points: list[Tensor], weights: tuple[float, ...]) -> Tensor:
    """Karcher mean of unit vectors by steps along the sphere, float64, one row at a time."""
    rows = []
    for vectors in zip(*(values.double() for values in points), strict=True):
        mean = sum(weight * vector for weight, vector in zip(weights, vectors, strict=True))
        mean = mean / mean.norm()
        for _ in range(300):
            step = torch.zeros_like(mean)
            for weight, vector in zip(weights, vectors, strict=True):
                across = vector - (vector @ mean) * mean
                angle = torch.atan2(across.norm(), vector @ mean)
                if across.norm() > 0:
                    step = step + weight * angle * across / across.norm()
            if (size := step.norm()) < 1e-15:
                break
            mean = torch.cos(size) * mean + torch.sin(size) * step / size
            mean = mean / mean.norm()
        rows.append(mean)
    return torch.stack(rows)


@pytest.mark.parametrize("spread", [1e-3, 1.0, 12.0])
def test_the_barycentre_of_predictions(spread: float) -> None:
    """Of experts that nearly agree, and of such that hardly have an outcome in common."""
    torch.manual_seed(0)
    logits = torch.randn(5, 50) + spread * torch.randn(3, 5, 50)
    weights = (0.2, 0.5, 0.3)
    found = barycentre_of([Outputs(values, is_logits=True) for values in logits], weights)
    expected = plain_karcher([torch.softmax(values.double(), -1).sqrt() for values in logits], weights).square()
    assert found.is_logits
    torch.testing.assert_close(torch.softmax(found.values.double(), -1), expected, rtol=2e-5, atol=1e-7)
    torch.testing.assert_close(found.values.double().exp(), expected, rtol=2e-5, atol=1e-7)  # they are logarithms


def test_the_barycentre_of_hidden_states_is_that_of_their_directions() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(7, 16) + torch.randn(2, 7, 16)
    found = barycentre_of([Outputs(values, is_logits=False) for values in hidden], SHARES)
    directions = [torch.nn.functional.normalize(values, dim=-1) for values in hidden]
    torch.testing.assert_close(found.values.double(), plain_karcher(directions, SHARES), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("lone", [False, True])
def test_equal_experts_teach_what_they_are(lone: bool) -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, 30)
    weights = (1.0, 0.0) if lone else SHARES
    other = torch.randn(4, 30) if lone else logits
    found = barycentre_of([Outputs(logits, is_logits=True), Outputs(other, is_logits=True)], weights)
    torch.testing.assert_close(found.values, torch.log_softmax(logits, -1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kind", "expert"), [("llama", "full"), ("llama", "lora"), ("classifier", "full")])
def test_loss_and_gradient_are_those_of_the_whole_models(models: Path, kind: str, expert: str) -> None:
    """On the prompts of each expert the barycentre of all, by the weights of the merge."""
    sweep = swept(models, kind, expert)
    corrections = some_corrections(sweep, "dense")
    options = RefineOptions(1, partial(row_losses, loss="kl"), 1e-3, 1000, seed=0, is_barycentre=True)
    refinement = Refinement(sweep, read_start(sweep.state), corrections, options)
    n_steps = 3  # as many as there are batches: one of each expert takes part in a step
    value = sum(refinement.take_gradients(step) for step in range(n_steps)) / n_steps

    leaves = {name: values.double().requires_grad_() for name, values in corrections.items()}
    weights = {name: values.double() for name, values in read_start(sweep.state).items()}
    weights |= {name: weights[name] + leaf for name, leaf in leaves.items()}
    model = MODELS[kind][0].from_pretrained(models / kind / "base", dtype=torch.float64).eval()
    experts = [expert_weights(models, kind, expert, number) for number in range(N_EXPERTS)]
    total = torch.zeros((), dtype=torch.float64)
    for number, share in enumerate(SHARES):
        inputs = padded(prompts(number)[:12])
        rows = inputs["attention_mask"].bool() if kind == "llama" else slice(None)

        def predict(of: dict[str, Tensor], inputs: Any = inputs, rows: Any = rows) -> Tensor:
            return torch.softmax(functional_call(model, of, (), inputs).logits[rows], -1)

        with torch.no_grad():
            target = plain_karcher([predict(of).sqrt() for of in experts], SHARES).square()
        total = total + share * (target * (target / predict(weights)).log()).sum(-1).mean()
    assert_loss_and_gradients(refinement, value, n_steps, total, leaves)


def test_a_merge_learns_it_and_is_judged_by_the_experts(models: Path, tmp_path: Path) -> None:
    """What is recorded stays the distance to each expert's own predictions, as without the refinement."""
    options: dict[str, Any] = {"calibration_form": "dense", "scale": 0.0, "space": "deltas"}
    merger(models, tmp_path / "fit", **options).merge()
    options |= {"refine_steps": 12, "refine_teacher": "barycentre", "refine_learning_rate": 1e-3}
    merger(models, tmp_path / "out", **options).merge()
    fit, out = (read_manifest(tmp_path / name).calibration for name in ("fit", "out"))
    assert fit is not None and out is not None and out.distances["dense"] == fit.distances["dense"]
    assert "refined" in out.distances and read_manifest(tmp_path / "out").arguments["refine_teacher"] == "barycentre"
    assert verify(str(tmp_path / "out")).ok
