"""
MaTS: the merge of a linear layer that costs the experts' predictions least, by the curvature of each of them.

With the Kronecker factors A_i `(in, in)` and G_i `(out, out)` of expert i's Fisher information and its weight W_i,

    W = argmin sum_i w_i tr((W - W_i)^T G_i (W - W_i) A_i),   that is   sum_i w_i G_i W A_i = sum_i w_i G_i W_i A_i

(arXiv 2312.04339). To second order the sum is twice the Kullback-Leibler divergence from the experts, if layers did
not depend on each other. A system of in x out unknowns is solved by conjugate gradients, from the plain average. Few
prompts leave most directions all but undecided, and in these the first steps stay at the average: that the iteration
ends is what keeps it from fitting chance. Biases, norms and all that is no linear layer are averaged.
"""

# Shape suffixes: I = inputs of a layer, O = outputs.

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_frmerge.calibration.baselines.fisher_fit import InformedFit
from hf_frmerge.calibration.blocks.matrices import layer_matrix

if TYPE_CHECKING:
    from hf_frmerge.calibration.blocks.blockwise_model import Weights
    from hf_frmerge.calibration.blocks.layers import BlockLayers
    from hf_frmerge.calibration.fits.sweep_state import SweepState
    from hf_frmerge.fisher.files import KroneckerFile

_SOLVED = 1e-6
"""Residual, relative to that of the average, at which a layer counts as solved: what float32 can reach."""


class MatsFit(InformedFit):
    """
    Linear layers of one block, merged by the Kronecker factors of the experts' Fisher information.

    Args:
        sweep, index, layers, start, experts: As for `BlockFit`.
        files: Factors of every expert. They are divided by their norm over all layers, as experts have different
            scales of information.
        max_iter: Most steps for a layer.
    """

    def __init__(
        self,
        sweep: SweepState,
        index: int,
        layers: BlockLayers,
        start: dict[str, Tensor],
        experts: Sequence[Weights],
        files: Sequence[KroneckerFile],
        max_iter: int,
    ) -> None:
        super().__init__(sweep, index, start, experts)
        self._module = sweep.model.block(self._name)
        self._layers = [name for group in layers.groups for name in group.names]
        self._files, self._max_iter = files, max_iter

    def fit(self) -> None:
        """Solve for all layers."""
        reader = self._sweep.reader
        for name in self._layers:
            key, tensor = f"{name}.weight", f"{self._name}.{name}.weight"
            if not reader.is_merged(tensor):
                continue
            matrix = layer_matrix(self._module, name)
            matrices = [matrix.read(expert) for expert in self._experts]
            shares = reader.weights(tensor)
            average_OI = torch.stack([share * each for share, each in zip(shares, matrices)]).sum(0)
            terms = list(zip(shares, self._factors(f"{self._name}.{name}")))
            pull_OI = torch.zeros_like(average_OI)
            for (share, (of_inputs_II, of_outputs_OO)), each_OI in zip(terms, matrices):
                pull_OI += share * (of_outputs_OO @ (each_OI - average_OI) @ of_inputs_II)

            def apply(step_OI: Tensor, terms: list[tuple[float, tuple[Tensor, Tensor]]] = terms) -> Tensor:
                parts = [share * (of_outputs @ step_OI @ of_inputs) for share, (of_inputs, of_outputs) in terms]
                return torch.stack(parts).sum(0)

            solved_OI = average_OI + conjugate_gradients(apply, pull_OI, self._max_iter)
            matrix.write(self.weights, solved_OI)
            self.weights[key] = reader.scaled(tensor, self.weights[key])

    def _factors(self, layer: str) -> list[tuple[Tensor, Tensor]]:
        """Return every expert's factors, those of the outputs divided by the norm over all layers."""
        device = self._sweep.model.device
        pairs = [file.read_relative(layer) for file in self._files]
        return [(of_inputs_II.to(device), of_outputs_OO.to(device)) for of_inputs_II, of_outputs_OO in pairs]


def conjugate_gradients(apply: Callable[[Tensor], Tensor], target: Tensor, max_iter: int) -> Tensor:
    """
    Solve `apply(x) = target` for a symmetric, positive semidefinite map, from zero.

    Args:
        apply: The map, of tensors of the target's shape.
        target: Right-hand side; in the range of the map if that is singular.
        max_iter: Most steps; fewer are taken if the residual is below a millionth of the target.

    Returns:
        The point reached: among all combinations of `target, apply(target), apply(apply(target)), ...` with so many
        terms the one with the least `x . apply(x) / 2 - x . target`.
    """
    solution, residual = torch.zeros_like(target), target.clone()
    direction, squared = residual.clone(), _dot(residual, residual)
    enough = squared * _SOLVED**2
    for _ in range(max_iter):
        if squared <= enough:  # at once where the target is zero
            break
        mapped = apply(direction)
        curvature = _dot(direction, mapped)
        if curvature <= 0:  # rounding has taken over
            break
        step = squared / curvature
        solution += step * direction
        residual -= step * mapped
        before, squared = squared, _dot(residual, residual)
        direction = residual + (squared / before) * direction
    return solution


def _dot(a: Tensor, b: Tensor) -> float:
    """Inner product, float64: the squares of information are too small for float32."""
    return float(torch.dot(a.flatten().double(), b.flatten().double()))
