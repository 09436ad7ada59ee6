"""Fit the layers of one block, each to inputs that the merge really has there."""

# Shape suffixes: B = prompts of a batch, T = tokens, H = hidden size, I = inputs of a layer, O = outputs.

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from hf_frmerge.calibration.blocks.blockwise_model import Taps, Weights
from hf_frmerge.calibration.blocks.layers import (
    BlockLayers,
    LinearGroup,
    RoutedExperts,
    Step,
    is_flipped,
    matrix_of,
    n_in,
    put_matrix,
)
from hf_frmerge.calibration.blocks.replay import Replay
from hf_frmerge.calibration.blocks.routed import Routed, Routes, gated, listening
from hf_frmerge.calibration.fits.coefficient_rows import TableEquations
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

FEWEST_TOKENS = 32
"""Tokens below which an expert of a mixture stays as merged."""

_LEAST_WEIGHT = 0.03
"""Least weight of a token, where the mean is 1: without it tokens with huge activations hardly count, and shrink."""


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
        kappa = options.fit.update_prior if sweep.is_full else 0.0
        residual = options.post_norm_residual if layers.is_post_norm else options.fit.residual
        self._fit = replace(options.fit, update_prior=kappa, residual=residual)
        self._fitted = [b for b, batch in enumerate(sweep.batches) if not batch.is_held_out]
        self._norms = [n for n in layers.norms if self._is_merged(f"{n}.weight") and self._is_changed(n)]
        # Of the experts, by batch and layer: what enters a group, what a norm gives (both as the products are taken),
        # the stream before a layer writes.
        self._inputs: dict[tuple[int, str], Tensor] = {}
        self._norm_outputs: dict[tuple[int, str], Tensor] = {}
        self._streams: dict[tuple[int, str], Tensor] = {}
        self._token_weights: dict[tuple[int, str], Tensor] = {}
        self._replay = Replay(self._module, layers)

    def run_experts(self) -> None:
        """Run the experts' blocks, and keep what enters their layers."""
        sweep, groups = self._sweep, self._layers.groups
        sums = [group.norm_after for group in groups if group.norm_after]  # read what writing layers add up
        mixtures = [mixture.name for mixture in self._layers.mixtures]
        names = [*dict.fromkeys([*(group.names[0] for group in groups), *mixtures, *sums, *self._norms])]
        for expert in sweep.own:
            computed = sweep.computed(self._experts[expert])
            for b, batch in enumerate(sweep.batches):
                if batch.expert != expert:
                    continue
                with Taps(self._module, [] if batch.is_held_out else names) as taps:
                    after_BTH = self._run(computed, b, sweep.expert[b])
                if not batch.is_held_out:
                    self._capture(b, taps, after_BTH)
                sweep.expert[b] = after_BTH
            give_back()
        for group in groups:
            if group.writes:
                self._normalise(group.names[0])

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
        merged = [name for name in group.names if self._is_merged(f"{name}.weight")]
        if not merged:
            return
        is_biased = {name: self._is_merged(f"{name}.bias") for name in merged}
        systems = self._systems(group, is_biased)
        for name, biased in is_biased.items():
            self._keep(name, self._fit_layer(name, systems.pop(name), biased), biased)

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
        for place, (gate, up, down) in enumerate(mixture.experts):
            if counts[place] >= FEWEST_TOKENS:
                self._fit_routed([gate, up], self._moments_at(place, mixture, routes, through=()))
                self._fit_routed([down], self._moments_at(place, mixture, routes, through=(gate, up)))

    def _fit_routed(self, names: Sequence[str], moments: Iterable[tuple[int, Moments]]) -> None:
        """Fit layers of one expert of a mixture that share an input."""
        sweep, systems = self._sweep, {}
        is_biased = {name: False for name in names if self._is_merged(f"{name}.weight")}
        for name in is_biased:
            n_out, width = self._start[f"{name}.weight"].shape
            systems[name] = System.zeros(width, n_out, self._model.device)
        for expert, own in moments:
            self._add(systems, is_biased, expert, own)
        sweep.processes.add_up([part for one in systems.values() for part in (one.gram_II, one.pull_IO)])
        for name in is_biased:
            self._keep(name, self._fit_layer(name, systems.pop(name), False), False)

    def _routes(self, mixture: RoutedExperts) -> Routes:
        """Return what enters a mixture in the merge as fitted so far, and where it is sent."""
        computed, routes = self._sweep.computed(self.weights), Routes()
        for b in self._fitted:
            batch = self._sweep.batches[b]
            with listening(self._module.get_submodule(mixture.name)) as called:
                self._enter(computed, b, mixture.name, mixture)
            (hidden_TH, places_TK, shares_TK), *_ = called
            merged_TH, places_TK, shares_TK = map(batch.tokens, (hidden_TH, places_TK, shares_TK.float()))
            expert_TH = self._inputs.pop((b, mixture.name))
            routes.add(batch.expert, Routed(merged_TH.to(self._model.dtype), expert_TH, places_TK, shares_TK))
        return routes

    def _moments_at(
        self, place: int, mixture: RoutedExperts, routes: Routes, through: Sequence[str]
    ) -> Iterator[tuple[int, Moments]]:
        """Yield each model, and the moments of its tokens as they enter an expert of a mixture, or behind its gate."""
        module = self._module.get_submodule(mixture.name)
        for expert in routes.by_expert:
            merged_TI, expert_TI, shares_T = routes.at(expert, place)
            if through:
                merged_TI, expert_TI = (
                    gated(self._model, module, x_TH, *(weights[f"{name}.weight"] for name in through))
                    for x_TH, weights in ((merged_TI, self.weights), (expert_TI, self._experts[expert]))
                )
            moments = Moments.zeros(merged_TI.shape[1], self._model.device)
            moments.add(merged_TI.float() * shares_T, expert_TI.float() * shares_T)
            moments.n_tokens = self._sweep.n_tokens[expert]  # of all: a token counts alike wherever it is sent
            yield expert, moments

    def _keep(self, name: str, fit: Fit, biased: bool) -> None:
        """Keep a fitted layer, whole, as factors and as coefficients."""
        put_matrix(self._module, self.weights, name, fit.weight_OI.float(), with_bias=biased)
        start_OI = matrix_of(self._module, self._start, name, with_bias=biased)
        n_in = start_OI.shape[1] - biased
        # A correction of the bias is kept as it is; the metric of the other inputs is the system without it.
        metric = fit.metric_II if not biased else fit.metric_II[:n_in, :n_in]
        correction_OI, rank = fit.weight_OI - start_OI, min(self._sweep.options.rank, n_in)
        self.factors[f"{name}.weight"] = as_factors(self._module, name, correction_OI[:, :n_in], metric, rank)
        if self._sweep.offers_table:
            # The bias of a row has the coefficients of the row. Rows of a flipped weight are inputs, not outputs.
            keys = [f"{name}.weight", *([f"{name}.bias"] if biased else [])]
            origins = {key: self._sweep.origin(f"{self._name}.{key}", self._start[key]) for key in keys}
            origin_OI = matrix_of(self._module, origins, name, with_bias=biased)
            equations = TableEquations.of(
                correction_OI,
                lambda e: matrix_of(self._module, self._experts[e], name, with_bias=biased) - origin_OI,
                self._sweep.n_experts,
                fit.system_II,
                self._sweep.summed,
            )
            self._sweep.processes.add_up([equations.gram_ONN, equations.pull_ON])
            found = equations.solve(by_row=not is_flipped(self._module, name))
            self.coefficients |= {key: found.clone() for key in keys}  # files hold no tensor twice

    def _fit_norm(self, norm: str) -> None:
        """Fit gain and shift of a norm."""
        gain, shift = self._start[f"{norm}.weight"], self._start.get(f"{norm}.bias")
        module, sweep = self._module.get_submodule(norm), self._sweep
        unit, zero = torch.ones_like(gain), torch.zeros_like(gain)
        shifts = {} if shift is None else {"bias": zero}
        sums = torch.zeros(sweep.n_experts, 4, len(gain), dtype=torch.float64, device=gain.device)
        computed = sweep.computed(self.weights)
        for b in self._fitted:
            batch = sweep.batches[b]
            entering = self._enter(computed, b, norm, norm)
            with torch.no_grad():
                at_one = torch.func.functional_call(module, {"weight": unit, **shifts}, (entering,)).float()
                at_zero = torch.func.functional_call(module, {"weight": zero, **shifts}, (entering,)).float()
            x_BTH = at_one - at_zero
            # Some norms scale by 1 + gain: what is left at a gain of zero, as a share of the normalised input.
            offset_H = (at_zero * x_BTH).sum() / x_BTH.square().sum().clamp_min(1e-30) * unit
            target_TH = self._norm_outputs.pop((b, norm))
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
        origins = {key: self._sweep.origin(f"{self._name}.{key}", self._start[key]) for key in fitted}
        updates_HC = [torch.stack([e[key] - origins[key] for key in fitted], dim=1) for e in self._experts]
        correction_HC = torch.stack([values - self._start[key] for key, values in fitted.items()], dim=1)
        equations = TableEquations.of(correction_HC, updates_HC.__getitem__, len(updates_HC), fit.system_HCC)
        found = equations.solve(by_row=False)
        self.coefficients |= {key: found.clone() for key in fitted}

    # Parts

    def _capture(self, b: int, taps: Taps, after_BTH: Tensor) -> None:
        """Keep of a batch what enters an expert's layers."""
        batch, dtype = self._sweep.batches[b], self._model.dtype
        of_norms: dict[int, Tensor] = {}  # most of what norms give enters a group: it is kept once
        for norm in self._norms:
            values = batch.tokens(taps.outputs[norm]).to(dtype)
            self._norm_outputs[b, norm] = of_norms[id(taps.outputs[norm])] = values
        for group in self._layers.groups:
            key, entering = (b, group.names[0]), taps.inputs[group.names[0]]
            of_norm = of_norms.get(id(entering))
            self._inputs[key] = batch.tokens(entering).to(dtype) if of_norm is None else of_norm
            if group.writes:
                sum_TH = batch.tokens(self._sum_after(group, taps, after_BTH)).float()
                self._streams[key] = sum_TH - batch.tokens(taps.outputs[group.names[0]]).float()
                self._token_weights[key] = 1 / sum_TH.square().mean(1)

        for mixture in self._layers.mixtures:
            self._inputs[b, mixture.name] = batch.tokens(taps.inputs[mixture.name]).to(dtype)

    def _is_changed(self, norm: str) -> bool:
        """Whether the experts have another gain than the merge: else there is nothing to fit."""
        gain = self._start[f"{norm}.weight"]
        changes = [(e[f"{norm}.weight"] - gain).square().sum() / gain.square().sum() for e in self._experts]
        return max(float(change) for change in changes) >= _SAME

    def _systems(self, group: LinearGroup, is_biased: dict[str, bool]) -> dict[str, System]:
        """Return the equations of a group's layers, from the prompts of all experts and processes."""
        sweep, systems = self._sweep, {}
        for name, biased in is_biased.items():
            n_out, width = matrix_of(self._module, self._start, name, with_bias=False).shape
            systems[name] = System.zeros(width + biased, n_out, self._model.device)
        computed, has_bias = sweep.computed(self.weights), any(is_biased.values())
        moments_of = self._moments_of_writer if group.writes else self._moments
        for expert in sweep.own:
            # Not kept in a variable: they would be in memory while the next expert's are summed.
            self._add(systems, is_biased, expert, moments_of(computed, group, expert, has_bias))
        # Not moment by moment: these are of every expert, and larger.
        sweep.processes.add_up([part for one in systems.values() for part in (one.gram_II, one.pull_IO)])
        return systems

    def _add(
        self, systems: dict[str, System], is_biased: dict[str, bool], expert: int, moments: Moments | WriterMoments
    ) -> None:
        """Add an expert's prompts to equations."""
        for name, system in systems.items():
            expert_OI = matrix_of(self._module, self._experts[expert], name, with_bias=is_biased[name])
            of_layer = moments
            if isinstance(moments, Moments) and len(moments.merged_II) > len(system.gram_II):
                of_layer = moments.without_bias()  # another layer of the group has one
            system.add(of_layer, self._sweep.shares[expert], expert_OI, self._fit)

    def _fit_layer(self, name: str, system: System, biased: bool) -> Fit:
        start_OI = matrix_of(self._module, self._start, name, with_bias=biased)
        sweep, prior = self._sweep, None
        if self._fit.update_prior:
            own = [self._experts[expert] for expert in sweep.summed]
            experts_OI = (matrix_of(self._module, expert, name, with_bias=False) for expert in own)
            prior = UpdatePrior.of(self._base_matrix(name), experts_OI, sweep.n_experts)
            sweep.processes.add_up([prior.gram_II, prior.pull_IO])
            start_OI = start_OI.clone()
            start_OI[:, : prior.base_OI.shape[1]] = prior.merge()
        try:
            return fit_linear(system, start_OI, self._fit, has_bias=biased, prior=prior)
        except NonFiniteError as error:
            raise NonFiniteError(f"{self._name}.{name}: {error}. Leave out the prompts that cause it.") from error

    def _base_matrix(self, name: str) -> Tensor:
        base = self._sweep.reader.base(f"{self._name}.{name}.weight")
        assert base is not None
        weights = {f"{name}.weight": base.to(self._model.device)}
        return matrix_of(self._module, weights, name, with_bias=False)

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
        expert_OI = matrix_of(self._module, self._experts[expert], name, with_bias=has_bias)
        n_out, width = expert_OI.shape
        moments = WriterMoments.zeros(width, n_out, self._model.device)
        for b in self._fitted_of(expert):
            entering, stream_TH = self._enter_writer(computed, b, group)
            merged_TI, expert_TI = self._with_expert(b, name, entering, has_bias)
            drift_TH = self._streams.pop((b, name)) - stream_TH
            moments.add(merged_TI, expert_TI, self._token_weights[b, name], drift_TH, expert_OI, self._fit)
        moments.n_tokens = self._sweep.n_tokens[expert]
        return moments

    def _fitted_of(self, expert: int) -> list[int]:
        return [b for b in self._fitted if self._sweep.batches[b].expert == expert]

    def _with_expert(self, b: int, name: str, entering: Tensor, has_bias: bool) -> tuple[Tensor, Tensor]:
        """Return what enters a layer in the merge and in the expert, `(tokens, I)` each, float32."""
        both = self._sweep.batches[b].tokens(entering).float(), self._inputs.pop((b, name)).float()
        return (_with_one(both[0]), _with_one(both[1])) if has_bias else both

    def _enter(self, merged: dict[str, Tensor], b: int, name: str, step: Step) -> Tensor:
        """Return what enters a layer of a step in the merge as fitted so far."""
        with self._replay.running(b, step), Taps(self._module, [name], last=name) as taps:
            self._run(merged, b, self._sweep.merged[b])
        return taps.inputs[name]

    def _enter_writer(self, merged: dict[str, Tensor], b: int, group: LinearGroup) -> tuple[Tensor, Tensor]:
        """Return what enters a writing layer, and the residual stream `(tokens, H)` before its output is added."""
        first, batch = group.names[0], self._sweep.batches[b]
        names = [first, *([group.norm_after] if group.norm_after else [])]
        after = torch.zeros(0)
        with self._replay.running(b, group), Taps(self._module, names, last=group.norm_after) as taps:
            after = self._run(merged, b, self._sweep.merged[b])
        sum_TH = batch.tokens(self._sum_after(group, taps, after)).float()
        return taps.inputs[first], sum_TH - batch.tokens(taps.outputs[first]).float()

    def _sum_after(self, group: LinearGroup, taps: Taps, after_BTH: Tensor) -> Tensor:
        return taps.inputs[group.norm_after] if group.norm_after else after_BTH

    def _run(self, weights: dict[str, Tensor], b: int, hidden_BTH: Tensor) -> Tensor:
        return self._model.run_block(self._name, weights, hidden_BTH, self._sweep.batches[b].calls[self._index])

    def _normalise(self, first: str) -> None:
        """Scale the weights of each expert's tokens to a mean of 1, and none to less than the floor."""
        sweep = self._sweep
        sums = torch.zeros(sweep.n_experts, dtype=torch.float64)
        for b in self._fitted:
            sums[sweep.batches[b].expert] += float(self._token_weights[b, first].sum(dtype=torch.float64))
        sweep.processes.add_up([sums])
        for b in self._fitted:
            expert = sweep.batches[b].expert
            mean = float(sums[expert]) / sweep.n_tokens[expert]
            self._token_weights[b, first] = (self._token_weights[b, first] / mean).clamp(min=_LEAST_WEIGHT)

    def _is_merged(self, parameter: str) -> bool:
        return parameter in self._start and self._sweep.reader.is_merged(f"{self._name}.{parameter}")


def as_factors(
    module: nn.Module, name: str, correction_OI: Tensor, metric_II: Tensor, rank: int
) -> tuple[Tensor, Tensor]:
    """Return the correction of a linear layer as `low_rank` gives it, in the order in which the weight is stored."""
    up, down = low_rank(correction_OI, metric_II, rank)
    return (down.T.contiguous(), up.T.contiguous()) if is_flipped(module, name) else (up, down)


def _with_one(values_TI: Tensor) -> Tensor:
    return torch.cat([values_TI, values_TI.new_ones(len(values_TI), 1)], dim=1)
