"""How far apart the predictions of two models are, token by token, and the objective of a merge."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_frmerge.evaluation.measures.token_tables import Columns, OutputFormat, TokenTable
from hf_frmerge.evaluation.models.predictions import Predictions
from hf_frmerge.evaluation.record import MERGED, FunctionDistance, Objective, Spread
from hf_frmerge.geometry.simplex import (
    Divergences,
    barycentre_from_chords,
    chord_to_distance,
    divergence_terms,
    lumped_divergences,
)

PAIR_COLUMNS: Columns = {
    "chord_even": ("F64", 1),
    "chord_odd": ("F64", 1),
    "kl_other_model": ("F64", 1),
    "kl_model_other": ("F64", 1),
    "jensen_shannon": ("F64", 1),
    "agrees": ("I32", 1),
}
N_BINS = 32
ERRORS_STATED = 3.0
"""Standard errors, and biases, that a stated error is wide."""

# Rounding of a probability that is one minus a sum, or a sum of float32 exponentials over another.
_SUM_ROUNDING = 5e-7
# Tokens whose barycentres are found at a time.
_SLAB = 1 << 14

Array = NDArray[np.float64]


def compare(table: TokenTable, start: int, rows: Predictions, stored: TokenTable, stored_format: OutputFormat) -> None:
    """
    Write the divergences of a live model's predictions from the stored ones of another.

    Args:
        table (`TokenTable`): Where to: `PAIR_COLUMNS`.
        start (`int`): Number of the first prediction in the text.
        rows (`Predictions`): Of the live model.
        stored (`TokenTable`): The other model's, of the same text.
        stored_format (`OutputFormat`): How they are stored.
    """
    stop = start + len(rows)
    log_p = stored.read("log_probs", start, stop).astype(np.float64)
    if stored_format.is_exact:
        whole = Divergences(*(term.sum(axis=-1) for term in divergence_terms(log_p, rows.log_probs())))
        even, odd = whole, whole
    else:
        log_q = rows.log_probs(stored.read("ids", start, stop))
        even, odd = _from_sketch(log_p, log_q, stored.read("tail", start, stop), stored_format.top_k)
    table.write("chord_even", start, even.chord)
    table.write("chord_odd", start, odd.chord)
    table.write("kl_other_model", start, 0.5 * (even.kl_pq + odd.kl_pq))
    table.write("kl_model_other", start, 0.5 * (even.kl_qp + odd.kl_qp))
    table.write("jensen_shannon", start, 0.5 * (even.jensen_shannon + odd.jensen_shannon))
    table.write("agrees", start, rows.first == stored.read("first", start, stop))


def _from_sketch(log_p: Array, log_q: Array, tail_p: Array, top_k: int) -> tuple[Divergences, Divergences]:
    """
    Two estimates of the divergences, of equal worth and all but independent, from every other draw of the tail each.

    The tail adds `P_tail * mean f(q / p)` over draws from `p`, an unbiased estimate. What all of `q`'s tail weighs is
    known, so the mean ratio of the draws tells how much of it they missed; by how much that matters to `f` is its
    regression on the ratio (a control variate), fitted on the *other* draws so that no bias comes of it. The result
    is held within what the sums of the two tails alone allow.
    """
    seen = divergence_terms(log_p[:, :top_k], log_q[:, :top_k])
    tail_q = np.maximum(1.0 - np.exp(log_q[:, :top_k]).sum(axis=-1), 0.0)
    least = lumped_divergences(tail_p, np.maximum(tail_p + _beyond_rounding(tail_q - tail_p), 0.0))
    # Terms relative to p: those of a p of 1. A tail of nothing has no outcome to draw.
    log_ratio = np.where(tail_p[:, None] > 0, log_q[:, top_k:] - log_p[:, top_k:], 0.0)
    ratio = np.exp(log_ratio)
    drawn = divergence_terms(np.zeros_like(log_ratio), log_ratio)

    def estimate(parity: int) -> Divergences:
        missed = _beyond_rounding(tail_q - tail_p * ratio[:, parity::2].mean(axis=-1))
        others = ratio[:, 1 - parity :: 2]
        centred = others - others.mean(axis=-1, keepdims=True)
        squares = (centred**2).sum(axis=-1)
        totals = []
        for top, low, draws in zip(seen, least, drawn):
            slope = (centred * draws[:, 1 - parity :: 2]).sum(axis=-1) / np.where(squares > 0, squares, 1.0)
            # No divergence falls where a ratio above 1 rises.
            tail = tail_p * draws[:, parity::2].mean(axis=-1) + np.maximum(slope, 0.0) * missed
            totals.append(top.sum(axis=-1) + np.maximum(tail, low))
        return Divergences(np.minimum(totals[0], seen.chord.sum(axis=-1) + tail_p + tail_q), *totals[1:])

    return estimate(0), estimate(1)


def _beyond_rounding(difference: Array) -> Array:
    """Return by how much two tails surely differ."""
    return np.copysign(np.maximum(np.abs(difference) - _SUM_ROUNDING, 0.0), difference)


def summarise(model: str, other: str, domain: str, table: TokenTable) -> FunctionDistance:
    """Reduce the divergences of two models on a text to the figures a person reads."""
    even, odd = distances(table, "chord_even"), distances(table, "chord_odd")
    distance = pair_distances(table)
    counts, edges = np.histogram(distance, bins=N_BINS, range=(0.0, math.pi))
    return FunctionDistance(
        model,
        other,
        domain,
        table.n_rows,
        fisher_rao=_spread(distance),
        mean_squared=_mean(distance**2),
        kl_other_model=_mean(table.read("kl_other_model")),
        kl_model_other=_mean(table.read("kl_model_other")),
        jensen_shannon=_mean(table.read("jensen_shannon")),
        top1_agreement=_mean(table.read("agrees")),
        error=_stated_error(distance, even, odd),
        histogram=tuple(zip(edges[:-1].tolist(), counts.tolist())),
    )


def objective(
    domain: str, experts: Sequence[str], weights: Mapping[str, float], pairs: Mapping[tuple[str, str], TokenTable]
) -> Objective:
    """
    Evaluate Eq. 3 of arXiv 2603.04972 on the tokens of a text, and where its lowest point is.

    Args:
        domain (`str`): Name of the text.
        experts (`Sequence[str]`): Names of the experts.
        weights (`Mapping[str, float]`): Weight of each, summing to 1.
        pairs (`Mapping[tuple[str, str], TokenTable]`):
            Divergences by (model, other): of the merged model, named `"merged"`, and every expert, and of every two
            experts, in either order.
    """
    names = [MERGED, *experts]
    alpha = np.array([weights[name] for name in experts])
    n_tokens = next(iter(pairs.values())).n_rows
    to_barycentre: dict[str, list[Array]] = {"both": [], "even": [], "odd": []}
    value, lowest = [], []
    for start in range(0, n_tokens, _SLAB):
        stop = min(start + _SLAB, n_tokens)
        chords = {part: np.zeros((stop - start, len(names), len(names))) for part in to_barycentre}
        for i, one in enumerate(names):
            for j, two in enumerate(names[:i]):
                table = pairs.get((one, two)) or pairs[two, one]
                for part in ("even", "odd"):
                    chords[part][:, i, j] = chords[part][:, j, i] = table.read(f"chord_{part}", start, stop)
        chords["both"] = 0.5 * (chords["even"] + chords["odd"])
        for part, of_part in chords.items():
            distance, spread = barycentre_from_chords(of_part, alpha)
            to_barycentre[part].append(distance)
            if part == "both":
                value.append(chord_to_distance(of_part[:, 0, 1:]) ** 2 @ alpha)
                lowest.append(spread**2 @ alpha)
    joined = {part: np.concatenate(slabs) for part, slabs in to_barycentre.items()}
    return Objective(
        domain,
        n_tokens,
        value=_mean(np.concatenate(value)),
        lowest=_mean(np.concatenate(lowest)),
        to_barycentre=_spread(joined["both"]),
        error=_stated_error(joined["both"], joined["even"], joined["odd"]),
    )


def pair_distances(table: TokenTable) -> Array:
    """Return the Fisher-Rao distance of every token, `(T,)`, radians."""
    return chord_to_distance(0.5 * (table.read("chord_even") + table.read("chord_odd")))


def distances(table: TokenTable, column: str) -> Array:
    """Return the Fisher-Rao distances that one column of chords means, `(T,)`, radians."""
    return chord_to_distance(table.read(column))


def _stated_error(both: Array, even: Array, odd: Array) -> float:
    """
    Return how far the mean of `both` may be off: three standard errors, and the bias, each taken generously.

    The two estimates of every token tell both. Their difference has four times the variance of their mean. And a
    distance bends as a function of the chord, so that noise in the chord shifts it, twice as far for a half of the
    draws as for all: by about as much as the halves' mean lies beside the whole's.
    """
    noise = 0.5 * math.sqrt(math.fsum((even - odd) ** 2)) / len(even)
    bias = _mean(0.5 * (even + odd)) - _mean(both)
    return ERRORS_STATED * (noise + abs(bias))


def _spread(values: Array) -> Spread:
    median, p95 = np.quantile(values, [0.5, 0.95]).tolist()
    return Spread(_mean(values), median, p95, float(values.max()))


def _mean(values: NDArray[Any]) -> float:
    return math.fsum(values) / len(values)
