"""Fits of norms against naive float64 solutions on all tokens at once."""

from __future__ import annotations

import math

import pytest
import torch

from hf_frmerge.calibration.fits.norms import fit_norm, norm_sums

TOKENS, SHARES = (40, 25, 60), [0.5, 0.2, 0.3]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("has_shift", [False, True])
def test_a_norm_is_fitted_channel_by_channel(has_shift: bool) -> None:
    xs = [torch.randn(n, 4) for n in TOKENS]
    targets = [x * 1.5 + 0.2 + 0.1 * torch.randn_like(x) for x in xs]
    gain, shift, offset = torch.rand(4), torch.rand(4) if has_shift else None, torch.ones(4).double()
    # Tokens may come in any portions.
    sums = [
        sum(norm_sums(x[part], t[part], (gain, shift), offset) for part in (slice(0, 9), slice(9, None)))
        for x, t in zip(xs, targets)
    ]
    fitted = fit_norm(sums, TOKENS, SHARES, (gain, shift))
    for c in range(4):
        rows, ys = [], []
        for x, t, share in zip(xs, targets, SHARES):
            scale = math.sqrt(share / len(x))
            column = x[:, c].double()
            ones = torch.ones_like(column)
            rows.append(scale * torch.stack([column, ones] if has_shift else [column], dim=1))
            y = t[:, c].double() - column * (gain[c] + 1) - (shift[c] if shift is not None else 0)
            ys.append(scale * y)
        size = rows[0].shape[1]
        rows.append(math.sqrt(0.1) * torch.eye(size).double())  # a tenth of the tokens, whose shares sum to 1
        ys.append(torch.zeros(size).double())
        change = torch.linalg.lstsq(torch.cat(rows), torch.cat(ys)[:, None]).solution[:, 0]
        torch.testing.assert_close(fitted.gain_H[c], gain[c].double() + change[0])
        if shift is not None:
            assert fitted.shift_H is not None
            torch.testing.assert_close(fitted.shift_H[c], shift[c].double() + change[1])
        equations = torch.cat(rows)
        torch.testing.assert_close(fitted.system_HCC[c], equations.T @ equations)


def test_an_expert_without_tokens_has_no_say_in_a_norm() -> None:
    gain, x, t = torch.rand(4), torch.randn(50, 4), torch.randn(50, 4)
    own = norm_sums(x, t, (gain, None), torch.zeros(4))
    alone = fit_norm([own], [50], [0.7], (gain, None))
    beside = fit_norm([own, torch.zeros(4, 4)], [50, 0], [0.7, 0.3], (gain, None))
    torch.testing.assert_close(beside.gain_H, alone.gain_H)
