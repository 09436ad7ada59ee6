"""Fit the head, which makes logits of the last hidden states."""

# Shape suffixes: V = vocabulary, I = inputs of the head, T = tokens, B = prompts of a batch, H = hidden size.

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hf_frmerge.calibration.blocks.blockwise_model import BlockwiseModel, Taps, Weights
from hf_frmerge.calibration.blocks.forward import run_forward, squared_distances
from hf_frmerge.calibration.blocks.streams import Batch
from hf_frmerge.calibration.fits.coefficient_rows import TableEquations
from hf_frmerge.calibration.fits.least_squares import Fit, FitOptions, System, fit_linear
from hf_frmerge.calibration.fits.sweep_state import SweepState
from hf_frmerge.errors import NonFiniteError

_ENOUGH = 0.85
"""
Share of the start's squared distance that a fitted head may leave: 0.24 was left of three real fine-tunes and 0.59 to
0.82 of five of a small mixture of experts, whose merges came 14 to 29 % nearer to them by it; 0.87 or more where
embeddings differed at random, and the fit of the blocks suffered.
"""


@dataclass(frozen=True)
class Head:
    """
    Head of a language model.

    Attributes:
        module: path of the linear layer.
        parameter: its weight, which may have the name of the embedding.
        is_embedding: whether the weight is that of the embedding, too: then the fit also changes what enters the
            first block.
    """

    module: str
    parameter: str
    is_embedding: bool


def find_head(model: Any) -> Head | None:
    """Return the head of a transformers model; `None` if it has none that is a linear layer."""
    module = model.get_output_embeddings()
    if not isinstance(module, nn.Linear):
        return None
    path = next(name for name, other in model.named_modules() if other is module)
    parameter = next(name for name, other in model.named_parameters() if other is module.weight)
    embedding = getattr(model.get_input_embeddings(), "weight", None)
    return Head(path, parameter, module.weight is embedding)


@dataclass(frozen=True)
class FittedHead:
    """
    What a fit adds to the weight of a head.

    Attributes:
        correction_VI: to the merge without data, in the dtype it is stored in.
        coefficients_VN: to the experts' coefficients, float64: the nearest sum of what they learned, row by row;
            `None` if no table is looked for.
    """

    correction_VI: Tensor
    coefficients_VN: Tensor | None


def fit_head(state: SweepState, head: Head) -> FittedHead | None:
    """
    Fit the weight of the head; a bias stays as merged.

    Args:
        state: Modules, and the prompts of all experts.
        head: The head, which has to be merged.

    Returns:
        `None` if it does not help: on held-out prompts experts that get it in place of their own do not stay clearly
        nearer to themselves than those that get the head of the merge without data. So it is where a head that is the
        embedding, too, changes what enters the blocks by more than it gains; and where hidden states are not finite.
    """
    reader, name, device = state.reader, head.parameter, state.model.device
    start_VI = reader.start(name).to(device)
    try:
        fit = _fit(state, head, start_VI)
    except NonFiniteError:
        return None  # the fit of the blocks, which comes next, says in which layer it begins
    difference_VI = fit.weight_OI.sub_(start_VI)  # in place: in float64 it is the largest thing in memory
    correction_VI = difference_VI.to(reader.torch_dtype(name))
    if not _helps(state, head, start_VI, start_VI + correction_VI.float()):
        return None
    if not state.offers_table:
        return FittedHead(correction_VI, None)
    origin_VI = state.origin(name, start_VI)
    equations = TableEquations.of(
        difference_VI,
        lambda expert: reader.expert(expert, name).to(device) - origin_VI,
        state.n_experts,
        fit.system_II,
        state.summed,
    )
    state.processes.add_up([equations.gram_ONN, equations.pull_ON])
    return FittedHead(correction_VI, equations.solve(by_row=True))


def _fit(state: SweepState, head: Head, start_VI: Tensor) -> Fit:
    """
    Fit the weight, `(V, I)`, to the experts' logits.

    With X_i what enters the head of expert i on its prompts, of n_i tokens, and W_s the merge without data,

        W = argmin sum_i alpha_i / n_i |X_i (W - W_i)^T|^2 + lambda mu |W - W_s|^2

    It is fitted before the blocks, to what enters the experts' heads, and not behind them to what enters the merge's:
    where the head is the embedding, too, blocks then are fitted to what it gives them. Whichever was fitted first,
    the merge's predictions were as close to the experts'.
    """
    model, device = state.model, state.model.device
    system = System.zeros(start_VI.shape[1], len(start_VI), device)
    for expert in state.own:
        batches = [batch for batch in state.batches if batch.expert == expert and not batch.is_held_out]
        if not batches:
            continue
        gram_II = torch.zeros_like(system.gram_II)
        ran = run_forward(model, partial(state.reader.expert, expert), batches)
        for batch, hidden_BTH in zip(batches, ran.hidden):
            entering_TI = _entering(model, head, ran.outer, hidden_BTH, batch)
            gram_II += entering_TI.T @ entering_TI
        del ran  # its weights outside of the blocks
        factor = state.shares[expert] / state.n_tokens[expert]
        system.gram_II.add_(gram_II, alpha=factor)
        system.pull_IO.addmm_(gram_II, state.reader.expert(expert, head.parameter).to(device).T, alpha=factor)
    state.processes.add_up([system.gram_II, system.pull_IO])
    return fit_linear(system, start_VI, FitOptions(ridge=state.options.fit.ridge), has_bias=False)


def _entering(model: BlockwiseModel, head: Head, outer: Weights, hidden_BTH: Tensor, batch: Batch) -> Tensor:
    """Return what enters the head, `(T, I)`, without making logits of it."""
    with Taps(model.model, [head.module], last=head.module) as taps:
        model.finish(outer, hidden_BTH, batch.inputs)
    return batch.tokens(taps.inputs[head.module]).float()


def _helps(state: SweepState, head: Head, start_VI: Tensor, fitted_VI: Tensor) -> bool:
    """Whether experts whose head is replaced by the fitted one stay clearly nearer to themselves than by the start."""
    sums = [0.0, 0.0]
    for expert in state.own:
        batches = [batch for batch in state.batches if batch.expert == expert and batch.is_held_out]
        if not batches:
            continue
        read = partial(state.reader.expert, expert)
        own = run_forward(state.model, read, batches)
        for place, head_VI in enumerate((start_VI, fitted_VI)):
            replaced = run_forward(state.model, partial(_read, {head.parameter: head_VI}, read), batches)
            sums[place] += float(squared_distances(replaced, own).sum())
    start, fitted = np.sum(state.processes.gather([sums]), axis=0)
    return bool(fitted < _ENOUGH * start)


def _read(given: Weights, read: Callable[[str], Tensor], name: str) -> Tensor:
    return given[name] if name in given else read(name)
