"""Fit the layers of one block, each to inputs that the merge really has there."""

# Shape suffixes: B = prompts of a batch, T = tokens, H = hidden size, I = inputs of a layer, O = outputs.

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from hf_frmerge.calibration.blocks.blockwise_model import Taps, Weights
from hf_frmerge.calibration.blocks.layers import BlockLayers, LinearGroup, RoutedExperts, Step
from hf_frmerge.calibration.blocks.matrices import StoredMatrix, layer_matrix, n_in
from hf_frmerge.calibration.blocks.replay import Replay
from hf_frmerge.calibration.blocks.routed import Routed, Routes, gated, listening
from hf_frmerge.calibration.fits.coefficient_rows import TableEquations
from hf_frmerge.calibration.fits.expert_inputs import ExpertInputs, sum_after
from hf_frmerge.calibration.fits.least_squares import (
    Fit,
    Moments,
    NormFit,
    System,
    UpdatePrior,
    WriterMoments,
    fit_linear,
    fit_norm,
    low_rank,
    norm_sums,
)
from hf_frmerge.calibration.fits.sweep_state import SweepState
from hf_frmerge.calibration.memory import give_back
from hf_frmerge.errors import NonFiniteError

_SAME = 1e-12
"""Squared relative change below which an expert's norm counts as the merge's: there is nothing to fit."""

_UPDATE_RIDGE = 0.3
"""Pull to the base in what the updates of full fine-tunes say alone, relative to the mean pull to an expert."""

FEWEST_TOKENS = 32
"""Tokens below which an expert of a mixture stays as merged."""


Merged = dict[StoredMatrix, bool]
"""Matrices that are merged, and whether a bias of them is."""


