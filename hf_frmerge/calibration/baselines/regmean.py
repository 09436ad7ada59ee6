"""
RegMean and RegMean++: the merge of a linear layer that comes nearest to what the experts' layers give, in closed form.

With the inputs X_i `(T_i, in)` that the layer has in expert i on prompts of that expert, and its weight W_i there,

    W = argmin sum_i w_i |X_i (W - W_i)^T|^2 / T_i
      = [(sum_i w_i G_i)^-1 sum_i w_i G_i W_i^T]^T    with    G_i = X_i^T X_i / T_i

(arXiv 2212.09849), where all of G_i that is off the diagonal is multiplied by a factor below 1 first: without it the
merge fits what is only chance in few prompts. The two methods differ in the inputs. RegMean takes those of each expert
that runs alone. RegMean++ (arXiv 2508.03121) runs the block of an expert on what the merged blocks below it give.
Biases, norms and all that is no linear layer are averaged.
"""

# Shape suffixes: T = tokens, I = inputs of a layer, O = outputs.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_frmerge.calibration.blocks.blockwise_model import Taps, Weights
from hf_frmerge.calibration.blocks.layers import BlockLayers
from hf_frmerge.calibration.blocks.matrices import layer_matrix, n_in
from hf_frmerge.calibration.fits.layers_fit import as_factors
from hf_frmerge.calibration.fits.least_squares import FitOptions, System, fit_linear
from hf_frmerge.calibration.fits.sweep_state import SweepState
from hf_frmerge.errors import NonFiniteError


@dataclass(frozen=True)
class RegMeanOptions:
    """
    Settings of a merge by regression.

    Attributes:
        off_diagonal: factor of what is off the diagonal of an expert's Gram matrix, below 1; 0.9 in RegMean's paper.
        from_merge: whether the inputs are those behind the merged blocks, as in RegMean++.
    """

    off_diagonal: float
    from_merge: bool


class RegMeanFit:
    """
    Linear layers of one block, merged by regression.

    Args:
        sweep, index, layers, start, experts: As for `BlockFit`.
        options: Settings.

    Attributes:
        weights, factors: as those of `BlockFit`.
        coefficients: none: the method is written whole, or in low rank.
    """

    def __init__(
        self,
        sweep: SweepState,
        index: int,
        layers: BlockLayers,
        start: dict[str, Tensor],
        experts: Sequence[Weights],
        options: RegMeanOptions,
    ) -> None:
        self._sweep, self._index, self._name = sweep, index, sweep.model.blocks[index]
        self._module = sweep.model.block(self._name)
        self._start, self._experts, self._options = start, experts, options
        self.weights = dict(start)
        self.factors: dict[str, tuple[Tensor, Tensor]] = {}
        self.coefficients: dict[str, Tensor] = {}
        # First layer of a group, at which its inputs are taken -> those of its layers that are merged.
        merged = {g.names[0]: [n for n in g.names if sweep.reader.is_merged(self._tensor(n))] for g in layers.groups}
        self._groups = {first: names for first, names in merged.items() if names}
        self._averages = {name: self._average(name) for names in self._groups.values() for name in names}
        self._systems = {
            name: System.zeros(average_OI.shape[1], len(average_OI), average_OI.device)
            for name, average_OI in self._averages.items()
        }

    def run_experts(self) -> None:
        """Run the experts' blocks, and sum the equations of all layers; Gram matrices are kept of one expert."""
        sweep = self._sweep
        for expert in sweep.own:
            computed = sweep.computed(self._experts[expert])
            grams = {
                first: torch.zeros(width, width, device=sweep.model.device)
                for first, width in ((first, n_in(self._module.get_submodule(first))) for first in self._groups)
            }
            for b, batch in enumerate(sweep.batches):
                if batch.expert != expert:
                    continue
                is_behind_merge = self._options.from_merge and not batch.is_held_out
                entering = sweep.merged[b] if is_behind_merge else sweep.expert[b]
                with Taps(self._module, [] if batch.is_held_out else [*self._groups]) as taps:
                    after_BTH = sweep.model.run_block(self._name, computed, entering, batch.calls[self._index])
                if not is_behind_merge:
                    sweep.expert[b] = after_BTH
                for first, inputs in taps.inputs.items():
                    inputs_TI = batch.tokens(inputs).float()
                    grams[first] += inputs_TI.T @ inputs_TI
            for first, gram_II in grams.items():
                shrunk_II = shrunk(gram_II / sweep.n_tokens[expert], self._options.off_diagonal)
                for name in self._groups[first]:
                    self._add(name, expert, shrunk_II)

    def fit(self) -> None:
        """Solve for all layers. Raises `NonFiniteError` if an activation is not finite."""
        for name, average_OI in self._averages.items():
            system = self._systems.pop(name)
            self._sweep.processes.add_up([system.gram_II, system.pull_IO])
            # Around the average: where the experts agree there is nothing to solve, and rounding has no part in it.
            zero_OI = torch.zeros_like(average_OI)
            try:
                solved = fit_linear(system, zero_OI, FitOptions(ridge=0.0), has_bias=False)
            except NonFiniteError as error:
                raise NonFiniteError(f"{self._name}.{name}: {error}. Leave out the prompts that cause it.") from error
            weight_OI, key = average_OI + solved.weight_OI.float(), f"{name}.weight"
            matrix = layer_matrix(self._module, name)
            matrix.write(self.weights, weight_OI)
            self.weights[key] = self._sweep.reader.scaled(self._tensor(name), self.weights[key])
            correction_OI = matrix.read(self.weights) - matrix.read(self._start)
            rank = min(self._sweep.options.rank, correction_OI.shape[1])
            self.factors[key] = as_factors(matrix, correction_OI, solved.metric_II, rank)

    # Parts

    def _add(self, name: str, expert: int, gram_II: Tensor) -> None:
        share = self._sweep.reader.weights(self._tensor(name))[expert]
        delta_OI = self._matrix(self._experts[expert], name) - self._averages[name]
        self._systems[name].gram_II += share * gram_II
        self._systems[name].pull_IO += share * (gram_II @ delta_OI.T)

    def _average(self, name: str) -> Tensor:
        shares = self._sweep.reader.weights(self._tensor(name))
        parts = [share * self._matrix(expert, name) for share, expert in zip(shares, self._experts)]
        return torch.stack(parts).sum(0)

    def _matrix(self, weights: Weights, name: str) -> Tensor:
        return layer_matrix(self._module, name).read(weights)

    def _tensor(self, name: str) -> str:
        return f"{self._name}.{name}.weight"


def shrunk(gram_II: Tensor, off_diagonal: float) -> Tensor:
    """Return a Gram matrix with everything off the diagonal multiplied by a factor."""
    result_II = off_diagonal * gram_II
    result_II.diagonal().copy_(gram_II.diagonal())
    return result_II
