"""
Fit a merge to its experts, block by block, in the order of the forward pass.

Two hidden states are carried along for every prompt: that of its expert, and that of the merge as it has been fitted
so far. Every layer is fitted to inputs that the merge really has there, so that it can repair what the layers before
it got wrong. Only one block of each model is in memory.
"""

# Shape suffixes: B = prompts of a batch, T = tokens, H = hidden size, I = inputs of a layer, O = outputs.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from hf_frmerge.calibration.blockwise_model import BlockwiseModel, Taps
from hf_frmerge.calibration.layers import (
    BlockLayers,
    LinearGroup,
    find_layers,
    matrix_of,
    put_matrix,
)
from hf_frmerge.calibration.least_squares import (
    Fit,
    FitOptions,
    Moments,
    fit_linear,
    fit_norm,
    low_rank,
    ridge_start,
    update_gram,
)
from hf_frmerge.calibration.streams import Batch
from hf_frmerge.calibration.weights import WeightReader
from hf_frmerge.errors import NonFiniteError

_TORCH_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float32}

_SAME = 1e-12
"""Squared relative change below which an expert's norm counts as the merge's: there is nothing to fit."""


@dataclass(frozen=True)
class SweepOptions:
    """
    Settings of a sweep.

    Attributes:
        fit: settings of every layer's fit; `residual` is for blocks that begin with a norm.
        post_norm_residual: `residual` for blocks that end with a norm, which bounds the drift of the stream.
        rank: rank of the low-rank form.
    """

    fit: FitOptions = field(default_factory=FitOptions)
    post_norm_residual: float = 1.0
    rank: int = 32


@dataclass(frozen=True)
class FittedBlock:
    """
    What a sweep found for one block, in the dtypes it is stored in.

    Attributes:
        corrections: parameter of the block -> what is added to the data-free merge.
        factors: weight of a linear layer -> the same in low rank, as factors `(rows, k)` and `(k, columns)`.
    """

    corrections: dict[str, Tensor]
    factors: dict[str, tuple[Tensor, Tensor]]


