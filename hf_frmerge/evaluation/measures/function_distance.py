"""Compute divergences between the predictions of two models, token by token, and the objective of a merge."""

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
"""Bins of a histogram of distances, over `[0, pi]`."""

ERRORS_STATED = 3.0
"""Width of the stated error, in standard errors and biases."""

# Rounding error of a tail probability, which is 1 minus a sum, or a quotient of sums of float32 exponentials.
_SUM_ROUNDING = 5e-7
# Tokens whose barycentres are computed at a time: bounds the memory for the matrices of chords.
_SLAB = 1 << 14

Array = NDArray[np.float64]


def compare(table: TokenTable, start: int, rows: Predictions, stored: TokenTable, stored_format: OutputFormat) -> None:
    """
    Compute the divergences between a running model's predictions and another model's stored ones, and write them.

    Args:
        table (`TokenTable`): Destination table, with `PAIR_COLUMNS`.
        start (`int`): Number of the first prediction in the text.
        rows (`Predictions`): Predictions of the running model.
        stored (`TokenTable`): Predictions of the other model on the same text.
        stored_format (`OutputFormat`): Format of `stored`.
    """
    stop = start + len(rows)
    log_p = stored.read("log_probs", start, stop).astype(np.float64)
    if stored_format.is_exact:
        exact = Divergences(*(term.sum(axis=-1) for term in divergence_terms(log_p, rows.log_probs())))
        even, odd = exact, exact  # equal halves: the stated error comes out as 0
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
    Estimate the divergences twice, from the even and the odd draws of the tail, almost independently.

    The tail contributes `P_tail * mean f(q / p)` over draws from `p`, an unbiased estimate. The probability of `q`'s
    tail is known, so the mean ratio of the draws shows how much of it they missed. The regression of `f` on the ratio
    corrects for that (a control variate); it is fitted on the *other* half of the draws, so it adds no bias. The
    result is clipped to the bounds that follow from the two tail probabilities.

    Args:
        log_p (`np.ndarray`): Stored log-probabilities, `(T, 2 * top_k)`: the likeliest outcomes, then the draws.
        log_q (`np.ndarray`): Log-probabilities of the same outcomes under the running model.
        tail_p (`np.ndarray`): Probability of the stored model's tail, `(T,)`.
        top_k (`int`): Likeliest outcomes of a sketch.

    Returns:
        Two `Divergences`, `(T,)` each, float64.
    """
    top_terms = divergence_terms(log_p[:, :top_k], log_q[:, :top_k])
    tail_q = np.maximum(1.0 - np.exp(log_q[:, :top_k]).sum(axis=-1), 0.0)
    lower_bounds = lumped_divergences(tail_p, np.maximum(tail_p + _beyond_rounding(tail_q - tail_p), 0.0))
    # The terms are homogeneous in (p, q), so f(q / p) is the term for p = 1. An empty tail has no draws.
    log_ratio = np.where(tail_p[:, None] > 0, log_q[:, top_k:] - log_p[:, top_k:], 0.0)
    ratio = np.exp(log_ratio)
    draw_terms = divergence_terms(np.zeros_like(log_ratio), log_ratio)

    def estimate(parity: int) -> Divergences:
        missed = _beyond_rounding(tail_q - tail_p * ratio[:, parity::2].mean(axis=-1))
        others = ratio[:, 1 - parity :: 2]
        centred = others - others.mean(axis=-1, keepdims=True)
        squares = (centred**2).sum(axis=-1)
        totals = []
        for top, bound, terms in zip(top_terms, lower_bounds, draw_terms):
            slope = (centred * terms[:, 1 - parity :: 2]).sum(axis=-1) / np.where(squares > 0, squares, 1.0)
            # Divergences never fall as a ratio above 1 rises, so a negative slope is noise.
            tail = tail_p * terms[:, parity::2].mean(axis=-1) + np.maximum(slope, 0.0) * missed
            totals.append(top.sum(axis=-1) + np.maximum(tail, bound))
        # Tails without a common outcome have the largest chord, the sum of their probabilities.
        return Divergences(np.minimum(totals[0], top_terms.chord.sum(axis=-1) + tail_p + tail_q), *totals[1:])

    return estimate(0), estimate(1)


def _beyond_rounding(difference: Array) -> Array:
    """Shrink a difference of two tails towards 0 by its rounding error."""
    return np.copysign(np.maximum(np.abs(difference) - _SUM_ROUNDING, 0.0), difference)


def summarise(model: str, other: str, domain: str, table: TokenTable) -> FunctionDistance:
    """
    Reduce the divergences of two models on a text to means, quantiles and a histogram.

    Args:
        model (`str`): Name of the model in question.
        other (`str`): Name of the model it is compared with.
        domain (`str`): Name of the text.
        table (`TokenTable`): Divergences of every token, with `PAIR_COLUMNS`.
    """
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
    Evaluate the objective (Eq. 3 of arXiv 2603.04972) on the tokens of a text, and its minimum over all models.

    Args:
        domain (`str`): Name of the text.
        experts (`Sequence[str]`): Names of the experts.
        weights (`Mapping[str, float]`): Weight of each, summing to 1.
        pairs (`Mapping[tuple[str, str], TokenTable]`):
            Divergences by (model, other), in either order, for every two of the experts and the merged model, which is
            named `"merged"`.
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
                table = pairs.get((one, two)) or pairs[two, one]  # the chord is symmetric
                for part in ("even", "odd"):
                    chords[part][:, i, j] = chords[part][:, j, i] = table.read(f"chord_{part}", start, stop)
        chords["both"] = 0.5 * (chords["even"] + chords["odd"])
        # The barycentre's square root is a combination of the experts', so pairwise chords are all that it takes.
        for part, chords_of_part in chords.items():
            distance, spread = barycentre_from_chords(chords_of_part, alpha)
            to_barycentre[part].append(distance)
            if part == "both":
                value.append(chord_to_distance(chords_of_part[:, 0, 1:]) ** 2 @ alpha)
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
    """Return the Fisher-Rao distance at every token, `(T,)`, in radians, from both halves of the draws."""
    return chord_to_distance(0.5 * (table.read("chord_even") + table.read("chord_odd")))


def distances(table: TokenTable, column: str) -> Array:
    """Convert a column of chords to Fisher-Rao distances, `(T,)`, in radians."""
    return chord_to_distance(table.read(column))


def _stated_error(both: Array, even: Array, odd: Array) -> float:
    """
    Return a generous bound on the error of the mean of `both`: three standard errors plus three times the bias.

    Both come from the two estimates of every token. Their difference has four times the variance of their mean. The
    distance is nonlinear in the chord, so noise in the chord biases it, and twice as much for half of the draws as for
    all. The bias is therefore about the mean of the halves minus that of the whole.

    Args:
        both (`np.ndarray`): Distances from all draws, `(T,)`, radians.
        even (`np.ndarray`): Distances from the even draws.
        odd (`np.ndarray`): Distances from the odd draws.
    """
    # Half of the standard error of the difference, by the factor four above.
    noise = 0.5 * math.sqrt(math.fsum((even - odd) ** 2)) / len(even)
    bias = _mean(0.5 * (even + odd)) - _mean(both)
    return ERRORS_STATED * (noise + abs(bias))


def _spread(values: Array) -> Spread:
    """Summarise a quantity over tokens."""
    median, p95 = np.quantile(values, [0.5, 0.95]).tolist()
    return Spread(_mean(values), median, p95, float(values.max()))


def _mean(values: NDArray[Any]) -> float:
    """Return the mean of an exactly rounded sum, which the order of the tokens cannot change."""
    return math.fsum(values) / len(values)
