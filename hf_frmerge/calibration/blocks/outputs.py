"""What models give, token by token or prompt by prompt, and how far two of them are apart."""

# Shape suffixes: B = prompts, T = tokens, H = hidden size, R = rows (tokens, or prompts), V = outcomes or hidden size.

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hf_frmerge.calibration.blocks.blockwise_model import BlockwiseModel, Outputs
from hf_frmerge.geometry.simplex import chord_to_distance


def outputs_of(
    model: BlockwiseModel, outer: Mapping[str, Tensor], hidden_BTH: Tensor, inputs: Mapping[str, Tensor]
) -> Outputs:
    """Return the outputs, one row for each token, or each prompt for a classifier."""
    outputs = model.finish(outer, hidden_BTH, inputs)
    if outputs.values.ndim == 2:
        return outputs
    mask = inputs.get("attention_mask")
    # Picking rows copies them, and logits are large.
    rows = outputs.values.flatten(0, 1) if mask is None else outputs.values[mask.bool()]
    return Outputs(rows, outputs.is_logits)


def squared_distance(merged: Outputs, expert: Outputs) -> Tensor:
    """
    Return the squared distance of two models' outputs, in rad², `(rows,)`.

    Of logits the squared Fisher–Rao distance of the predictions, `(2 arccos sum_v sqrt(p_v q_v))²`; of hidden states
    the squared angle between them. Both from the chord, as arccos of a number near 1 loses half its digits.
    """
    one_RV, other_RV = (_on_sphere(outputs) for outputs in (merged, expert))
    squared_chord = one_RV.sub_(other_RV).square_().sum(dim=-1)
    if merged.is_logits:
        return torch.from_numpy(chord_to_distance(squared_chord.cpu().numpy())).square()
    return (2 * torch.arcsin((squared_chord.sqrt() / 2).clamp(max=1))).square().cpu()


def _on_sphere(outputs: Outputs) -> Tensor:
    """Return new unit vectors `(R, V)`, float64. What they take is much of the time, so no copy is made on the way."""
    if outputs.is_logits:
        return torch.softmax(outputs.values, dim=-1, dtype=torch.float64).sqrt_()
    return torch.nn.functional.normalize(outputs.values.double(), dim=-1)
