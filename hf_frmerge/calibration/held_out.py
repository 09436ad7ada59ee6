"""Judge fitted merges by prompts they were not fitted to: how far are their predictions from the experts'?"""

# Shape suffixes: B = prompts, T = tokens, V = vocabulary or classes.

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hf_frmerge.calibration.blockwise_model import BlockwiseModel
from hf_frmerge.calibration.streams import Batch
from hf_frmerge.calibration.sweep import Sweep
from hf_frmerge.geometry.simplex import chord_to_distance
from hf_frmerge.merging.planning.corrections import Form, mean_known

FORMS: tuple[Form, ...] = ("start", "low_rank", "dense")

ENOUGH = 0.99
"""Share of the best form's gain from which a smaller form is taken."""


def squared_distance(logits_BV: Tensor, expert_BV: Tensor) -> Tensor:
    """
    Return the squared Fisher–Rao distance of two predictions, in rad²: `(2 arccos sum_v sqrt(p_v q_v))²`.

    From the chord, as arccos of a number near 1 loses half its digits.
    """
    roots = [torch.softmax(logits.double(), dim=-1).sqrt() for logits in (logits_BV, expert_BV)]
    squared_chord_B = (roots[0] - roots[1]).square().sum(dim=-1)
    return torch.from_numpy(chord_to_distance(squared_chord_B.cpu().numpy())).square()


def distances(
    model: BlockwiseModel, sweep: Sweep, batches: list[Batch], n_experts: int
) -> dict[str, tuple[float | None, ...]]:
    """
    Return by form the mean squared distance to every expert over its held-out prompts; `None` if it has none.

    Args:
        model: Computes the logits.
        sweep: Its hidden states, after the last block.
        batches: All prompts.
        n_experts: Number of experts.
    """
    totals = {form: [0.0] * n_experts for form in FORMS}
    counts = [0] * n_experts
    merged = sweep.outer(None)
    for expert in range(n_experts):
        expert_weights = sweep.outer(expert)
        for index, batch in enumerate(batches):
            if batch.expert != expert or not batch.is_held_out:
                continue
            states: Mapping[Form, Tensor] = {
                "start": sweep.start[index], "low_rank": sweep.low_rank[index], "dense": sweep.state.merged[index]
            }  # fmt: skip
            # Prompt by prompt: the logits of a batch would be the largest thing in memory.
            for row in range(len(batch.inputs["input_ids"])):
                one = batch.prompt(row)
                target = _predictions(model, expert_weights, sweep.state.expert[index][row : row + 1], one)
                counts[expert] += len(target)
                for form, hidden_BTH in states.items():
                    logits = _predictions(model, merged, hidden_BTH[row : row + 1], one)
                    totals[form][expert] += float(squared_distance(logits, target).sum())
    return {form: tuple(t / n if n else None for t, n in zip(total, counts)) for form, total in totals.items()}


def choose_form(by_form: dict[str, tuple[float | None, ...]], wanted: str) -> Form:
    """
    Return the form to write: the first that has nearly all of the best one's gain, or the wanted one.

    It is the start where that is not better, whatever is wanted.
    """
    means = {form: mean_known(by_form[form]) for form in FORMS}
    offered = [form for form in FORMS if wanted in ("auto", form)]
    gain = means["start"] - min(means[form] for form in offered)
    if gain <= 0:
        return "start"
    return next(form for form in offered if means["start"] - means[form] >= ENOUGH * gain)


def _predictions(
    model: BlockwiseModel, outer: Mapping[str, Tensor], hidden_BTH: Tensor, inputs: Mapping[str, Tensor]
) -> Tensor:
    """Return the logits of every prediction: of each token, or of each prompt for a classifier."""
    logits = model.finish(outer, hidden_BTH, inputs)
    if logits.ndim == 2:
        return logits
    mask = inputs.get("attention_mask")
    return logits.reshape(-1, logits.shape[-1]) if mask is None else logits[mask.bool()]
