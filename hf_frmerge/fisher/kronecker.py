r"""
Estimate Kronecker factors of a model's Fisher information on prompts (KFAC, arXiv 1503.05671).

The gradient of a linear layer's weight is a sum over tokens of \(g x^T\), with its input x and the gradient g at its
output. If the two have nothing to do with each other, and neither have those of different tokens, the information of
the weight `(O, I)` is the Kronecker product of two small matrices,

\(F = G \otimes A, \quad A = \frac1T \sum_t x_t x_t^T, \quad G = \frac1n \sum g_t g_t^T\)

with T tokens, n predictions, and the second sum over the scores and tokens. Unlike a diagonal it knows how the
weights of a layer work together. Of one token it is exact.
"""

# Shape suffixes: T = tokens, I = inputs of a layer, O = outputs.

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hf_frmerge.errors import ArgumentError, NonFiniteError
from hf_frmerge.fisher.scores import run_scores


@dataclass(frozen=True)
class KroneckerFactors:
    """
    Kronecker factors of linear layers, float32.

    Attributes:
        inputs: layer -> A `(I, I)`; layers that share an input share the tensor.
        outputs: layer -> G `(O, O)`.
    """

    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]


def kronecker_factors(
    model: torch.nn.Module,
    prompts: Iterable[NDArray[np.int64]],
    layers: Collection[str],
    *,
    labels: str = "sampled",
    seed: int,
) -> tuple[KroneckerFactors, int]:
    """
    Estimate the factors of some linear layers.

    Both factors of all layers are in memory beside the model. Prompts run one by one, so there is no padding.

    Args:
        model: As for `diagonal_fisher`; none of its parameters requires a gradient afterwards.
        prompts: Token ids `(T,)` of every prompt.
        layers: Names of linear layers. One that does not see every token, as a routed expert, gets no factors.
        labels: `"sampled"`, `"exact"` or `"empirical"`; see `scores`.
        seed: Of what is drawn.

    Returns:
        The factors, and the number of predictions.

    Raises:
        ArgumentError: If the model has no such layer, gives no probabilities, or the labels cannot be had.
        NonFiniteError: If an input or a gradient is not finite.
    """
    modules = dict(model.named_modules())
    missing = sorted(set(layers) - modules.keys())
    if missing:
        raise ArgumentError(
            f"{type(model).__name__} has no layer {missing[0]!r}, which the models it is merged with have. Merge "
            "experts of one class."
        )
    model.requires_grad_(False)  # of the outputs alone: this saves the gradients of all weights
    taps = _Taps()
    hooks: list[Any] = []
    for name in layers:
        hooks.append(modules[name].register_forward_pre_hook(taps.before(name)))
        hooks.append(modules[name].register_forward_hook(taps.after(name)))
    try:
        n_predictions = run_scores(model, taps.counted(prompts), labels=labels, seed=seed)
    finally:
        for hook in hooks:
            hook.remove()
    for name in taps.outputs:
        if not (taps.outputs[name].isfinite().all() and taps.inputs[taps.owner[name]].isfinite().all()):
            raise NonFiniteError(
                f"An input or a gradient of {name!r} is not finite. Leave out the prompts that cause it."
            )
    for sums, n in ((taps.inputs, taps.n_tokens), (taps.outputs, n_predictions)):
        for total in sums.values():
            total.div_(n)  # in place: they are larger than the model
    inputs = {name: taps.inputs[taps.owner[name]] for name in taps.outputs}
    return KroneckerFactors(inputs, taps.outputs), n_predictions


class _Taps:
    """
    Second moments of what enters layers, and of the gradients at what they give.

    Attributes:
        inputs: layer -> sum over tokens of `x x^T`; of layers that share an input the first has it.
        outputs: layer -> sum over tokens and scores of `g g^T`.
        owner: layer -> the layer that has the moments of its input.
        n_tokens: of all prompts so far.
    """

    def __init__(self) -> None:
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self.owner: dict[str, str] = {}
        self.n_tokens = 0
        self._length = 0
        self._last: tuple[str, Tensor] | None = None

    def counted(self, prompts: Iterable[NDArray[np.int64]]) -> Iterable[NDArray[np.int64]]:
        """Pass the prompts on, and count their tokens."""
        for ids in prompts:
            self._length, self._last = len(ids), None
            self.n_tokens += len(ids)
            yield ids

    def before(self, name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].detach()
            if self._is_partial(x):
                return
            if self._last is None or self._last[1] is not args[0]:
                self._last = (name, args[0])  # kept, so that no other input gets its identity
                _add(self.inputs, name, x)
            self.owner[name] = self._last[0]

        return hook

    def after(self, name: str) -> Any:
        def hook(_module: nn.Module, _args: tuple[Tensor, ...], output: Tensor) -> None:
            if self._is_partial(output):
                return
            if not output.requires_grad:
                output.requires_grad_()  # the first layers, below which nothing asks for gradients
            output.register_hook(lambda grad: _add(self.outputs, name, grad))

        return hook

    def _is_partial(self, values: Tensor) -> bool:
        return values.shape[:-1].numel() != self._length


def _add(sums: dict[str, Tensor], name: str, values: Tensor) -> None:
    rows = values.reshape(-1, values.shape[-1]).float()
    if name not in sums:
        sums[name] = rows.new_zeros(rows.shape[1], rows.shape[1])
    sums[name].addmm_(rows.T, rows)