class BlockFit:
    """
    Fit of one block: the experts' inputs to every layer, and the weights as they are fitted.

    Args:
        sweep: What is carried through the blocks.
        index: Number of the block.
        layers: Its layers.
        start: Weights of the data-free merge.
        experts: Weights of every expert; those of experts without prompts here are read anew by every access.

    Attributes:
        weights: weights as fitted so far, float32.
        factors: weight of a linear layer -> its correction as factors `(rows, k)` and `(k, columns)`.
        coefficients: parameter -> what is added to the experts' coefficients in the table form, `(rows, N)` or
            `(1, N)`, float64.
    """

    def __init__(
        self,
        sweep: SweepState,
        index: int,
        layers: BlockLayers,
        start: dict[str, Tensor],
        experts: Sequence[Weights],
    ) -> None:
        self._sweep, self._index, self._name, self._layers = sweep, index, sweep.model.blocks[index], layers
        self._start, self._experts = start, experts
        self.weights = dict(start)
        self.factors: dict[str, tuple[Tensor, Tensor]] = {}
        self.coefficients: dict[str, Tensor] = {}
        self._model = sweep.model
        self._module = self._model.block(self._name)
        options = sweep.options
        residual = options.post_norm_residual if layers.is_post_norm else options.fit.residual
        self._fit = replace(options.fit, residual=residual)
        self._norms = [n for n in layers.norms if self._is_merged(f"{n}.weight") and self._is_changed(n)]
        self._of_experts = ExpertInputs(sweep, index, layers, self._norms)
        self._replay = Replay(self._module, layers)
        self._origins: dict[str, Tensor] = {}  # of stacks, which are read once for all matrices in them

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

    def _solve(
        self, merged: Merged, experts: Iterable[int], moments_of: Callable[[int], Moments | WriterMoments]
    ) -> None:
        """Fit layers that share an input, from the moments of the prompts of experts."""
        systems: dict[StoredMatrix, System] = {}
        for matrix, biased in merged.items():
            n_out, width = matrix.read(self._start).shape
            systems[matrix] = System.zeros(width + biased, n_out, self._model.device)
        for expert in experts:
            # Not kept in a variable: they would be in memory while the next expert's are summed.
            self._add(systems, merged, expert, moments_of(expert))
        # Not moment by moment: these are of every expert, and larger.
        self._sweep.processes.add_up([part for one in systems.values() for part in (one.gram_II, one.pull_IO)])
        for matrix, biased in merged.items():
            self._keep(matrix, self._fit_layer(matrix, systems.pop(matrix), biased), biased)

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
        merged_TI, expert_TI = map(_with_one, both) if has_bias else both
        moments = Moments.zeros(merged_TI.shape[1], self._model.device)
        moments.add(merged_TI * shares_T, expert_TI * shares_T)
        moments.n_tokens = self._sweep.n_tokens[expert]  # of all: a token counts alike wherever it is sent
        return moments

    def _keep(self, matrix: StoredMatrix, fit: Fit, biased: bool) -> None:
        """Keep a fitted layer, whole, as factors and as coefficients."""
        keys = [matrix.weight, *([matrix.bias] if biased else [])]
        for key in keys:
            if matrix.place is not None and self.weights[key] is self._start[key]:
                self.weights[key] = self._start[key].clone()  # written place by place
        matrix.write(self.weights, fit.weight_OI.float(), with_bias=biased)
        start_OI = matrix.read(self._start, with_bias=biased)
        width = start_OI.shape[1] - biased
        # A correction of the bias is kept as it is; the metric of the other inputs is the system without it.
        metric = fit.metric_II if not biased else fit.metric_II[:width, :width]
        correction_OI, rank = fit.weight_OI - start_OI, min(self._sweep.options.rank, width)
        if matrix.place is None:  # a stack would need factors of the rank of all its matrices together
            self.factors[matrix.weight] = as_factors(matrix, correction_OI[:, :width], metric, rank)
        if self._sweep.offers_table:
            self._keep_coefficients(matrix, keys, correction_OI, fit.system_II)

    def _keep_coefficients(
        self, matrix: StoredMatrix, keys: Sequence[str], correction_OI: Tensor, system_II: Tensor
    ) -> None:
        """Keep coefficients for every row of a matrix and its bias, or for a whole one where rows are inputs."""
        sweep, biased = self._sweep, len(keys) > 1
        origin_OI = matrix.read({key: self._origin(key) for key in keys}, with_bias=biased)
        equations = TableEquations.of(
            correction_OI,
            lambda e: matrix.read(self._experts[e], with_bias=biased) - origin_OI,
            sweep.n_experts,
            system_II,
            sweep.summed,
        )
        sweep.processes.add_up([equations.gram_ONN, equations.pull_ON])
        # The bias of a row has the coefficients of the row; in a stack that of a whole matrix is one row.
        is_stacked = matrix.place is not None
        found_RN = equations.solve(by_row=not matrix.is_flipped and not (is_stacked and biased))
        for key in keys:
            if matrix.place is None:
                self.coefficients[key] = found_RN.clone()  # files hold no tensor twice
                continue
            n_rows = len(found_RN)
            none_RN = found_RN.new_zeros(len(self._start[key]) * n_rows, sweep.n_experts)
            of_stack_RN = self.coefficients.setdefault(key, none_RN)
            of_stack_RN[matrix.place * n_rows : (matrix.place + 1) * n_rows] = found_RN

    def _fit_norm(self, norm: str) -> None:
        """Fit gain and shift of a norm."""
        gain, shift = self._start[f"{norm}.weight"], self._start.get(f"{norm}.bias")
        module, sweep = self._module.get_submodule(norm), self._sweep
        unit, zero = torch.ones_like(gain), torch.zeros_like(gain)
        shifts = {} if shift is None else {"bias": zero}
        sums = torch.zeros(sweep.n_experts, 4, len(gain), dtype=torch.float64, device=gain.device)
        computed = sweep.computed(self.weights)
        for b in sweep.fitted:
            batch = sweep.batches[b]
            entering = self._enter(computed, b, norm, norm)
            with torch.no_grad():
                at_one = torch.func.functional_call(module, {"weight": unit, **shifts}, (entering,)).float()
                at_zero = torch.func.functional_call(module, {"weight": zero, **shifts}, (entering,)).float()
            x_BTH = at_one - at_zero
            # Some norms scale by 1 + gain: what is left at a gain of zero, as a share of the normalised input.
            offset_H = (at_zero * x_BTH).sum() / x_BTH.square().sum().clamp_min(1e-30) * unit
            target_TH = self._of_experts.norm_outputs.pop((b, norm))
            sums[batch.expert] += norm_sums(batch.tokens(x_BTH), target_TH, (gain, shift), offset_H)
        sweep.processes.add_up([sums])
        fitted = fit_norm(list(sums), sweep.n_tokens, sweep.shares, (gain, shift))
        self.weights[f"{norm}.weight"] = fitted.gain_H.float()
        if fitted.shift_H is not None:
            self.weights[f"{norm}.bias"] = fitted.shift_H.float()
        if sweep.offers_table:
            self._keep_norm_coefficients(norm, fitted)

    def _keep_norm_coefficients(self, norm: str, fit: NormFit) -> None:
        """Keep coefficients for a whole norm: in a channel alone, gain and shift are fewer numbers than experts."""
        fitted = {f"{norm}.weight": fit.gain_H} | ({} if fit.shift_H is None else {f"{norm}.bias": fit.shift_H})
        origins = {key: self._origin(key) for key in fitted}
        updates_HC = [torch.stack([e[key] - origins[key] for key in fitted], dim=1) for e in self._experts]
        correction_HC = torch.stack([values - self._start[key] for key, values in fitted.items()], dim=1)
        equations = TableEquations.of(correction_HC, updates_HC.__getitem__, len(updates_HC), fit.system_HCC)
        found = equations.solve(by_row=False)
        self.coefficients |= {key: found.clone() for key in fitted}

    # Parts

    def _is_changed(self, norm: str) -> bool:
        """Whether the experts have another gain than the merge: else there is nothing to fit."""
        gain = self._start[f"{norm}.weight"]
        changes = [(e[f"{norm}.weight"] - gain).square().sum() / gain.square().sum() for e in self._experts]
        return max(float(change) for change in changes) >= _SAME

    def _merged(self, matrices: Iterable[StoredMatrix]) -> Merged:
        """Return those that are merged, and whether their biases are."""
        return {matrix: self._is_merged(matrix.bias) for matrix in matrices if self._is_merged(matrix.weight)}

    def _add(
        self, systems: dict[StoredMatrix, System], merged: Merged, expert: int, moments: Moments | WriterMoments
    ) -> None:
        """Add an expert's prompts to equations."""
        for matrix, system in systems.items():
            expert_OI = matrix.read(self._experts[expert], with_bias=merged[matrix])
            of_layer = moments
            if isinstance(moments, Moments) and len(moments.merged_II) > len(system.gram_II):
                of_layer = moments.without_bias()  # another layer of the group has one
            system.add(of_layer, self._sweep.shares[expert], expert_OI, self._fit)

    def _fit_layer(self, matrix: StoredMatrix, system: System, biased: bool) -> Fit:
        start_OI, prior = matrix.read(self._start, with_bias=biased), self._prior(matrix)
        if prior is not None and self._sweep.is_full:
            start_OI = start_OI.clone()
            ridge = _UPDATE_RIDGE * self._fit.update_prior / self._sweep.n_experts
            start_OI[:, : prior.base_OI.shape[1]] = prior.merge(ridge)
        try:
            return fit_linear(system, start_OI, self._fit, has_bias=biased, prior=prior)
        except NonFiniteError as error:
            layer = f"{self._name}.{matrix.weight.removesuffix('.weight')}"
            raise NonFiniteError(f"{layer}: {error}. Leave out the prompts that cause it.") from error

    def _prior(self, matrix: StoredMatrix) -> UpdatePrior | None:
        """Return what the updates of all experts say."""
        fit, sweep = self._fit, self._sweep
        if not fit.update_prior and not fit.adapter_prior:
            return None
        prior = UpdatePrior.zeros(matrix.read({matrix.weight: self._origin(matrix.weight)}))
        for expert in sweep.summed:
            share = sweep.shares[expert]
            factors = sweep.reader.factors(expert, f"{self._name}.{matrix.weight}")
            if factors is None:
                delta_OI = matrix.read(self._experts[expert]) - prior.base_OI
                prior.add(delta_OI, share * fit.update_prior)
            else:
                rows, columns = (factor.to(self._model.device) for factor in factors)
                both = (columns.T, rows.T) if matrix.is_flipped else (rows, columns)
                prior.add_factors(*both, share * fit.adapter_prior)
        sweep.processes.add_up([prior.gram_II, prior.pull_IO])
        return prior

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
        return (_with_one(both[0]), _with_one(both[1])) if has_bias else both

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

    def _origin(self, parameter: str) -> Tensor:
        """Return what the experts' updates of a parameter are differences to."""
        if parameter in self._origins:
            return self._origins[parameter]
        start = self._start[parameter]
        values = self._sweep.origin(f"{self._name}.{parameter}", start)
        if start.ndim > 2:
            self._origins[parameter] = values
        return values

    def _is_merged(self, parameter: str) -> bool:
        return parameter in self._start and self._sweep.reader.is_merged(f"{self._name}.{parameter}")


def as_factors(matrix: StoredMatrix, correction_OI: Tensor, metric_II: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the correction of a linear layer as `low_rank` gives it, in the order in which the weight is stored."""
    up, down = low_rank(correction_OI, metric_II, rank)
    return (down.T.contiguous(), up.T.contiguous()) if matrix.is_flipped else (up, down)


def _with_one(values_TI: Tensor) -> Tensor:
    return torch.cat([values_TI, values_TI.new_ones(len(values_TI), 1)], dim=1)
