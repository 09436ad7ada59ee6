"""Estimate the diagonal of a model's Fisher information on prompts: one number for every weight."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hf_frmerge.errors import ArgumentError, NonFiniteError
from hf_frmerge.fisher.scores import run_scores


def diagonal_fisher(
    model: torch.nn.Module,
    prompts: Iterable[NDArray[np.int64]],
    parameters: Collection[str],
    *,
    labels: str = "sampled",
    seed: int,
) -> tuple[dict[str, Tensor], int]:
    r"""
    Estimate the diagonal Fisher information of some parameters, \(\frac1n \sum g_j^2\) over all scores.

    One copy of these parameters is in memory beside the model: a gradient is squared, added up and dropped as soon as
    it is there.

    Args:
        model: Model of transformers that gives logits, `(1, T, V)` or `(1, V)`; only the parameters' `requires_grad`
            is changed.
        prompts: Token ids `(T,)` of every prompt.
        parameters: Names of the parameters.
        labels: `"sampled"`, `"exact"` or `"empirical"`; see `scores`.
        seed: Of what is drawn.

    Returns:
        Parameter -> its Fisher information, float32, as a mean over predictions; and the number of predictions.

    Raises:
        ArgumentError: If the model has no such parameters, gives no probabilities, or the labels cannot be had.
        NonFiniteError: If a gradient is not finite.
    """
    own = dict(model.named_parameters())
    missing = sorted(set(parameters) - own.keys())
    if missing:
        raise ArgumentError(
            f"{type(model).__name__} has no parameter {missing[0]!r}, which the models it is merged with have. Merge "
            "experts of one class."
        )
    sums = {name: torch.zeros_like(own[name], dtype=torch.float32) for name in parameters}
    for name, parameter in own.items():
        parameter.requires_grad_(name in sums)
    hooks = [own[name].register_post_accumulate_grad_hook(_add_square(total)) for name, total in sums.items()]
    try:
        n_predictions = run_scores(model, prompts, labels=labels, seed=seed)
    finally:
        for hook in hooks:
            hook.remove()
    for name, total in sums.items():
        if not total.isfinite().all():
            raise NonFiniteError(f"The gradient of {name!r} is not finite. Leave out the prompts that cause it.")
    return {name: total / n_predictions for name, total in sums.items()}, n_predictions


def _add_square(total: Tensor) -> Callable[[Tensor], None]:
    """Return a hook that adds the square of a parameter's gradient to `total`, and frees the gradient."""

    def add(parameter: Tensor) -> None:
        assert parameter.grad is not None
        total.add_(parameter.grad.float().square())
        parameter.grad = None

    return add
