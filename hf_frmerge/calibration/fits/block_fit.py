"""Fit the layers of one block, each to inputs that the merge really has there."""

# Shape suffixes: B = prompts of a batch, T = tokens, H = hidden size, I = inputs of a layer, O = outputs.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from hf_frmerge.calibration.blocks.blockwise_model import Taps, Weights
from hf_frmerge.calibration.blocks.layers import BlockLayers, LinearGroup, RoutedExperts, Step
from hf_frmerge.calibration.blocks.matrices import StoredMatrix, layer_matrix, n_in
from hf_frmerge.calibration.blocks.replay import Replay
from hf_frmerge.calibration.blocks.routed import Routed, Routes, gated, listening
from hf_frmerge.calibration.fits.expert_inputs import ExpertInputs, sum_after
from hf_frmerge.calibration.fits.layers_fit import LayersFit, with_one
from hf_frmerge.calibration.fits.least_squares import Moments, WriterMoments
from hf_frmerge.calibration.fits.norms import norm_sums
from hf_frmerge.calibration.fits.sweep_state import SweepState
from hf_frmerge.calibration.memory import give_back

FEWEST_TOKENS = 32
"""Tokens below which an expert of a mixture stays as merged."""


class BlockFit(LayersFit):
    """
    Fit of one block: the experts' inputs to every layer, and the weights as they are fitted.

    Args:
        sweep: What is carried through the blocks.
        index: Number of the block.
        layers: Its layers.
        start: Weights of the data-free merge.
        experts: Weights of every expert; those of experts without prompts here are read anew by every access.
    """

    def __init__(
        self,
        sweep: SweepState,
        index: int,
        layers: BlockLayers,
        start: dict[str, Tensor],
        experts: Sequence[Weights],
    ) -> None:
        name, options = sweep.model.blocks[index], sweep.options
        residual = options.post_norm_residual if layers.is_post_norm else options.fit.residual
        fit = replace(options.fit, residual=residual)
        super().__init__(sweep, f"{name}.", sweep.model.block(name), start, experts, fit, options.rank)
        self._index, self._layers = index, layers
        self._norms = [n for n in layers.norms if self._is_merged(f"{n}.weight") and self._is_changed(n)]
        self._of_experts = ExpertInputs(sweep, index, layers, self._norms)
        self._replay = Replay(self._module, layers)

    def run_experts(self) -> None:
        """Run the experts' blocks, and keep what enters their layers."""
        self._of_experts.run(self._experts)

    def fit(self) -> None:
        """Fit all layers, in the order of the forward pass."""
        for step in self._layers.steps:
            if isinstance(step, LinearGroup):
                self._fit_group(step)
            elif isinstance(step, RoutedExperts):
                self._fit_mixture(step)
            elif step in self._norms:
                self._fit_norm(step)
            give_back()  # what the step had of all tokens

    def _fit_group(self, group: LinearGroup) -> None:
        # What no expert changes is copied from the base, without corrections.
        merged = self._merged([layer_matrix(self._module, name) for name in group.names])
        if not merged:
            return
        moments_of = self._moments_of_writer if group.writes else self._moments
        computed, has_bias = self._sweep.computed(self.weights), any(merged.values())
        self._solve(merged, self._sweep.own, lambda expert: moments_of(computed, group, expert, has_bias))

    def _fit_mixture(self, mixture: RoutedExperts) -> None:
        """
        Fit the experts of a mixture, each to the tokens that the merge sends to it.

        A token counts by the square of the share that it has in what leaves the mixture. Experts with too few tokens
        stay as merged.
        """
        sweep, routes = self._sweep, self._routes(mixture)
        counts = routes.counts(len(mixture.experts))
        sweep.processes.add_up([counts])
        sweep.n_unreached += int((counts < FEWEST_TOKENS).sum())
        for place, expert in enumerate(mixture.experts):
            if counts[place] >= FEWEST_TOKENS:
                for matrices, through in ((expert.gate_up, ()), ((expert.down,), expert.gate_up)):
                    merged = self._merged(matrices)
                    moments_of = partial(self._moments_at, place, mixture, routes, through, any(merged.values()))
                    self._solve(merged, routes.by_expert, moments_of)

    def _routes(self, mixture: RoutedExperts) -> Routes:
        """Return what enters a mixture in the merge as fitted so far, and where it is sent."""
        computed, routes = self._sweep.computed(self.weights), Routes()
        for b in self._sweep.fitted:
            batch = self._sweep.batches[b]
            with listening(self._module.get_submodule(mixture.name)) as called:
                self._enter(computed, b, mixture.name, mixture)
            (hidden_TH, places_TK, shares_TK), *_ = called
            merged_TH, places_TK, shares_TK = map(batch.tokens, (hidden_TH, places_TK, shares_TK.float()))
            expert_TH = self._of_experts.inputs.pop((b, mixture.name))
            routes.add(batch.expert, Routed(merged_TH.to(self._model.dtype), expert_TH, places_TK, shares_TK))
        return routes

    def _moments_at(
        self,
        place: int,
        mixture: RoutedExperts,
        routes: Routes,
        through: Sequence[StoredMatrix],
        has_bias: bool,
        expert: int,
    ) -> Moments:
        """Return the moments of a model's tokens as they enter an expert of a mixture, or behind its gate."""
        merged_TI, expert_TI, shares_T = routes.at(expert, place)
        if through:
            module = self._module.get_submodule(mixture.name)
            merged_TI, expert_TI = (
                gated(self._model, module, x_TH, weights, through)
                for x_TH, weights in ((merged_TI, self.weights), (expert_TI, self._experts[expert]))
            )
        both = merged_TI.float(), expert_TI.float()
        merged_TI, expert_TI = map(with_one, both) if has_bias else both
        moments = Moments.zeros(merged_TI.shape[1], self._model.device)
        moments.add(merged_TI * shares_T, expert_TI * shares_T)
        moments.n_tokens = self._sweep.n_tokens[expert]  # of all: a token counts alike wherever it is sent
        return moments

    def _fit_norm(self, norm: str) -> None:
        """Fit gain and shift of a norm."""
        start, sweep = self._norm_start(norm), self._sweep
        sums = torch.zeros(sweep.n_experts, 4, len(start[0]), dtype=torch.float64, device=start[0].device)
        computed = sweep.computed(self.weights)
        for b in sweep.fitted:
            batch = sweep.batches[b]
            x_BTH, offset_H = self._normalised(norm, self._enter(computed, b, norm, norm))
            target_TH = self._of_experts.norm_outputs.pop((b, norm))
            sums[batch.expert] += norm_sums(batch.tokens(x_BTH), target_TH, start, offset_H)
        sweep.processes.add_up([sums])
        self._solve_norm(norm, sums, sweep.n_tokens)

    def _moments(self, computed: dict[str, Tensor], group: LinearGroup, expert: int, has_bias: bool) -> Moments:
        """Return the moments of an expert's prompts, from the merge as fitted so far."""
        first = group.names[0]
        moments = Moments.zeros(n_in(self._module.get_submodule(first)) + has_bias, self._model.device)
        for b in self._fitted_of(expert):
            entering = self._enter(computed, b, first, group)
            moments.add(*self._with_expert(b, first, entering, has_bias))
        moments.n_tokens = self._sweep.n_tokens[expert]
        return moments

    def _moments_of_writer(
        self, computed: dict[str, Tensor], group: LinearGroup, expert: int, has_bias: bool
    ) -> WriterMoments:
        """Return the moments of an expert's prompts where a layer writes to the residual stream."""
        (name,) = group.names
        expert_OI = layer_matrix(self._module, name).read(self._experts[expert], with_bias=has_bias)
        n_out, width = expert_OI.shape
        moments = WriterMoments.zeros(width, n_out, self._model.device)
        for b in self._fitted_of(expert):
            entering, stream_TH = self._enter_writer(computed, b, group)
            merged_TI, expert_TI = self._with_expert(b, name, entering, has_bias)
            drift_TH = self._of_experts.streams.pop((b, name)) - stream_TH
            moments.add(merged_TI, expert_TI, self._of_experts.token_weights[b, name], drift_TH, expert_OI, self._fit)
        moments.n_tokens = self._sweep.n_tokens[expert]
        return moments

    def _fitted_of(self, expert: int) -> list[int]:
        return [b for b in self._sweep.fitted if self._sweep.batches[b].expert == expert]

    def _with_expert(self, b: int, name: str, entering: Tensor, has_bias: bool) -> tuple[Tensor, Tensor]:
        """Return what enters a layer in the merge and in the expert, `(tokens, I)` each, float32."""
        both = self._sweep.batches[b].tokens(entering).float(), self._of_experts.inputs.pop((b, name)).float()
        return (with_one(both[0]), with_one(both[1])) if has_bias else both

    def _enter(self, merged: dict[str, Tensor], b: int, name: str, step: Step) -> Tensor:
        """Return what enters a layer of a step in the merge as fitted so far."""
        with self._replay.running(b, step), Taps(self._module, [name], last=name) as taps:
            self._sweep.run_block(self._index, merged, b, self._sweep.merged[b])
        return taps.inputs[name]

    def _enter_writer(self, merged: dict[str, Tensor], b: int, group: LinearGroup) -> tuple[Tensor, Tensor]:
        """Return what enters a writing layer, and the residual stream `(tokens, H)` before its output is added."""
        first, batch = group.names[0], self._sweep.batches[b]
        names = [first, *([group.norm_after] if group.norm_after else [])]
        after = torch.zeros(0)
        with self._replay.running(b, group), Taps(self._module, names, last=group.norm_after) as taps:
            after = self._sweep.run_block(self._index, merged, b, self._sweep.merged[b])
        sum_TH = batch.tokens(sum_after(group, taps, after)).float()
        return taps.inputs[first], sum_TH - batch.tokens(taps.outputs[first]).float()
