"""
Fit a merge to its experts, block by block, in the order of the forward pass.

Two hidden states are carried along for every prompt: that of its expert, and that of the merge as it has been fitted
so far. Every layer is fitted to inputs that the merge really has there, so that it can repair what the layers before
it got wrong. Only one block of each model is in memory, and of experts whose prompts other processes have none.
"""

# Shape suffixes: B = prompts of a batch, T = tokens, H = hidden size.

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from hf_frmerge.calibration.blocks.blockwise_model import BlockwiseModel, Weights
from hf_frmerge.calibration.blocks.layers import find_layers
from hf_frmerge.calibration.blocks.streams import Batch
from hf_frmerge.calibration.blocks.weights import UnreadWeights, WeightReader
from hf_frmerge.calibration.fits.block_fit import BlockFit
from hf_frmerge.calibration.fits.coefficient_rows import combined
from hf_frmerge.calibration.fits.head_fit import find_head, fit_head
from hf_frmerge.calibration.fits.last_layers import LastLayersFit, find_last_layers
from hf_frmerge.calibration.fits.layers_fit import LayersFit
from hf_frmerge.calibration.fits.sweep_state import SweepOptions, SweepState
from hf_frmerge.errors import NonFiniteError
from hf_frmerge.merging.engine.processes import Processes


@dataclass(frozen=True)
class FittedBlock:
    """
    What a sweep found for one block, in the dtypes it is stored in.

    Attributes:
        corrections: parameter of the block -> what is added to the data-free merge.
        factors: weight of a linear layer -> the same in low rank, as factors `(rows, k)` and `(k, columns)`.
        coefficients: parameter -> what the table form adds to the experts' coefficients, `(rows, N)` or `(1, N)`.
    """

    corrections: dict[str, Tensor]
    factors: dict[str, tuple[Tensor, Tensor]]
    coefficients: dict[str, Tensor] = field(default_factory=dict)


def by_parameter(model: BlockwiseModel, found: Sequence[FittedBlock]) -> FittedBlock:
    """Join what was found for all blocks, and for what is behind them, by the names of the model's parameters."""
    joined = FittedBlock({}, {})
    for prefix, block in zip([*(f"{name}." for name in model.blocks), ""], found):
        joined.corrections.update({f"{prefix}{name}": values for name, values in block.corrections.items()})
        joined.factors.update({f"{prefix}{name}": pair for name, pair in block.factors.items()})
        joined.coefficients.update({f"{prefix}{name}": values for name, values in block.coefficients.items()})
    return joined


class LayerFit(Protocol):
    """
    Fit of the layers of one block.

    Attributes:
        weights: weights as fitted so far, float32; those that are not fitted are the start's own tensors.
        factors: weight of a linear layer -> its correction as factors `(rows, k)` and `(k, columns)`.
        coefficients: parameter -> what the table form adds to the experts' coefficients; empty if there is none.
    """

    weights: dict[str, Tensor]
    factors: dict[str, tuple[Tensor, Tensor]]
    coefficients: dict[str, Tensor]

    def run_experts(self) -> None:
        """Run the experts' blocks on all their prompts, and keep what the fit needs."""
        ...

    def fit(self) -> None:
        """Fit all layers."""
        ...


