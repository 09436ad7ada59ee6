r"""
Estimate the diagonal of a model's Fisher information on prompts.

\(F_j = \frac1n \sum_t E_{y \sim p_t} [(\partial \log p_t(y) / \partial \theta_j)^2]\), with \(p_t\) one of the n
predictions: of a language model the next token after every token of the prompts, of a classifier the class of every
prompt. Labels are drawn from the model's own predictions. With those of the text the same mean would be what is called
the empirical Fisher information, which is another quantity wherever the model is unsure.

Of each prompt one label is drawn for every prediction, and the gradient of the *sum* of their log probabilities is
squared. The gradients of drawn labels are independent given the text and zero in the mean, so what the square of a sum
has more than the sum of squares is zero in the mean, too: the estimate is unbiased, at one backward pass a prompt.
"""

# Shape suffixes: T = predictions, V = vocabulary or classes.

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hf_frmerge.errors import ArgumentError, NonFiniteError


def diagonal_fisher(
    model: torch.nn.Module, prompts: Iterable[NDArray[np.int64]], parameters: Collection[str], *, seed: int
) -> tuple[dict[str, Tensor], int]:
    """
    Estimate the diagonal Fisher information of some parameters.

    One copy of these parameters is in memory beside the model: a gradient is squared, added up and dropped as soon as
    it is there.

    Args:
        model: Model of transformers that gives logits, `(1, T, V)` or `(1, V)`; only the parameters' `requires_grad`
            is changed.
        prompts: Token ids `(T,)` of every prompt.
        parameters: Names of the parameters.
        seed: Of the labels that are drawn.

    Returns:
        Parameter -> its Fisher information, float32, as a mean over predictions; and the number of predictions.

    Raises:
        ArgumentError: If the model has no such parameters, or gives no probabilities.
        NonFiniteError: If a gradient is not finite.
    """
    model_any: Any = model
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
    generator = torch.Generator(model_any.device).manual_seed(seed)
    n_predictions = 0
    model.eval()
    try:
        for ids in prompts:
            output = model_any(input_ids=torch.from_numpy(ids)[None].to(model_any.device))
            log_probs_TV = _log_probs(model, output)
            labels_T1 = torch.multinomial(log_probs_TV.detach().exp(), 1, generator=generator)
            log_probs_TV.gather(1, labels_T1).sum().backward()
            n_predictions += len(log_probs_TV)
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


def _log_probs(model: torch.nn.Module, output: Any) -> Tensor:
    """Return the log probabilities `(T, V)` of all predictions."""
    logits: Tensor | None = getattr(output, "logits", None)
    if logits is None or logits.shape[-1] < 2:
        raise ArgumentError(
            f"{type(model).__name__} gives no probabilities, and Fisher information is about these. Choose another "
            "method, such as regmean."
        )
    if not logits.isfinite().all():
        raise NonFiniteError(f"{type(model).__name__} predicts values that are not finite for a prompt. Leave it out.")
    return logits.reshape(-1, logits.shape[-1]).float().log_softmax(-1)