class Sweep:
    """
    One pass over the blocks.

    Args:
        model: The model's modules.
        reader: Reads the weights of experts, base and start.
        batches: Prompts of all experts; their hidden states are kept here.
        shares: Weights of the experts, summing to 1.
        options: Settings.
        is_full: Whether the experts are full fine-tunes, whose updates serve as a prior.

    Attributes:
        expert, merged: hidden states `(B, T, H)` of every batch, float32, after the blocks run so far.
        start, low_rank: those of the data-free merge and of the low-rank form; held-out batches only.
    """

    def __init__(
        self,
        model: BlockwiseModel,
        reader: WeightReader,
        batches: Sequence[Batch],
        shares: Sequence[float],
        options: SweepOptions,
        *,
        is_full: bool,
    ) -> None:
        self._model, self._reader, self._batches = model, reader, batches
        self._shares, self._options, self._is_full = list(shares), options, is_full
        self._n_experts = len(shares)
        self._held_out = [index for index, batch in enumerate(batches) if batch.is_held_out]
        self.expert: list[Tensor] = []
        self.merged: list[Tensor] = []
        self.start: dict[int, Tensor] = {}
        self.low_rank: dict[int, Tensor] = {}

    def begin(self) -> None:
        """Embed all prompts, with the experts' embeddings and with the merge's."""
        first = self._model.blocks[0]
        outer = self.outer(None)
        first_merged = self._block_weights(None, first)
        for batch in self._batches:
            hidden_BTH, batch.calls = self._model.begin(outer, first_merged, batch.inputs)
            self.merged.append(hidden_BTH)
        for expert in range(self._n_experts):
            outer, block = self.outer(expert), self._block_weights(expert, first)
            for index, batch in enumerate(self._batches):
                if batch.expert == expert:
                    hidden_BTH, _ = self._model.begin(outer, block, batch.inputs)
                    self.expert.insert(index, hidden_BTH)
        self.start = {index: self.merged[index] for index in self._held_out}
        self.low_rank = dict(self.start)

    def outer(self, expert: int | None) -> dict[str, Tensor]:
        """Return the weights outside the blocks, of an expert or of the data-free merge."""
        return {name: self._computed(self._read(expert, name), name) for name in self._model.outer_parameters()}

    def fit_block(self, index: int, known: FittedBlock | None = None) -> FittedBlock:
        """
        Fit a block and carry all hidden states through it.

        Args:
            index: Number of the block; they are fitted in order.
            known: What an earlier run found for it, so that it need not be fitted again.

        Raises:
            NonFiniteError: If hidden states are not finite.
        """
        name = self._model.blocks[index]
        start = self._block_weights(None, name, compute=False)
        experts = [self._block_weights(expert, name, compute=False) for expert in range(self._n_experts)]
        layers = find_layers(
            self._model, name, self._computed_all(start), self.merged[0], self._batches[0].calls[index]
        )
        work = _BlockWork(self, index, name, layers, start, experts)
        work.run_experts()
        if known is None:
            for step in layers.steps:
                if isinstance(step, LinearGroup):
                    work.fit_group(step)
                else:
                    work.fit_norm(step)
            known = self._stored(name, start, work)
        fitted = {
            key: values + known.corrections[key].float() if key in known.corrections else values
            for key, values in start.items()
        }
        low_rank = fitted | {key: start[key] + up.float() @ down.float() for key, (up, down) in known.factors.items()}
        everywhere = range(len(self._batches))
        for held, states, weights in (
            (everywhere, self.merged, fitted),
            (self._held_out, self.start, start),
            (self._held_out, self.low_rank, low_rank),
        ):
            self._carry(index, held, states, weights)
        return known

    def _carry(
        self, index: int, held: Sequence[int], states: list[Tensor] | dict[int, Tensor], weights: dict[str, Tensor]
    ) -> None:
        name, computed = self._model.blocks[index], self._computed_all(weights)
        for b in held:
            states[b] = self._model.run_block(name, computed, states[b], self._batches[b].calls[index])
            if not states[b].isfinite().all():
                raise NonFiniteError(
                    f"Block {name!r} of the merge gives values that are not finite for a prompt of expert "
                    f"{self._batches[b].expert + 1}. Leave out such prompts, or merge without calibration."
                )

    def _stored(self, name: str, start: dict[str, Tensor], work: _BlockWork) -> FittedBlock:
        """Return what was found in the dtypes of the output, so that the sweep goes on with what will be written."""
        dtypes = {key: _TORCH_DTYPES[self._reader.dtype(f"{name}.{key}")] for key in start}
        corrections = {
            key: (work.weights[key] - start[key]).to(dtypes[key])
            for key in start
            if work.weights[key] is not start[key]
        }
        factors = {key: tuple(f.to(dtypes[key]) for f in pair) for key, pair in work.factors.items()}
        return FittedBlock(corrections, factors)  # type: ignore[arg-type]  # of two, still

    # Weights

    def _read(self, expert: int | None, name: str) -> Tensor:
        values = self._reader.start(name) if expert is None else self._reader.expert(expert, name)
        return values.to(self._model.device)

    def _block_weights(self, expert: int | None, block: str, *, compute: bool = True) -> dict[str, Tensor]:
        names = self._model.block_parameters(block)
        weights = {name: self._read(expert, f"{block}.{name}") for name in names}
        return self._computed_all(weights) if compute else weights

    def _computed_all(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: self._computed(value, name) for name, value in weights.items()}

    def _computed(self, value: Tensor, name: str) -> Tensor:
        """Matrices in the dtype of the products: autocast would convert them for every batch."""
        return value.to(self._model.dtype) if value.ndim > 1 and "embed" not in name else value


