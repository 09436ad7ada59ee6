"""Whom a refinement learns from: on every text its own expert, or the barycentre of what all experts predict."""

# Shape suffixes: B = prompts, T = tokens, H = hidden size, R = rows (tokens, or the prompts of a classifier),
# N = experts, V = outcomes or hidden size.

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from hf_frmerge.calibration.blocks.blockwise_model import Outputs
from hf_frmerge.calibration.blocks.forward import run_forward
from hf_frmerge.calibration.blocks.outputs import outputs_of
from hf_frmerge.calibration.blocks.streams import Batch
from hf_frmerge.calibration.sweep import Sweep
from hf_frmerge.geometry.simplex import barycentre_coefficients


class Teachers:
    """
    The experts as teachers.

    What is kept of a text are hidden states after the last block: predictions would be as many times larger as the
    vocabulary has more entries than a hidden state.

    Args:
        sweep: After its last block.
        is_barycentre: Whether all experts teach on every text, by their barycentre, or each on its own texts alone.
    """

    def __init__(self, sweep: Sweep, *, is_barycentre: bool) -> None:
        self._state, self._is_barycentre = sweep.state, is_barycentre
        # Their weights outside the blocks: one and the same for all where these are not merged.
        behind_blocks = self._state.model.behind_blocks
        if any(map(self._state.reader.is_merged, self._state.model.outer_parameters())):
            self._outer = [behind_blocks(sweep.outer(expert)) for expert in range(self._state.n_experts)]
        else:
            self._outer = [behind_blocks(sweep.outer(None))] * self._state.n_experts

    def hidden(self, batches: Sequence[Batch], own: Sequence[Tensor] | None = None) -> list[dict[int, Tensor]]:
        """
        Return by batch: teacher -> its hidden states `(B, T, H)` after the last block.

        Teachers run one after another; one block of one of them is in memory at a time.

        Args:
            batches: Texts, each of one expert.
            own: Hidden states of that expert, where they are known.
        """
        found: list[dict[int, Tensor]] = [{} for _ in batches]
        for known, batch, hidden_BTH in zip(found, batches, own or ()):
            known[batch.expert] = hidden_BTH
        for expert in range(self._state.n_experts):
            taught = [
                (known, batch)
                for known, batch in zip(found, batches)
                if expert not in known and (self._is_barycentre or expert == batch.expert)
            ]
            if taught:
                read = partial(self._state.reader.expert, expert)
                ran = run_forward(self._state.model, read, [batch for _, batch in taught])
                for (known, _), hidden_BTH in zip(taught, ran.hidden):
                    known[expert] = hidden_BTH
        return found

    def outputs(self, hidden: Mapping[int, Tensor], inputs: Mapping[str, Tensor]) -> Outputs:
        """Return what is taught on some texts, from the teachers' hidden states of them."""
        found = [
            outputs_of(self._state.model, self._outer[expert], hidden_BTH, inputs)
            for expert, hidden_BTH in sorted(hidden.items())
        ]
        return barycentre_of(found, self._state.shares) if self._is_barycentre else found[0]


def barycentre_of(outputs: Sequence[Outputs], weights: Sequence[float]) -> Outputs:
    """
    Return the Fisher-Rao barycentre of predictions, as their logarithms; of hidden states that of their directions.

    It is the Karcher mean of points on a sphere, the square roots of probabilities, and thus a sum of them, by
    coefficients that their mutual chords decide (`geometry.simplex.barycentre_coefficients`).

    Args:
        outputs: Of every expert for the same rows, `(R, V)`.
        weights: Of the experts, summing to 1.
    """
    are_logits = outputs[0].is_logits
    points_NRV = torch.stack(
        [
            (torch.log_softmax(one.values, dim=-1) / 2).exp()
            if are_logits
            else torch.nn.functional.normalize(one.values, dim=-1)
            for one in outputs
        ]
    )
    chords_RNN = torch.stack([(points_NRV - point_RV).square().sum(-1).T for point_RV in points_NRV], dim=-1)
    coefficients_RN = barycentre_coefficients(chords_RNN.double().cpu().numpy(), weights)
    coefficients_NR1 = torch.from_numpy(coefficients_RN.T[..., None].copy()).to(points_NRV)
    sum_RV = (coefficients_NR1 * points_NRV).sum(0)
    if not are_logits:
        return Outputs(sum_RV, is_logits=False)
    return Outputs(2 * sum_RV.clamp_min(torch.finfo(sum_RV.dtype).tiny).log(), is_logits=True)
