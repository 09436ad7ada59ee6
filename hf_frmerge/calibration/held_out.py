"""Judge fitted merges by prompts they were not fitted to: how far are their outputs from the experts'?"""

# Shape suffixes: B = prompts, T = tokens, H = hidden size.

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hf_frmerge.calibration.blockwise_model import BlockwiseModel, Outputs
from hf_frmerge.calibration.streams import Batch
from hf_frmerge.calibration.sweep import Sweep
from hf_frmerge.geometry.simplex import chord_to_distance
from hf_frmerge.merging.planning.corrections import Form, mean_known

FORMS: tuple[Form, ...] = ("start", "low_rank", "dense")

ENOUGH = 0.99
"""Share of the best form's gain from which a smaller form is taken."""


def squared_distance(merged: Outputs, expert: Outputs) -> Tensor:
    """
    Return the squared distance of two models' outputs, in rad², `(rows,)`.

    Of logits the squared Fisher–Rao distance of the predictions, `(2 arccos sum_v sqrt(p_v q_v))²`; of hidden states
    the squared angle between them. Both from the chord, as arccos of a number near 1 loses half its digits.
    """
    points = [_on_sphere(outputs) for outputs in (merged, expert)]
    squared_chord = (points[0] - points[1]).square().sum(dim=-1)
    if merged.is_logits:
        return torch.from_numpy(chord_to_distance(squared_chord.cpu().numpy())).square()
    return (2 * torch.arcsin((squared_chord.sqrt() / 2).clamp(max=1))).square().cpu()


def _on_sphere(outputs: Outputs) -> Tensor:
    values = outputs.values.double()
    return torch.softmax(values, dim=-1).sqrt() if outputs.is_logits else torch.nn.functional.normalize(values, dim=-1)


def distances(
    model: BlockwiseModel, sweep: Sweep, batches: list[Batch], n_experts: int
) -> dict[str, tuple[float | None, ...]]:
    """
    Return by form the mean squared distance to every expert over its held-out prompts; `None` if it has none.

    Args:
        model: Computes the outputs.
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
                target = _outputs(model, expert_weights, sweep.state.expert[index][row : row + 1], one)
                counts[expert] += len(target.values)
                for form, hidden_BTH in states.items():
                    outputs = _outputs(model, merged, hidden_BTH[row : row + 1], one)
                    totals[form][expert] += float(squared_distance(outputs, target).sum())
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


def form_of_method(wanted: str) -> Form:
    """Return the form of what a method gives that was asked for by name, however good it is: whole unless wanted."""
    return "low_rank" if wanted == "low_rank" else "dense"


def _outputs(
    model: BlockwiseModel, outer: Mapping[str, Tensor], hidden_BTH: Tensor, inputs: Mapping[str, Tensor]
) -> Outputs:
    """Return the outputs, one row for each token, or each prompt for a classifier."""
    outputs = model.finish(outer, hidden_BTH, inputs)
    if outputs.values.ndim == 2:
        return outputs
    mask = inputs.get("attention_mask")
    kept = torch.ones_like(inputs["input_ids"], dtype=torch.bool) if mask is None else mask.bool()
    return Outputs(outputs.values[kept], outputs.is_logits)
