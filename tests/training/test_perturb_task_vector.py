"""The perturbation in real runs of `transformers.Trainer`: where the loss is taken, and that nothing else changes."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_frmerge import TaskVectorPerturbationCallback
from hf_frmerge.errors import ArgumentError

STEPS, EPSILON, RATE = 12, 0.5, 0.01
TARGET = torch.tensor([3.0, -1.0])
START = torch.tensor([1.0, 1.0])


class Quadratic(torch.nn.Module):
    """Loss `sum (w - target)^4`, and a record of the parameters that it was taken at."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(START.clone())
        self.frozen = torch.nn.Parameter(torch.ones(2), requires_grad=False)
        self.seen: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        self.seen.append(self.w.detach().clone())
        return {"loss": ((self.w - TARGET) ** 4).sum()}


class Recorder(TrainerCallback):
    """Parameters between steps."""

    def __init__(self) -> None:
        self.between: list[torch.Tensor] = []

    def on_step_end(self, args, state, control, **kwargs):
        self.between.append(kwargs["model"].w.detach().clone())


def train(folder: Path, model: torch.nn.Module, callbacks: list[TrainerCallback], **options) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=1, learning_rate=RATE, optim="sgd",
        lr_scheduler_type="constant", max_grad_norm=0, report_to="none", use_cpu=True, disable_tqdm=True,
        save_strategy="no", **options,
    )  # fmt: skip
    data = [{"x": torch.zeros(1), "labels": torch.zeros(1)} for _ in range(STEPS * 2)]
    trainer = Trainer(model, arguments, train_dataset=data, callbacks=callbacks)
    trainer.train()
    return trainer


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_loss_is_taken_at_the_perturbed_parameters_and_the_step_is_made_from_the_others(
    tmp_path: Path, accumulation: int
) -> None:
    # What the Trainer alone makes of a gradient: of two passes the lowest version takes half of their mean.
    alone = Recorder()
    train(tmp_path / "alone", Quadratic(), [alone], gradient_accumulation_steps=accumulation)
    rates = (START - alone.between[0]) / (4 * (START - TARGET) ** 3)
    model, recorder = Quadratic(), Recorder()
    train(
        tmp_path, model, [recorder, TaskVectorPerturbationCallback(EPSILON)],
        gradient_accumulation_steps=accumulation,
    )  # fmt: skip
    seen, between = [w.double() for w in model.seen], [START.double(), *(w.double() for w in recorder.between)]
    assert len(seen) == STEPS * accumulation
    signs = []
    for step, (before, after) in enumerate(pairwise(between)):
        passes = seen[step * accumulation : (step + 1) * accumulation]
        choices = [before + sign * EPSILON * (before - START) for sign in (-1, 0, 1)]
        distances = [max(float((place - choice).abs().max()) for place in passes) for choice in choices]
        assert min(distances) < 1e-5
        signs.append(int(np.argmin(distances)) - 1)
        gradient = 4 * (passes[0] - TARGET) ** 3
        torch.testing.assert_close(after, before - rates * gradient, rtol=1e-4, atol=1e-5)
    assert set(signs[1:]) == {-1, 0, 1}  # the first step has learned nothing yet
    torch.testing.assert_close(model.w.double(), between[-1], rtol=0, atol=0)
    assert torch.equal(model.frozen, torch.ones(2))


def test_lora_layers_are_scaled_and_scaled_back(tmp_path: Path) -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = torch.nn.Linear(4, 4)
            self.scalings: list[float] = []

        def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
            self.scalings.append(self.lin.scaling["default"])
            return {"loss": self.lin(torch.ones(1, 4)).square().mean()}

    net = Net()
    model = get_peft_model(net, LoraConfig(r=2, lora_alpha=6, target_modules=["lin"]))
    frozen = net.lin.base_layer.weight.detach().clone()
    train(tmp_path, model, [TaskVectorPerturbationCallback(EPSILON)])
    assert {round(scaling, 6) for scaling in net.scalings} == {1.5, 3.0, 4.5}
    assert net.lin.scaling["default"] == 3.0
    assert torch.equal(net.lin.base_layer.weight, frozen)


def test_the_same_run_twice_is_the_same(tmp_path: Path) -> None:
    models = [Quadratic(), Quadratic()]
    for model in models:
        train(tmp_path, model, [TaskVectorPerturbationCallback(EPSILON)])
    assert all(torch.equal(a, b) for a, b in zip(models[0].seen, models[1].seen, strict=True))


def test_a_resumed_run_needs_the_origin() -> None:
    from transformers import TrainerControl, TrainerState

    state, args = TrainerState(global_step=3), TrainingArguments(report_to="none")
    model = Quadratic()
    with pytest.raises(ArgumentError, match="Pass them to TaskVectorPerturbationCallback as `origin`"):
        TaskVectorPerturbationCallback().on_train_begin(args, state, TrainerControl(), model=model)
    callback = TaskVectorPerturbationCallback(origin=dict(Quadratic().named_parameters()))  # what the message says
    model.w.data += 2.0
    callback.on_train_begin(args, state, TrainerControl(), model=model)
    places = set()
    for step in range(20):
        state.global_step = step
        callback.on_step_begin(args, state, TrainerControl(), model=model)
        places.add(tuple((model.w - START).tolist()))
        callback.on_pre_optimizer_step(args, state, TrainerControl(), model=model)
        assert torch.equal(model.w, START + 2.0)
    assert places == {(1.0, 1.0), (2.0, 2.0), (3.0, 3.0)}


@pytest.mark.parametrize("epsilon", [0.0, 1.0, float("nan")])
def test_epsilon_is_a_share(epsilon: float) -> None:
    with pytest.raises(ArgumentError, match="above 0 and below 1"):
        TaskVectorPerturbationCallback(epsilon)
