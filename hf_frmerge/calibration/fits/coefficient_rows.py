"""
Find coefficients of the experts, row by row, whose sum comes nearest to what a fit found.

A fit minimises a quadratic function of a layer's weight, with the system S of its normal equations as second
derivative, at some W*. With W_s the merge without data and D_j the update of expert j, the best weight of the form

    W_r = (W_s)_r + sum_j c_rj (D_j)_r    for every row r

is where the same function is least, and that is at

    H_r c_r = g_r,    H_r[j, k] = (D_j)_r S (D_k)_r^T,    g_r[j] = (D_j)_r S (W* - W_s)_r^T

so targets, priors and weights of tokens are those of the fit. Summed over the rows first, H and g give one row of
coefficients for a whole tensor.
"""

# Shape suffixes: N = experts, O = outputs of a layer or channels of a norm, I = inputs (one more with a bias).

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_RIDGE = 1e-6
"""Pull to the start, relative to the mean diagonal of H: updates that are alike in a row leave their shares open."""


@dataclass(frozen=True)
class TableEquations:
    """
    Equations of the coefficients, `H_r c_r = g_r` for every row; float64.

    Several processes may each have those of some experts, with zeros for the others: their sum is that of all.

    Attributes:
        gram_ONN: H.
        pull_ON: g.
    """

    gram_ONN: Tensor
    pull_ON: Tensor

    @staticmethod
    def of(
        correction_OI: Tensor,
        update_of: Callable[[int], Tensor],
        n_experts: int,
        system: Tensor,
        own: Sequence[int] | None = None,
    ) -> TableEquations:
        """
        Return the equations of some experts.

        Args:
            correction_OI: What the fit adds to the merge without data.
            update_of: Returns the update of an expert, `(O, I)`, by its number; two of them are in memory at a time.
            n_experts: Number of experts.
            system: System of the fit, `(I, I)`, or `(O, I, I)` if every row has its own; in its dtype are products
                taken.
            own: The experts; by default all.
        """
        dtype, n_rows = system.dtype, len(correction_OI)
        gram_ONN = torch.zeros(n_rows, n_experts, n_experts, device=system.device).double()
        pull_ON = torch.zeros(n_rows, n_experts, device=system.device).double()
        for j in range(n_experts) if own is None else own:
            update_OI = update_of(j).to(dtype)
            seen_OI = update_OI @ system if system.ndim == 2 else torch.einsum("oi,oik->ok", update_OI, system)
            pull_ON[:, j] = (seen_OI * correction_OI.to(dtype)).sum(1)
            for k in range(n_experts):
                gram_ONN[:, j, k] = (seen_OI * update_of(k)).sum(1)
        return TableEquations(gram_ONN, pull_ON)

    def solve(self, *, by_row: bool) -> Tensor:
        """
        Return the coefficients on the experts' updates that come nearest to the correction.

        Args:
            by_row: Whether every row has coefficients of its own.

        Returns:
            `(O, N)`, or `(1, N)` for all rows together; float64. Zeros for a row that no expert changed.
        """
        gram_ONN, pull_ON = self.gram_ONN, self.pull_ON
        if not by_row:
            gram_ONN, pull_ON = gram_ONN.sum(0, keepdim=True), pull_ON.sum(0, keepdim=True)
        mean_O = gram_ONN.diagonal(dim1=1, dim2=2).mean(1)
        ridge_O = torch.where(mean_O > 0, _RIDGE * mean_O, torch.ones_like(mean_O))
        return torch.linalg.solve(gram_ONN + torch.diag_embed(ridge_O[:, None].expand_as(pull_ON)), pull_ON)


def combined(start: Tensor, updates: Iterable[Tensor], coefficients_RN: Tensor) -> Tensor:
    """Return a tensor plus the sum of updates by the coefficients of equal runs of its rows, in the tensor's dtype."""
    runs = start.reshape(len(coefficients_RN), -1)
    for update, column_R in zip(updates, coefficients_RN.to(start).T):
        runs = torch.addcmul(runs, column_R[:, None], update.reshape(runs.shape))
    return runs.reshape(start.shape)
