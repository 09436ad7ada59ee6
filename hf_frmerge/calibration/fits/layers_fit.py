"""Solve for the layers of one part of a model, whichever it is, and keep what is found in every form."""

# Shape suffixes: T = tokens, H = hidden size, I = inputs of a layer, O = outputs, R = rows, N = experts.

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from hf_frmerge.calibration.blocks.blockwise_model import Weights
from hf_frmerge.calibration.blocks.matrices import StoredMatrix
from hf_frmerge.calibration.fits.coefficient_rows import TableEquations
from hf_frmerge.calibration.fits.least_squares import (
    Fit,
    FitOptions,
    Moments,
    System,
    UpdatePrior,
    WriterMoments,
    fit_linear,
    low_rank,
)
from hf_frmerge.calibration.fits.norms import NormFit, fit_norm
from hf_frmerge.calibration.fits.sweep_state import SweepState
from hf_frmerge.errors import NonFiniteError

_SAME = 1e-12
"""Squared relative change below which an expert's norm counts as the merge's: there is nothing to fit."""

_UPDATE_RIDGE = 0.3
"""Pull to the base in what the updates of full fine-tunes say alone, relative to the mean pull to an expert."""

Merged = dict[StoredMatrix, bool]
"""Matrices that are merged, and whether a bias of them is."""


class LayersFit:
    """
    The equations of linear layers and norms; what enters them is for subclasses to find.

    Args:
        sweep: What is carried through the blocks.
        prefix: What the names of parameters begin with outside of this part: that of a block, or nothing.
        module: The part.
        start: Its weights in the data-free merge.
        experts: Those of every expert; those of experts without prompts here are read anew by every access.
        options: Settings.
        rank: Rank of the low-rank form; `None` if corrections are kept whole.

    Attributes:
        weights: weights as fitted so far, float32.
        factors: weight of a linear layer -> its correction as factors `(rows, k)` and `(k, columns)`.
        coefficients: parameter -> what is added to the experts' coefficients in the table form, `(rows, N)` or
            `(1, N)`, float64.
    """

    def __init__(
        self,
        sweep: SweepState,
        prefix: str,
        module: nn.Module,
        start: dict[str, Tensor],
        experts: Sequence[Weights],
        options: FitOptions,
        rank: int | None,
    ) -> None:
        self._sweep, self._model, self._prefix, self._module = sweep, sweep.model, prefix, module
        self._start, self._experts, self._fit, self._rank = start, experts, options, rank
        self.weights = dict(start)
        self.factors: dict[str, tuple[Tensor, Tensor]] = {}
        self.coefficients: dict[str, Tensor] = {}
        self._origins: dict[str, Tensor] = {}  # of stacks, which are read once for all matrices in them

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
        correction_OI = fit.weight_OI - start_OI
        # A stack would need factors of the rank of all its matrices together.
        if matrix.place is None and self._rank is not None:
            rank = min(self._rank, width)
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

    def _normalised(self, norm: str, entering: Tensor) -> tuple[Tensor, Tensor]:
        """Return a norm's input as it is before gain and shift, and what it adds to its gain by itself, `(H,)`."""
        module, gain = self._module.get_submodule(norm), self._start[f"{norm}.weight"]
        zero = torch.zeros_like(gain)
        shifts = {"bias": zero} if f"{norm}.bias" in self._start else {}
        with torch.no_grad():
            at_one, at_zero = (
                torch.func.functional_call(module, {"weight": weight, **shifts}, (entering,)).float()
                for weight in (torch.ones_like(gain), zero)
            )
        x = at_one - at_zero
        # Some norms scale by 1 + gain: what is left at a gain of zero, as a share of the normalised input.
        return x, (at_zero * x).sum() / x.square().sum().clamp_min(1e-30) * torch.ones_like(gain)

    def _norm_start(self, norm: str) -> tuple[Tensor, Tensor | None]:
        """Return gain and shift of a norm in the data-free merge."""
        return self._start[f"{norm}.weight"], self._start.get(f"{norm}.bias")

    def _solve_norm(self, norm: str, sums: Tensor, n_rows: Sequence[int]) -> NormFit:
        """Fit gain and shift of a norm, from what `norm_sums` gives of every expert, `(N, 4, H)`, and keep them."""
        fitted = fit_norm(list(sums), n_rows, self._sweep.shares, self._norm_start(norm))
        self.weights[f"{norm}.weight"] = fitted.gain_H.float()
        if fitted.shift_H is not None:
            self.weights[f"{norm}.bias"] = fitted.shift_H.float()
        if self._sweep.offers_table:
            self._keep_norm_coefficients(norm, fitted)
        return fitted

    def _keep_norm_coefficients(self, norm: str, fit: NormFit) -> None:
        """Keep coefficients for a whole norm: in a channel alone, gain and shift are fewer numbers than experts."""
        fitted = {f"{norm}.weight": fit.gain_H} | ({} if fit.shift_H is None else {f"{norm}.bias": fit.shift_H})
        origins = {key: self._origin(key) for key in fitted}
        updates_HC = [torch.stack([e[key] - origins[key] for key in fitted], dim=1) for e in self._experts]
        correction_HC = torch.stack([values - self._start[key] for key, values in fitted.items()], dim=1)
        equations = TableEquations.of(correction_HC, updates_HC.__getitem__, len(updates_HC), fit.system_HCC)
        found = equations.solve(by_row=False)
        self.coefficients |= {key: found.clone() for key in fitted}

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
            layer = f"{self._prefix}{matrix.weight.removesuffix('.weight')}"
            raise NonFiniteError(f"{layer}: {error}. Leave out the prompts that cause it.") from error

    def _prior(self, matrix: StoredMatrix) -> UpdatePrior | None:
        """Return what the updates of all experts say."""
        fit, sweep = self._fit, self._sweep
        if not fit.update_prior and not fit.adapter_prior:
            return None
        prior = UpdatePrior.zeros(matrix.read({matrix.weight: self._origin(matrix.weight)}))
        for expert in sweep.summed:
            share = sweep.shares[expert]
            factors = sweep.reader.factors(expert, f"{self._prefix}{matrix.weight}")
            if factors is None:
                delta_OI = matrix.read(self._experts[expert]) - prior.base_OI
                prior.add(delta_OI, share * fit.update_prior)
            else:
                rows, columns = (factor.to(self._model.device) for factor in factors)
                both = (columns.T, rows.T) if matrix.is_flipped else (rows, columns)
                prior.add_factors(*both, share * fit.adapter_prior)
        sweep.processes.add_up([prior.gram_II, prior.pull_IO])
        return prior

    def _origin(self, parameter: str) -> Tensor:
        """Return what the experts' updates of a parameter are differences to."""
        if parameter in self._origins:
            return self._origins[parameter]
        start = self._start[parameter]
        values = self._sweep.origin(f"{self._prefix}{parameter}", start)
        if start.ndim > 2:
            self._origins[parameter] = values
        return values

    def _is_merged(self, parameter: str) -> bool:
        return parameter in self._start and self._sweep.reader.is_merged(f"{self._prefix}{parameter}")


def as_factors(matrix: StoredMatrix, correction_OI: Tensor, metric_II: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the correction of a linear layer as `low_rank` gives it, in the order in which the weight is stored."""
    up, down = low_rank(correction_OI, metric_II, rank)
    return (down.T.contiguous(), up.T.contiguous()) if matrix.is_flipped else (up, down)


def with_one(values_TI: Tensor) -> Tensor:
    """Append the constant 1, the input of a bias."""
    return torch.cat([values_TI, values_TI.new_ones(len(values_TI), 1)], dim=1)
