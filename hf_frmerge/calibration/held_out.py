"""Judge fitted merges by prompts they were not fitted to: how far are their outputs from the experts'?"""

# Shape suffixes: B = prompts, T = tokens, H = hidden size.

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from hf_frmerge.calibration.blocks.blockwise_model import Weights
from hf_frmerge.calibration.blocks.outputs import outputs_of, squared_distance
from hf_frmerge.calibration.sweep import Sweep
from hf_frmerge.merging.planning.corrections import Form, mean_known

FORMS: tuple[Form, ...] = ("start", "table", "low_rank", "dense")

ENOUGH = 0.99
"""Share of the best form's gain from which a smaller form is taken."""


@dataclass(frozen=True)
class Candidate:
    """
    A model to judge.

    Attributes:
        outer: its weights outside the blocks, as what follows them computes with them.
        hidden: index of a held-out batch -> its hidden states `(B, T, H)` after the last block.
    """

    outer: Weights
    hidden: Mapping[int, Tensor]


def forms_of(sweep: Sweep) -> dict[str, Candidate]:
    """Return the merge without data and the forms of the fit, after the last block of a sweep."""
    behind_blocks = sweep.state.model.behind_blocks
    outer = behind_blocks(sweep.outer(None))
    whole = outer | behind_blocks(sweep.fitted_outer())
    fitted = {index: sweep.state.merged[index] for index in sweep.start}
    hidden = dict(zip(FORMS, (sweep.start, sweep.table, sweep.low_rank, fitted)))
    outers = {"start": outer, "low_rank": whole, "dense": whole}
    if sweep.state.offers_table:
        outers["table"] = outer | behind_blocks(sweep.fitted_outer(as_table=True))
    return {form: Candidate(outers[form], hidden[form]) for form in FORMS if form in outers}


def distances(sweep: Sweep, candidates: Mapping[str, Candidate]) -> dict[str, tuple[float | None, ...]]:
    """
    Return by candidate the mean squared distance to every expert over its held-out prompts; `None` if it has none.

    Args:
        sweep: After its last block: it has the experts' hidden states.
        candidates: Models to judge.
    """
    state = sweep.state
    totals = {key: [0.0] * state.n_experts for key in candidates}
    counts = [0] * state.n_experts
    for expert in state.own:
        expert_weights = state.model.behind_blocks(sweep.outer(expert))
        for index, batch in enumerate(state.batches):
            if batch.expert != expert or not batch.is_held_out:
                continue
            # Prompt by prompt: the logits of a batch would be the largest thing in memory.
            for row in range(len(batch.inputs["input_ids"])):
                one = batch.prompt(row)
                target = outputs_of(state.model, expert_weights, state.expert[index][row : row + 1], one)
                counts[expert] += len(target.values)
                for key, candidate in candidates.items():
                    outputs = outputs_of(state.model, candidate.outer, candidate.hidden[index][row : row + 1], one)
                    totals[key][expert] += float(squared_distance(outputs, target).sum())
    parts = state.processes.gather([(totals, counts)])
    summed = {key: [sum(own) for own in zip(*(part[key] for part, _ in parts))] for key in candidates}
    counts = [sum(own) for own in zip(*(part for _, part in parts))]
    return {key: tuple(t / n if n else None for t, n in zip(total, counts)) for key, total in summed.items()}


def choose_form(by_form: dict[str, tuple[float | None, ...]], wanted: str) -> Form:
    """
    Return the form to write: the first that has nearly all of the best one's gain, or the wanted one.

    It is the start where that is not better, whatever is wanted.
    """
    means = {form: mean_known(by_form[form]) for form in FORMS if form in by_form}
    offered = [form for form in means if wanted in ("auto", form)]
    gain = means["start"] - min(means[form] for form in offered)
    if gain <= 0:
        return "start"
    return next(form for form in offered if means["start"] - means[form] >= ENOUGH * gain)


def form_of_method(wanted: str) -> Form:
    """Return the form of what a method gives that was asked for by name, however good it is: whole unless wanted."""
    return "low_rank" if wanted == "low_rank" else "dense"
