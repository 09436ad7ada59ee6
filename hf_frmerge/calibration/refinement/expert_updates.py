"""
What experts changed, times coefficients that gradients reach, and the coefficients that a refinement begins with.

Coefficients are named `NAME.coefficients`, by parameters; as in the table form they are what is added to those of the
merge without data.
"""

# Shape suffixes: R = rows with coefficients of their own (1 for all rows together), N = experts.

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from hf_frmerge.calibration.blocks.blockwise_model import Weights
from hf_frmerge.calibration.fits.coefficient_rows import combined
from hf_frmerge.calibration.fits.sweep_state import SweepState
from hf_frmerge.calibration.sweep import FittedBlock, by_parameter
from hf_frmerge.merging.planning.coefficient_table import write_coefficients

COEFFICIENTS = ".coefficients"


class ExpertUpdates:
    """
    What the experts changed of the base.

    The factors of adapters are read once and kept; what a full model changed is read whenever it is asked for, so that
    the updates of one block only are in memory.

    Args:
        state: Reader of the weights, and their device.
    """

    def __init__(self, state: SweepState) -> None:
        self._state = state
        self._factors: dict[str, dict[int, tuple[Tensor, Tensor]]] = {}

    def add(self, name: str, start: Tensor, coefficients_RN: Tensor) -> Tensor:
        """Return a parameter plus the sum of the experts' updates by coefficients, which gradients reach."""
        state, factors = self._state, self._factors_of(name)
        full = [expert for expert in range(state.n_experts) if expert not in factors]
        if full:
            origin = state.origin(name, start)
            updates = [state.reader.expert(expert, name).to(start.device).sub_(origin) for expert in full]
            start = combined(start, updates, coefficients_RN[:, full])
        if factors:
            up = torch.cat([coefficients_RN[:, expert, None] * up for expert, (up, _) in factors.items()], dim=1)
            down = torch.cat([down for _, down in factors.values()])
            start = start + (up @ down).reshape(start.shape)
        return start

    def _factors_of(self, name: str) -> dict[int, tuple[Tensor, Tensor]]:
        if name not in self._factors:
            pairs = {expert: self._state.reader.factors(expert, name) for expert in range(self._state.n_experts)}
            device = self._state.model.device
            self._factors[name] = {
                expert: (pair[0].to(device), pair[1].to(device)) for expert, pair in pairs.items() if pair is not None
            }
        return self._factors[name]


def coefficients_to_refine(
    state: SweepState, start: Weights, blocks: Sequence[FittedBlock], *, from_fit: bool = True
) -> dict[str, Tensor]:
    """
    Return the coefficients that a refinement begins with, float32: of all that is merged, embeddings and norms too.

    Args:
        state: Modules, and what is merged.
        start: The merge without data.
        blocks: What the fit found for every block. Where it has coefficients for every row, these are refined;
            elsewhere there is one for every expert.
        from_fit: Begin at the fit; otherwise at the merge without data.
    """
    fitted, whole_1N = by_parameter(state.model, blocks).coefficients, torch.zeros(1, state.n_experts)
    coefficients = {}
    for name in start:
        if state.reader.is_merged(name):
            change_RN = fitted.get(name, whole_1N).to(state.model.device, torch.float32)
            coefficients[f"{name}{COEFFICIENTS}"] = change_RN if from_fit else torch.zeros_like(change_RN)
    return coefficients


def write_table(state: SweepState, changes: Mapping[str, Tensor], staging: Path) -> None:
    """Write the coefficients of a merge of deltas, with what is added to those of parameters, for the engine."""
    write_coefficients(staging, state.reader.coefficient_table(changes), "deltas")