class Sweep:
    """
    One pass over the blocks.

    Args:
        model, reader, batches, shares, options, is_full, offers_table: See `SweepState`.
        fit_of: Makes the fit of a block, from the arguments of `BlockFit`.
        processes: Processes that share the prompts, each with `batches` of its own; by default this one has all.

    Attributes:
        state: what is carried through the blocks.
        head: the head that is fitted; `None` if there is none.
        start, table, low_rank: hidden states of the data-free merge and of two forms; held-out batches only.
        gives_logits: whether the model predicts something, or gives hidden states; known once the sweep has begun.
        predicts_tokens: likewise, whether it gives an output for every token, or one for a prompt, as a classifier.
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
        offers_table: bool = False,
        fit_of: Callable[..., LayerFit] = BlockFit,
        processes: Processes | None = None,
    ) -> None:
        processes = processes or Processes(alone=True)
        self.state = SweepState(model, reader, batches, list(shares), options, is_full, processes, offers_table)
        self._fit_of = fit_of
        head = find_head(model.model) if options.fits_outer else None
        self.head = head if head is not None and reader.is_merged(head.parameter) else None
        self._outer_found = FittedBlock({}, {})
        self._held_out = [index for index, batch in enumerate(batches) if batch.is_held_out]
        self.start: dict[int, Tensor] = {}
        self.table: dict[int, Tensor] = {}
        self.low_rank: dict[int, Tensor] = {}
        self.gives_logits = self.predicts_tokens = True

    def begin(self) -> None:
        """
        Embed all prompts, with the experts' embeddings and with the merge's.

        Raises:
            ArgumentError: If the model does not run on text alone, or gives nothing to judge the fit by: before the
                long work, and not after it.
        """
        state, first = self.state, self.state.model.blocks[0]
        state.n_tokens, state.summed = self._count_tokens(), self._experts_to_sum()
        outer, block = self.outer(None), state.computed(self._block_weights(None, first))
        for batch in state.batches:
            hidden_BTH, batch.calls = state.model.begin(outer, block, batch.inputs)
            state.merged.append(hidden_BTH)
        outputs = state.model.finish(outer, state.merged[0][:1], state.batches[0].prompt(0))
        self.gives_logits, self.predicts_tokens = outputs.is_logits, outputs.values.ndim > 2
        of_experts: dict[int, Tensor] = {}
        for expert in state.own:
            outer = self.outer(expert)
            for index, batch in enumerate(state.batches):
                if batch.expert == expert:
                    of_experts[index], _ = state.model.begin(outer, block, batch.inputs)
        state.expert = [of_experts[index] for index in range(len(state.batches))]
        self.start = {index: state.merged[index] for index in self._held_out}
        self.table, self.low_rank = dict(self.start), dict(self.start)

    def _count_tokens(self) -> list[int]:
        """Return the tokens of every expert that take part in the fit, in all processes."""
        state = self.state
        counts = torch.zeros(state.n_experts, dtype=torch.int64)
        for batch in state.batches:
            if not batch.is_held_out:
                counts[batch.expert] += batch.n_tokens
        state.processes.add_up([counts])
        return counts.tolist()

    def _experts_to_sum(self) -> list[int]:
        """Return the experts of which this is the first process that has prompts; those without go in turns."""
        state, processes = self.state, self.state.processes
        of_all = processes.gather([state.own])
        first_of = {expert: rank for rank, own in reversed([*enumerate(of_all)]) for expert in own}
        experts = range(state.n_experts)
        return [expert for expert in experts if first_of.get(expert, expert % processes.size) == processes.rank]

    def outer(self, expert: int | None) -> dict[str, Tensor]:
        """Return the weights outside the blocks, of an expert or of the data-free merge."""
        return self.state.computed({name: self._read(expert, name) for name in self.state.model.outer_parameters()})

    @property
    def n_parts(self) -> int:
        """Number of blocks, and one more if what lies behind them is fitted."""
        return len(self.state.model.blocks) + self.state.options.fits_outer

    def tensors(self, index: int) -> dict[str, str]:
        """Return parameter of a block -> its tensor; those outside of all blocks behind the last one."""
        model, tensors = self.state.model, self.state.reader.tensors
        if index == len(model.blocks):
            return {name: tensors[name] for name in model.outer_parameters()}
        name = model.blocks[index]
        return {key: tensors[f"{name}.{key}"] for key in model.block_parameters(name)}

    def fit_block(self, index: int, known: FittedBlock | None = None) -> FittedBlock:
        """
        Fit a block and carry all hidden states through it.

        Args:
            index: Number of the block; they are fitted in order.
            known: What an earlier run found for it, so that it need not be fitted again.

        Raises:
            NonFiniteError: If hidden states are not finite.
        """
        state, name = self.state, self.state.model.blocks[index]
        start = self._block_weights(None, name)
        experts = [self._expert_weights(expert, name) for expert in range(state.n_experts)]
        call = state.batches[0].calls[index]
        layers = find_layers(state.model, name, state.computed(start), state.merged[0], call)
        if state.processes.size > 1:  # which tokens an expert of a mixture sees depends on the prompts
            (layers,) = state.processes.gather([layers] if state.processes.is_main else [])
        fit = self._fit_of(state, index, layers, start, experts)
        fit.run_experts()
        if known is None:
            fit.fit()
            known = self._stored(f"{name}.", start, fit)
        self._carry(index, range(len(state.batches)), state.merged, _corrected(start, known))
        self._carry(index, self._held_out, self.start, start)
        self._carry(index, self._held_out, self.low_rank, _with_factors(start, known))
        if state.offers_table:
            self._carry(index, self._held_out, self.table, self._table(f"{name}.", known, start, experts))
        return known

    def fit_head(self, known: FittedBlock | None = None) -> FittedBlock:
        """
        Fit the head, before the first block.

        Args:
            known: What an earlier run found for it.
        """
        state, head = self.state, self.head
        assert head is not None
        if known is None:
            found = fit_head(state, head)
            known = FittedBlock({}, {})
            if found is not None:
                # Not as factors: an embedding of low rank would be another one for words that no prompt has.
                known.corrections[head.parameter] = found.correction_VI
            if found is not None and found.coefficients_VN is not None:
                known.coefficients[head.parameter] = found.coefficients_VN
        self._outer_found = known
        if head.is_embedding and known.corrections:
            self._embed(state.merged, range(len(state.batches)), self.fitted_outer())
            self.low_rank = {b: state.merged[b] for b in self._held_out}
            if state.offers_table:
                self._embed(self.table, self._held_out, self.fitted_outer(as_table=True))
        return known

    def fit_last_layers(self, known: FittedBlock | None = None) -> FittedBlock:
        """
        Fit what is behind the last block of a model without a head to fit: a pooler, the head of a classifier.

        Args:
            known: What an earlier run found for it.
        """
        state, names = self.state, self.state.model.outer_parameters()
        if known is None:
            start = {name: self._read(None, name) for name in names}
            experts = [UnreadWeights(names, partial(self._read, expert)) for expert in range(state.n_experts)]
            prompt = state.merged[0][:1], state.batches[0].prompt(0)
            fit = LastLayersFit(state, find_last_layers(state.model, state.computed(start), *prompt), start, experts)
            fit.fit()
            known = self._stored("", start, fit)
        self._outer_found = known
        return known

    def fitted_outer(self, *, as_table: bool = False) -> dict[str, Tensor]:
        """Return the fitted weights outside the blocks, whole or in the table form."""
        names = list(self._outer_found.corrections)
        start = {name: self._read(None, name) for name in names}
        if as_table:
            experts = [UnreadWeights(names, partial(self._read, expert)) for expert in range(self.state.n_experts)]
            return self.state.computed(self._table("", self._outer_found, start, experts))
        return self.state.computed(_corrected(start, self._outer_found))

    def _embed(self, hidden: list[Tensor] | dict[int, Tensor], held: Iterable[int], fitted: Weights) -> None:
        """Embed some batches of the merge, with weights that were fitted."""
        state, outer = self.state, {**self.outer(None), **fitted}
        for b in held:
            hidden[b], _ = state.model.begin(outer, {}, state.batches[b].inputs)

    def _table(
        self, prefix: str, known: FittedBlock, start: dict[str, Tensor], experts: Sequence[Weights]
    ) -> dict[str, Tensor]:
        """Return the weights of a block in the table form; `prefix` is that of the names of its parameters."""
        weights = dict(start)
        for key, coefficients_RN in known.coefficients.items():
            origin = self.state.origin(f"{prefix}{key}", start[key])
            weights[key] = combined(start[key], (expert[key] - origin for expert in experts), coefficients_RN)
        return weights

    def _carry(
        self, index: int, held: Iterable[int], hidden: list[Tensor] | dict[int, Tensor], weights: dict[str, Tensor]
    ) -> None:
        """Carry hidden states of some batches through a block."""
        state, name = self.state, self.state.model.blocks[index]
        computed = state.computed(weights)
        for b in held:
            hidden[b] = state.model.run_block(name, computed, hidden[b], state.batches[b].calls[index])
            if not hidden[b].isfinite().all():
                raise NonFiniteError(
                    f"Block {name!r} of the merge gives values that are not finite for a prompt of expert "
                    f"{state.batches[b].expert + 1}. Leave out such prompts, or merge without calibration."
                )

    def _stored(self, prefix: str, start: dict[str, Tensor], fit: LayersFit | LayerFit) -> FittedBlock:
        """Return what was found in the dtypes of the output, so that the sweep goes on with what will be written."""
        dtypes = {key: self.state.reader.torch_dtype(f"{prefix}{key}") for key in start}
        corrections = {
            key: (fit.weights[key] - start[key]).to(dtypes[key]) for key in start if fit.weights[key] is not start[key]
        }
        factors = {key: (up.to(dtypes[key]), down.to(dtypes[key])) for key, (up, down) in fit.factors.items()}
        return FittedBlock(corrections, factors, fit.coefficients)

    def _read(self, expert: int | None, name: str) -> Tensor:
        reader = self.state.reader
        values = reader.start(name) if expert is None else reader.expert(expert, name)
        return values.to(self.state.model.device)

    def _expert_weights(self, expert: int, block: str) -> Weights:
        """Return an expert's weights: in memory if its prompts are of this process, and else read one by one."""
        if expert in self.state.own:
            return self._block_weights(expert, block)
        names = self.state.model.block_parameters(block)
        return UnreadWeights(names, lambda name: self._read(expert, f"{block}.{name}"))

    def _block_weights(self, expert: int | None, block: str) -> dict[str, Tensor]:
        names = self.state.model.block_parameters(block)
        return {name: self._read(expert, f"{block}.{name}") for name in names}


def _corrected(start: Weights, found: FittedBlock) -> dict[str, Tensor]:
    """Return weights of the merge without data plus whole corrections."""
    corrections = found.corrections
    return {key: values + corrections[key].float() if key in corrections else values for key, values in start.items()}


def _with_factors(start: Weights, found: FittedBlock) -> dict[str, Tensor]:
    """Return weights in the low-rank form: plus products of factors, or whole corrections where there are none."""
    weights = _corrected(start, found)
    return weights | {key: start[key] + up.float() @ down.float() for key, (up, down) in found.factors.items()}
