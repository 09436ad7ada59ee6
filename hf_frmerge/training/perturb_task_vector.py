"""`TaskVectorPerturbationCallback`: training that prepares a model for being merged (P&M, arXiv 2505.22389)."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_frmerge.errors import ArgumentError


class TaskVectorPerturbationCallback(TrainerCallback):
    r"""
    Train on the loss at \(\theta\), \(\theta + \varepsilon\Delta\) or \(\theta - \varepsilon\Delta\), a third of the
    steps each, with \(\Delta\) what was learned so far (Perturb-and-Merge, arXiv 2505.22389).

    On average this adds \((\varepsilon^2/3)\,\Delta^T H \Delta\) to the loss, so that the model stays good when its
    task vector is scaled, as a merge does. It takes no further passes. The parameters are changed before the forward
    pass of a step and set back, bit for bit, before the optimizer steps; what is saved is never perturbed. Which of
    the three it is follows from seed and step, the same on every process and after a resume. Of a model with LoRA
    layers their scaling is changed, which takes no memory; of others two copies of the trained parameters are kept.

    Args:
        epsilon (`float`, *optional*, defaults to 0.5):
            How far; the paper's value.
        origin (`Mapping[str, torch.Tensor]`, *optional*):
            Parameters before the task, by name. By default those at the start of the training; a run that is resumed,
            and has no LoRA layers, needs them.

    Raises:
        ArgumentError: If `epsilon` is not in (0, 1).
    """

    def __init__(self, epsilon: float = 0.5, origin: Mapping[str, torch.Tensor] | None = None) -> None:
        if not 0 < epsilon < 1:
            raise ArgumentError(f"`epsilon` must be above 0 and below 1, but got {epsilon}.")
        self.epsilon, self.origin = epsilon, origin
        self._start: dict[str, torch.Tensor] = {}
        self._kept: dict[str, torch.Tensor] = {}  # parameters of a step that is perturbed
        self._scalings: list[tuple[dict[str, float], dict[str, float]]] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep the parameters before the task."""
        self._start = {}
        model = kwargs["model"]
        if _lora_layers(model):
            return
        if state.global_step and self.origin is None:
            raise ArgumentError(
                "A resumed training no longer has the parameters before the task. Pass them to "
                "TaskVectorPerturbationCallback as `origin`: dict(model.named_parameters()) of the model that it "
                "began with."
            )
        for name, parameter in _trained(model):
            before = parameter if self.origin is None else self.origin[name]
            self._start[name] = before.detach().to(parameter.device, parameter.dtype, copy=True)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Perturb the parameters for the passes of this step."""
        factor = self.epsilon * random.Random(f"{args.seed}-{state.global_step}").choice((-1, 0, 1))
        if not factor:
            return
        model = kwargs["model"]
        for layer in _lora_layers(model):
            self._scalings.append((layer.scaling, dict(layer.scaling)))
            layer.scaling.update({name: value * (1 + factor) for name, value in layer.scaling.items()})
        if self._scalings:
            return
        with torch.no_grad():
            for name, parameter in _trained(model):
                self._kept[name] = parameter.detach().clone()
                parameter.lerp_(self._start[name], -factor)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the parameters back to what the optimizer is to change."""
        for scaling, before in self._scalings:
            scaling.update(before)
        self._scalings = []
        with torch.no_grad():
            for name, parameter in _trained(kwargs["model"]) if self._kept else ():
                parameter.copy_(self._kept[name])
        self._kept = {}


def _trained(model: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def _lora_layers(model: torch.nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, LoraLayer)]
