"""What the layers of one block get and give in each expert, on the prompts of that expert."""

# Shape suffixes: B = prompts of a batch, T = tokens, H = hidden size.

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_frmerge.calibration.blocks.blockwise_model import Taps, Weights
from hf_frmerge.calibration.blocks.layers import BlockLayers, LinearGroup
from hf_frmerge.calibration.fits.sweep_state import SweepState
from hf_frmerge.calibration.memory import give_back

_LEAST_WEIGHT = 0.03
"""Least weight of a token, where the mean is 1: without it tokens with huge activations hardly count, and shrink."""

_NOTHING = 1e-4
"""Share of the median mean square below which a token is as good as zero, and gets the least weight, not the most."""


class ExpertInputs:
    """
    What a fit of one block needs of the experts' own forward passes.

    All is by batch and layer, of batches that take part in the fit; a group of layers is named by its first.

    Args:
        sweep: What is carried through the blocks.
        index: Number of the block.
        layers: Its layers.
        norms: Those of its norms that are fitted.

    Attributes:
        inputs: what enters a group or a mixture, `(T, I)`, in the dtype of the products.
        norm_outputs: what a norm gives, likewise.
        streams: the residual stream before a layer writes to it, `(T, H)`, float32.
        token_weights: how much a token counts where a layer writes to the stream, float32.
    """

    def __init__(self, sweep: SweepState, index: int, layers: BlockLayers, norms: Sequence[str]) -> None:
        self._sweep, self._index, self._layers, self._norms = sweep, index, layers, norms
        self._module = sweep.model.block(sweep.model.blocks[index])
        self.inputs: dict[tuple[int, str], Tensor] = {}
        self.norm_outputs: dict[tuple[int, str], Tensor] = {}
        self.streams: dict[tuple[int, str], Tensor] = {}
        self.token_weights: dict[tuple[int, str], Tensor] = {}

    def run(self, experts: Sequence[Weights]) -> None:
        """Run every expert's block on its prompts, carry their hidden states on, and keep what enters the layers."""
        sweep, groups = self._sweep, self._layers.groups
        sums = [group.norm_after for group in groups if group.norm_after]  # read what writing layers add up
        mixtures = [mixture.name for mixture in self._layers.mixtures]
        names = [*dict.fromkeys([*(group.names[0] for group in groups), *mixtures, *sums, *self._norms])]
        for expert in sweep.own:
            computed = sweep.computed(experts[expert])
            for b, batch in enumerate(sweep.batches):
                if batch.expert != expert:
                    continue
                with Taps(self._module, [] if batch.is_held_out else names) as taps:
                    after_BTH = sweep.run_block(self._index, computed, b, sweep.expert[b])
                if not batch.is_held_out:
                    self._keep(b, taps, after_BTH)
                sweep.expert[b] = after_BTH
            give_back()
        for group in groups:
            if group.writes:
                self._normalise(group.names[0])

    def _keep(self, b: int, taps: Taps, after_BTH: Tensor) -> None:
        batch, dtype = self._sweep.batches[b], self._sweep.model.dtype
        of_norms: dict[int, Tensor] = {}  # most of what norms give enters a group: it is kept once
        for norm in self._norms:
            values = batch.tokens(taps.outputs[norm]).to(dtype)
            self.norm_outputs[b, norm] = of_norms[id(taps.outputs[norm])] = values
        for group in self._layers.groups:
            key, entering = (b, group.names[0]), taps.inputs[group.names[0]]
            of_norm = of_norms.get(id(entering))
            self.inputs[key] = batch.tokens(entering).to(dtype) if of_norm is None else of_norm
            if group.writes:
                sum_TH = batch.tokens(sum_after(group, taps, after_BTH)).float()
                self.streams[key] = sum_TH - batch.tokens(taps.outputs[group.names[0]]).float()
                self.token_weights[key] = _inverse_sizes(sum_TH)
        for mixture in self._layers.mixtures:
            self.inputs[b, mixture.name] = batch.tokens(taps.inputs[mixture.name]).to(dtype)

    def _normalise(self, first: str) -> None:
        """Scale the weights of each expert's tokens to a mean of 1, and none to less than the floor."""
        sweep, fitted = self._sweep, self._sweep.fitted
        sums = torch.zeros(sweep.n_experts, dtype=torch.float64)
        for b in fitted:
            sums[sweep.batches[b].expert] += float(self.token_weights[b, first].sum(dtype=torch.float64))
        sweep.processes.add_up([sums])
        for b in fitted:
            expert = sweep.batches[b].expert
            mean = float(sums[expert]) / sweep.n_tokens[expert]
            self.token_weights[b, first] = (self.token_weights[b, first] / mean).clamp(min=_LEAST_WEIGHT)


def _inverse_sizes(stream_TH: Tensor) -> Tensor:
    """Return 1 / mean(h²) for every token; 0 for those that are as good as zero: rows of padding often are."""
    mean_square_T = stream_TH.square().mean(1)
    is_nothing_T = mean_square_T <= _NOTHING * mean_square_T.median()
    return torch.where(is_nothing_T, 0, 1 / mean_square_T)


def sum_after(group: LinearGroup, taps: Taps, after_BTH: Tensor) -> Tensor:
    """Return the residual stream after a layer has written to it, from what was tapped and what the block gives."""
    return taps.inputs[group.norm_after] if group.norm_after else after_BTH
