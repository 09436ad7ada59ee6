"""
A merge without data plus corrections, run whole, so that gradients reach the corrections.

Corrections are named as in the record's file, by parameters instead of tensors: `NAME` for a whole one, `NAME.up` and
`NAME.down` for factors `(rows, k)` and `(k, columns)`, and `NAME.coefficients`, `(rows, N)` or `(1, N)`, for what is
added to the experts' coefficients.
"""

# Shape suffixes: B = prompts, T = tokens, H = hidden size.

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hf_frmerge.calibration.blocks.blockwise_model import Call, Weights
from hf_frmerge.calibration.fits.sweep_state import SweepState
from hf_frmerge.calibration.refinement.expert_updates import COEFFICIENTS, ExpertUpdates
from hf_frmerge.calibration.sweep import FittedBlock, by_parameter
from hf_frmerge.merging.planning.corrections import Form


class CorrectedMerge:
    """
    A merge without data plus corrections.

    Args:
        state: Modules, and the reader of the weights.
        start: Parameter -> its values in the merge without data, float32.
        corrections: What is added to them.
        updates: What the experts changed, for corrections that are coefficients.
    """

    def __init__(self, state: SweepState, start: Weights, corrections: Weights, updates: ExpertUpdates) -> None:
        self._state, self._model = state, state.model
        self._start, self._corrections, self._updates = start, corrections, updates

    def outer(self) -> dict[str, Tensor]:
        """Return the weights outside the blocks."""
        return self._state.computed({name: self.weight(name) for name in self._model.outer_parameters()})

    def hidden(self, outer: Weights, batches: Sequence[Mapping[str, Tensor]]) -> list[Tensor]:
        """
        Return the hidden states `(B, T, H)` of batches after the last block, float32.

        Blocks are run again for their gradients, so that the weights and activations of one only are in memory. All
        batches go through a block together, as its weights may take longer to form than to multiply with.
        """
        begun = [self._model.begin(outer, {}, inputs) for inputs in batches]
        hidden = [hidden_BTH for hidden_BTH, _ in begun]
        for index, name in enumerate(self._model.blocks):
            calls = [calls[index] for _, calls in begun]
            # Nothing is drawn at random, so there is no state to preserve.
            hidden = checkpoint(self._run_block, name, calls, *hidden, use_reentrant=False, preserve_rng_state=False)
        return hidden

    def _run_block(self, name: str, calls: Sequence[Call], *hidden: Tensor) -> list[Tensor]:
        weights = {key: self.weight(f"{name}.{key}") for key in self._model.block_parameters(name)}
        computed = self._state.computed(weights)
        return [self._model.run_block(name, computed, hidden_BTH, call) for hidden_BTH, call in zip(hidden, calls)]

    @property
    def class_name(self) -> str:
        """Class of the model."""
        return type(self._model.model).__name__

    def writer(self) -> Callable[..., Any]:
        """
        Return the whole merge, with its weights as they are now, as a function that is called like a model.

        It gives the last logits of a text, or those of all its tokens.
        """
        weights: dict[str, Tensor] = {}
        for name in self._start:  # one after another: in float32 all are twice as large
            weights |= self._state.computed({name: self.weight(name)})
        # Of all that is predicted for a text so far only the last is of use; the rest would be the largest in memory.
        takes_number = "logits_to_keep" in signature(self._model.model.forward).parameters
        whole = self._model.stacks.join(weights)
        return partial(self._model.run_whole, whole, **({"logits_to_keep": 1} if takes_number else {}))

    def weight(self, name: str) -> Tensor:
        """Return the values of a parameter, float32."""
        values = self._start[name]
        if name in self._corrections:
            return values + self._corrections[name].float()
        if f"{name}.up" in self._corrections:
            up, down = (self._corrections[f"{name}.{factor}"].float() for factor in ("up", "down"))
            return values + up @ down
        if f"{name}{COEFFICIENTS}" in self._corrections:
            return self._updates.add(name, values, self._corrections[f"{name}{COEFFICIENTS}"])
        return values


def parameter_of(name: str) -> str:
    """Return the parameter that a correction, one of its factors, or a row of coefficients is of."""
    return name.removesuffix(".up").removesuffix(".down").removesuffix(COEFFICIENTS)


def stored_dtype(state: SweepState, name: str) -> torch.dtype:
    """Return the dtype that a correction is stored in; coefficients are trained in float32 and keep all of it."""
    return torch.float32 if name.endswith(COEFFICIENTS) else state.reader.torch_dtype(parameter_of(name))


def read_start(state: SweepState) -> dict[str, Tensor]:
    """Return the merge without data, by parameters: all of it, float32."""
    return {name: state.reader.start(name).to(state.model.device) for name in state.reader.tensors}


def corrections_to_refine(
    state: SweepState,
    start: Weights,
    blocks: Sequence[FittedBlock],
    form: Form,
    *,
    from_fit: bool = True,
    factors_only: bool = False,
) -> dict[str, Tensor]:
    """
    Return the corrections that a refinement begins with, float32.

    In the dense form these are of everything that is merged, embeddings and norms too. In the low-rank form they are
    the factors of the linear layers, and whole ones of merged vectors and of a head that is fitted.

    Args:
        state: Modules, and what is merged.
        start: The merge without data.
        blocks: What the fit found for every block, and behind them for the head if it is fitted.
        form: `"dense"` or `"low_rank"`.
        from_fit: Begin at the fit; otherwise at the merge without data: then one of the fit's two factors is set to
            zero, but not the other, as no gradient would reach either.
        factors_only: Leave out whole corrections, which an adapter cannot hold.
    """
    found = by_parameter(state.model, blocks)
    fitted = found.corrections if from_fit else {}

    without_factors = found.corrections.keys() - found.factors.keys()

    def is_whole(name: str) -> bool:
        has_no_factors = start[name].ndim == 1 or name in without_factors
        return form == "dense" or (has_no_factors and not factors_only)

    whole = {
        name: fitted[name].to(values) if name in fitted else torch.zeros_like(values)
        for name, values in start.items()
        if state.reader.is_merged(name) and is_whole(name)
    }
    if form == "dense":
        return whole
    factors: dict[str, Tensor] = {}
    for name, pair in found.factors.items():
        up, down = _balanced(*(factor.to(state.model.device, torch.float32) for factor in pair))
        factors |= {f"{name}.up": up if from_fit else torch.zeros_like(up), f"{name}.down": down}
    return whole | factors


def _balanced(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """Return factors of the same product whose terms have equal norms: all numbers take steps of one size."""
    norms = [factor.norm(dim=dim).clamp_min(torch.finfo(torch.float32).tiny) for factor, dim in ((up, 0), (down, 1))]
    scale = (norms[1] / norms[0]).sqrt()
    is_term = (up != 0).any(dim=0)  # a fit of a layer that needs none has terms of zeros
    scale = torch.where(is_term, scale, torch.ones_like(scale))
    return up * scale, down / scale[:, None]