class _BlockWork:
    """Fit of one block: the experts' inputs to every layer, and the weights as they are fitted."""

    def __init__(
        self,
        sweep: Sweep,
        index: int,
        name: str,
        layers: BlockLayers,
        start: dict[str, Tensor],
        experts: list[dict[str, Tensor]],
    ) -> None:
        self._sweep, self._index, self._name, self._layers = sweep, index, name, layers
        self._start, self._experts = start, experts
        self.weights = dict(start)
        self.factors: dict[str, tuple[Tensor, Tensor]] = {}
        self._model = sweep._model
        self._module = self._model.block(name)
        options = sweep._options
        kappa = options.fit.update_prior if sweep._is_full else 0.0
        residual = options.post_norm_residual if layers.is_post_norm else options.fit.residual
        self._fit = replace(options.fit, update_prior=kappa, residual=residual)
        self._fitted = [b for b, batch in enumerate(sweep._batches) if not batch.is_held_out]
        # Of the experts, by batch and layer: what enters a group, what a norm gives, the stream before a layer writes.
        self._inputs: dict[tuple[int, str], Tensor] = {}
        self._norm_outputs: dict[tuple[int, str], Tensor] = {}
        self._streams: dict[tuple[int, str], Tensor] = {}
        self._token_weights: dict[tuple[int, str], Tensor] = {}

    def run_experts(self) -> None:
        """Run the experts' blocks, and keep what enters their layers."""
        sweep = self._sweep
        names = [group.names[0] for group in self._layers.groups] + self._layers.norms
        for expert in range(sweep._n_experts):
            computed = sweep._computed_all(self._experts[expert])
            for b, batch in enumerate(sweep._batches):
                if batch.expert != expert:
                    continue
                with Taps(self._module, [] if batch.is_held_out else names) as taps:
                    after_BTH = self._run(computed, b, sweep.expert[b])
                for group in [] if batch.is_held_out else self._layers.groups:
                    key = (b, group.names[0])
                    self._inputs[key] = batch.tokens(taps.inputs[group.names[0]])
                    if group.writes:
                        sum_TH = batch.tokens(self._sum_after(group, taps, after_BTH)).float()
                        self._streams[key] = sum_TH - batch.tokens(taps.outputs[group.names[0]]).float()
                        self._token_weights[key] = 1 / sum_TH.square().mean(1)
                for norm in [] if batch.is_held_out else self._layers.norms:
                    self._norm_outputs[b, norm] = batch.tokens(taps.outputs[norm])
                sweep.expert[b] = after_BTH
        for group in self._layers.groups:
            if group.writes:
                self._normalise(group.names[0])

    def fit_group(self, group: LinearGroup) -> None:
        """Fit the linear layers of a group."""
        if not any(self._changes(name) for name in group.names):
            return
        has_bias = any(f"{name}.bias" in self._start for name in group.names)
        moments = self._moments(group, has_bias)
        for name in group.names:
            biased = f"{name}.bias" in self._start
            of_layer = moments if biased == has_bias else [_without_bias(m) for m in moments]
            fit = self._fit_layer(name, of_layer, biased)
            put_matrix(self._module, self.weights, name, fit.weight_OI.float())
            start_OI = matrix_of(self._module, self._start, name)
            n_in = start_OI.shape[1] - biased
            # A correction of the bias is kept as it is; the metric of the other inputs is the system without it.
            metric = fit.metric_II if not biased else fit.metric_II[:n_in, :n_in]
            up, down = low_rank((fit.weight_OI - start_OI)[:, :n_in], metric, min(self._sweep._options.rank, n_in))
            is_flipped = isinstance(self._module.get_submodule(name), Conv1D)
            self.factors[f"{name}.weight"] = (down.T.contiguous(), up.T.contiguous()) if is_flipped else (up, down)

    def fit_norm(self, norm: str) -> None:
        """Fit gain and shift of a norm, if the experts have other ones than the merge."""
        gain, shift = self._start[f"{norm}.weight"], self._start.get(f"{norm}.bias")
        changes = [(e[f"{norm}.weight"] - gain).square().sum() / gain.square().sum() for e in self._experts]
        if max(float(change) for change in changes) < _SAME:
            return
        module = self._module.get_submodule(norm)
        unit, zero = torch.ones_like(gain), torch.zeros_like(gain)
        shifts = {} if shift is None else {"bias": zero}
        normalised: list[list[Tensor]] = [[] for _ in self._experts]
        targets: list[list[Tensor]] = [[] for _ in self._experts]
        offset = zero
        for b in self._fitted:
            batch = self._sweep._batches[b]
            entering = self._enter(b, norm)
            with torch.no_grad():
                at_one = torch.func.functional_call(module, {"weight": unit, **shifts}, (entering,)).float()
                at_zero = torch.func.functional_call(module, {"weight": zero, **shifts}, (entering,)).float()
            x_BTH = at_one - at_zero
            # Some norms scale by 1 + gain: what is left at a gain of zero, as a share of the normalised input.
            offset = (at_zero * x_BTH).sum() / x_BTH.square().sum().clamp_min(1e-30) * unit
            normalised[batch.expert].append(batch.tokens(x_BTH))
            targets[batch.expert].append(self._norm_outputs[b, norm].float())
        empty = torch.zeros(0, len(gain), device=gain.device)
        fitted = fit_norm(
            [torch.cat(xs) if xs else empty for xs in normalised],
            [torch.cat(ts) if ts else empty for ts in targets],
            self._sweep._shares,
            (gain, shift),
            offset.double(),
        )
        self.weights[f"{norm}.weight"] = fitted[0].float()
        if fitted[1] is not None:
            self.weights[f"{norm}.bias"] = fitted[1].float()

    # Parts

    def _fit_layer(self, name: str, moments: list[Moments], biased: bool) -> Fit:
        start_OI = matrix_of(self._module, self._start, name)
        experts_OI = [matrix_of(self._module, expert, name) for expert in self._experts]
        priors = None
        if self._fit.update_prior:
            base_OI = self._base_matrix(name)
            deltas = [expert_OI[:, : base_OI.shape[1]] - base_OI for expert_OI in experts_OI]
            priors = [update_gram(delta) for delta in deltas]
            start_OI = start_OI.clone()
            start_OI[:, : base_OI.shape[1]] = ridge_start(base_OI, deltas, priors)
        try:
            return fit_linear(
                moments, self._sweep._shares, start_OI, experts_OI, self._fit, has_bias=biased, priors_II=priors
            )
        except NonFiniteError as error:
            raise NonFiniteError(f"{self._name}.{name}: {error}. Leave out the prompts that cause it.") from error

    def _base_matrix(self, name: str) -> Tensor:
        base = self._sweep._reader.base(f"{self._name}.{name}.weight")
        assert base is not None
        weights = {f"{name}.weight": base.to(self._model.device)}
        return matrix_of(self._module, weights, name)

    def _moments(self, group: LinearGroup, has_bias: bool) -> list[Moments]:
        """Return the moments of every expert's prompts, from the merge as fitted so far."""
        first, sweep = group.names[0], self._sweep
        n_in = self._inputs[self._fitted[0], first].shape[1] + has_bias
        n_out = sweep.merged[0].shape[-1] if group.writes else None
        moments = [Moments.zeros(n_in, n_out, self._model.device) for _ in self._experts]
        for b in self._fitted:
            batch = sweep._batches[b]
            if group.writes:
                entering, stream_TH = self._enter_writer(b, group)
                drift_TH = self._streams.pop((b, first)) - stream_TH
            else:
                entering, drift_TH = self._enter(b, first), None
            merged_TI = batch.tokens(entering).float()
            expert_TI = self._inputs.pop((b, first)).float()
            if has_bias:
                merged_TI, expert_TI = _with_one(merged_TI), _with_one(expert_TI)
            moments[batch.expert].add(merged_TI, expert_TI, self._token_weights.get((b, first)), drift_TH)
        return moments

    def _enter(self, b: int, name: str) -> Tensor:
        """Return what enters a layer in the merge as fitted so far."""
        with Taps(self._module, [name], last=name) as taps:
            self._run(self._sweep._computed_all(self.weights), b, self._sweep.merged[b])
        return taps.inputs[name]

    def _enter_writer(self, b: int, group: LinearGroup) -> tuple[Tensor, Tensor]:
        """Return what enters a writing layer, and the residual stream `(tokens, H)` before its output is added."""
        first, batch = group.names[0], self._sweep._batches[b]
        names = [first, *([group.norm_after] if group.norm_after else [])]
        after = torch.zeros(0)
        with Taps(self._module, names, last=group.norm_after) as taps:
            after = self._run(self._sweep._computed_all(self.weights), b, self._sweep.merged[b])
        sum_TH = batch.tokens(self._sum_after(group, taps, after)).float()
        return taps.inputs[first], sum_TH - batch.tokens(taps.outputs[first]).float()

    def _sum_after(self, group: LinearGroup, taps: Taps, after_BTH: Tensor) -> Tensor:
        return taps.inputs[group.norm_after] if group.norm_after else after_BTH

    def _run(self, weights: dict[str, Tensor], b: int, hidden_BTH: Tensor) -> Tensor:
        return self._model.run_block(self._name, weights, hidden_BTH, self._sweep._batches[b].calls[self._index])

    def _normalise(self, first: str) -> None:
        """Scale the weights of each expert's tokens to a mean of 1."""
        for expert in range(self._sweep._n_experts):
            keys = [(b, first) for b in self._fitted if self._sweep._batches[b].expert == expert]
            if keys:
                mean = torch.cat([self._token_weights[key] for key in keys]).mean()
                for key in keys:
                    self._token_weights[key] = self._token_weights[key] / mean

    def _changes(self, name: str) -> bool:
        return self._sweep._reader.changes(f"{self._name}.{name}.weight")


def _with_one(values_TI: Tensor) -> Tensor:
    return torch.cat([values_TI, values_TI.new_ones(len(values_TI), 1)], dim=1)


def _without_bias(moments: Moments) -> Moments:
    drift = moments.drift_IO
    return Moments(
        moments.merged_II[:-1, :-1],
        moments.cross_II[:-1, :-1],
        None if drift is None else drift[:-1],
        moments.n_tokens,
    )
