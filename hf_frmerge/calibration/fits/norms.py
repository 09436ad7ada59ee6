"""Fit gain and shift of a norm of a merge to what the experts' norms give, in closed form."""

# Shape suffixes: T = tokens, H = hidden size, C = numbers of a channel: its gain, or gain and shift.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class NormFit:
    """
    Solved norm, float64.

    Attributes:
        gain_H: fitted gain.
        shift_H: fitted shift; `None` for an RMS norm.
        system_HCC: system of every channel: of its gain, or of gain and shift.
    """

    gain_H: Tensor
    shift_H: Tensor | None
    system_HCC: Tensor


def norm_sums(x_TH: Tensor, target_TH: Tensor, start: tuple[Tensor, Tensor | None], offset_H: Tensor) -> Tensor:
    """
    Return what `fit_norm` needs to know of some tokens, `(4, H)`, float64: the sums of x², x, x r and r.

    r is what the start leaves of the target, `target - x (gain + offset) - shift`.

    Args:
        x_TH: The merge's normalised inputs, before gain and shift.
        target_TH: The expert norm's outputs.
        start: Gain and shift to start from; no shift for an RMS norm.
        offset_H: What the norm adds to its gain by itself: 1 in some models, else 0.
    """
    gain_H, shift_H = start
    x_TH = x_TH.double()
    r_TH = target_TH.double() - x_TH * (gain_H.double() + offset_H)
    if shift_H is not None:
        r_TH -= shift_H.double()
    return torch.stack([(x_TH * x_TH).sum(0), x_TH.sum(0), (x_TH * r_TH).sum(0), r_TH.sum(0)])


def fit_norm(
    sums: Sequence[Tensor], n_tokens: Sequence[int], shares: Sequence[float], start: tuple[Tensor, Tensor | None]
) -> NormFit:
    """
    Fit gain and shift of a norm, channel by channel.

    Least squares of `x (gain + offset) + shift` to the experts' outputs, with a ridge of a tenth of the tokens toward
    the start.

    Args:
        sums: For every expert what `norm_sums` gives of all its tokens.
        n_tokens: Tokens of every expert; one that has none does not count.
        shares: Weights of the experts.
        start: As for `norm_sums`.

    Returns:
        Float64.
    """
    factors = [share / n if n else 0.0 for share, n in zip(shares, n_tokens)]
    xx_H, x_H, xr_H, r_H = torch.stack([factor * own for factor, own in zip(factors, sums)]).sum(0)
    gain_H, shift_H = start
    n = sum(share for share, tokens in zip(shares, n_tokens) if tokens)
    ridge = 0.1 * n
    if shift_H is None:
        return NormFit(gain_H.double() + xr_H / (xx_H + ridge), None, (xx_H + ridge)[:, None, None])
    a, c, b = xx_H + ridge, n + ridge, x_H
    determinant = a * c - b * b
    rows = torch.stack([a, b], dim=1), torch.stack([b, torch.full_like(a, c)], dim=1)
    return NormFit(
        gain_H.double() + (c * xr_H - b * r_H) / determinant,
        shift_H.double() + (a * r_H - b * xr_H) / determinant,
        torch.stack(rows, dim=1),
    )
