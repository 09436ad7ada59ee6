"""What a refinement lowers: how far the outputs of a merge are from an expert's, so that gradients can be taken."""

# Shape suffixes: R = rows (tokens, or the prompts of a classifier), V = outcomes or hidden size.

from __future__ import annotations

import math

import torch
from torch import Tensor

from hf_frmerge.calibration.blocks.blockwise_model import Outputs

# The square root of a squared chord has no derivative at 0, the squared angle has: 1.
_LEAST_SQUARED_CHORD = 1e-12


def row_losses(merged: Outputs, expert: Outputs, loss: str, beta: float = 0.5) -> Tensor:
    """
    Return the loss of every row, `(R,)`, float32.

    Args:
        merged: Outputs of the merge, `(R, V)`.
        expert: The expert's for the same rows.
        loss: Of predictions p of the expert and q of the merge, in nats `"kl"`: `KL(p || q)`, `"reverse_kl"`:
            `KL(q || p)`, or `"jsd"`, generalised Jensen-Shannon: `beta KL(p || m) + (1 - beta) KL(q || m)` with
            `m = beta p + (1 - beta) q` (arXiv 2306.13649, Eq. 1); or `"fisher_rao"`: the squared Fisher-Rao
            distance in rad². Of hidden states it is the squared angle between them, whichever is asked for.
        beta: Share of the expert in `m`, between 0 and 1.
    """
    if not merged.is_logits:
        pair = [torch.nn.functional.normalize(outputs.values, dim=-1) for outputs in (merged, expert)]
        return _squared_angle(pair[0], pair[1])
    log_q_RV, log_p_RV = (torch.log_softmax(outputs.values, dim=-1) for outputs in (merged, expert))
    if loss == "kl":
        return _divergence(log_p_RV, log_q_RV)
    if loss == "reverse_kl":
        return _divergence(log_q_RV, log_p_RV)
    if loss == "jsd":
        log_m_RV = torch.logaddexp(log_p_RV + math.log(beta), log_q_RV + math.log1p(-beta))
        return beta * _divergence(log_p_RV, log_m_RV) + (1 - beta) * _divergence(log_q_RV, log_m_RV)
    # Distances of distributions are twice the angles between the square roots of their probabilities.
    return 4 * _squared_angle((log_q_RV / 2).exp(), (log_p_RV / 2).exp())


def _divergence(log_p_RV: Tensor, log_q_RV: Tensor) -> Tensor:
    """Return `KL(p || q)` of every row."""
    return (log_p_RV.exp() * (log_p_RV - log_q_RV)).sum(dim=-1)


def _squared_angle(a_RV: Tensor, b_RV: Tensor) -> Tensor:
    """Return the squared angle between unit vectors; from the chord, as arccos of a number near 1 loses digits."""
    squared_chord = (a_RV - b_RV).square().sum(dim=-1).clamp(min=_LEAST_SQUARED_CHORD)
    return (2 * torch.arcsin((squared_chord.sqrt() / 2).clamp(max=1 - 1e-6))).square()
