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

from collections.abc import Sequence

import torch
from torch import Tensor

_RIDGE = 1e-6
"""Pull to the start, relative to the mean diagonal of H: updates that are alike in a row leave their shares open."""


def coefficients_of(
    correction_OI: Tensor, updates_OI: Sequence[Tensor], system: Tensor, *, by_row: bool = True
) -> Tensor:
    """
    Return the coefficients on the experts' updates that come nearest to a correction.

    Args:
        correction_OI: What the fit adds to the merge without data.
        updates_OI: Updates of the experts.
        system: System of the fit, `(I, I)`, or `(O, I, I)` if every row has its own.
        by_row: Whether every row has coefficients of its own.

    Returns:
        `(O, N)`, or `(1, N)` for all rows together; float64. Zeros for a row that no expert changed.
    """
    dtype = updates_OI[0].dtype
    system, correction_OI = system.to(dtype), correction_OI.to(dtype)
    gram_ONN = torch.zeros(len(correction_OI), len(updates_OI), len(updates_OI), device=system.device).double()
    pull_ON = torch.zeros_like(gram_ONN[:, 0])
    for j, update_OI in enumerate(updates_OI):
        seen_OI = update_OI @ system if system.ndim == 2 else torch.einsum("oi,oik->ok", update_OI, system)
        pull_ON[:, j] = (seen_OI * correction_OI).sum(1)
        for k, other_OI in enumerate(updates_OI):
            gram_ONN[:, j, k] = (seen_OI * other_OI).sum(1)
    if not by_row:
        gram_ONN, pull_ON = gram_ONN.sum(0, keepdim=True), pull_ON.sum(0, keepdim=True)
    mean_O = gram_ONN.diagonal(dim1=1, dim2=2).mean(1)
    ridge_O = torch.where(mean_O > 0, _RIDGE * mean_O, torch.ones_like(mean_O))
    return torch.linalg.solve(gram_ONN + torch.diag_embed(ridge_O[:, None].expand_as(pull_ON)), pull_ON)


def combined(start: Tensor, updates: Sequence[Tensor], coefficients_RN: Tensor) -> Tensor:
    """Return a tensor plus the sum of updates by the coefficients of `coefficients_of`, in the tensor's dtype."""
    for update, column_R in zip(updates, coefficients_RN.to(start).T):
        start = torch.addcmul(start, column_R.reshape(-1, *[1] * (start.ndim - 1)), update)
    return start
