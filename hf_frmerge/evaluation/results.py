"""From tables of tokens to the rows a person reads: what was kept of each expert, and where behaviour changed most."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from hf_frmerge.evaluation.blocks import TokenBlocks
from hf_frmerge.evaluation.function_distance import pair_distances
from hf_frmerge.evaluation.loop import recovery
from hf_frmerge.evaluation.outputs import TokenTable
from hf_frmerge.evaluation.record import MERGED, EvaluationRecord, Recovered, WorstToken

CONTEXT_TOKENS = 24
"""Tokens shown before one on which models disagree."""


def recovery_rows(record: EvaluationRecord) -> list[Recovered]:
    """
    Return how much of every expert's gain over the base the merged model keeps, on the text of that expert.

    The text of an expert is the one of its name; without such a text, the one on which it gains most over the base.
    """
    base = next((name for name, role in record.models.items() if role == "base"), None)
    losses: dict[str, dict[str, float]] = {}
    for score in record.scores:
        losses.setdefault(score.model, {})[score.domain] = score.metrics["loss"]
    if base not in losses or MERGED not in losses:
        return []
    rows = []
    for expert in record.experts:
        own = losses.get(expert)
        if own is None:
            continue
        domain = expert if expert in own else max(own, key=lambda name: losses[base][name] - own[name])
        share = recovery(losses[base][domain], own[domain], losses[MERGED][domain])
        rows.append(
            Recovered(
                MERGED,
                expert,
                domain,
                gain=losses[base][domain] - own[domain],
                kept=losses[base][domain] - losses[MERGED][domain],
                share=None if math.isnan(share) else share,
            )
        )
    return rows


def worst_tokens(
    expert: str,
    domain: str,
    blocks: TokenBlocks,
    tables: Mapping[str, TokenTable],
    pair: TokenTable,
    decode: Callable[[Sequence[int]], str],
    n: int,
) -> list[WorstToken]:
    """Return the `n` tokens on which the merged model's prediction is farthest from an expert's, farthest first."""
    distance = pair_distances(pair)
    # Ties in the order of the text.
    farthest = np.argsort(-distance, kind="stable")[:n].tolist()
    rows = []
    for place in farthest:
        context = blocks.context(place, CONTEXT_TOKENS).tolist()
        guess = {name: int(tables[name].read("first", place, place + 1)[0]) for name in (expert, MERGED)}
        probability = {
            name: math.exp(float(tables[name].read("log_prob", place, place + 1)[0])) for name in (expert, MERGED)
        }
        rows.append(
            WorstToken(
                expert,
                domain,
                context=decode(context),
                token=decode([int(blocks.targets[place])]),
                distance=float(distance[place]),
                expert_guess=decode([guess[expert]]),
                merged_guess=decode([guess[MERGED]]),
                expert_probability=probability[expert],
                merged_probability=probability[MERGED],
            )
        )
    return rows
