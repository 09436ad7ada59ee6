"""Build the record of an evaluation from stored tables of tokens."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from hf_frmerge.errors import ArgumentError
from hf_frmerge.evaluation.measures.function_distance import objective, pair_distances, summarise
from hf_frmerge.evaluation.measures.token_tables import TokenTable
from hf_frmerge.evaluation.record import (
    MERGED,
    EvaluationRecord,
    Recovered,
    Role,
    Score,
    WorstToken,
)
from hf_frmerge.evaluation.suite.inputs import Inputs
from hf_frmerge.evaluation.suite.result_store import ResultStore
from hf_frmerge.evaluation.text.forward import metrics_of, recovery
from hf_frmerge.evaluation.text.token_blocks import TokenBlocks

logger = logging.getLogger(__name__)

CONTEXT_TOKENS = 24
"""Tokens of context shown before a worst token."""


def build_record(
    inputs: Inputs,
    store: ResultStore,
    weights: Mapping[str, float],
    n_worst: int,
    on_log_probs: Callable[[str, str, NDArray[np.float64]], object] | None = None,
) -> EvaluationRecord:
    """
    Build the record from stored results; no model is loaded.

    Args:
        inputs (`Inputs`): Models and texts.
        store (`ResultStore`): Complete results of all models on all texts.
        weights (`Mapping[str, float]`): Weights of the experts, summing to 1.
        n_worst (`int`): Worst tokens to show per expert and text.
        on_log_probs (`Callable`, *optional*): As in `RunSettings`.
    """
    record = EvaluationRecord(models=dict(inputs.roles), weights=dict(weights))
    causal = []
    for name in inputs.roles:
        measured = store.measured(name)
        # The cache is keyed by content: another evaluation may have stored the model under another name.
        record.layers += [replace(row, model=name) for row in measured.layers]
        record.generations += [replace(row, model=name) for row in measured.generations]
        if measured.causal:
            causal.append(name)
    # The last model stands for all: they read the same tokens, and their layers are equally wide.
    n_tokens, n_features = measured.n_tokens, measured.n_features
    if n_tokens <= n_features:
        logger.warning(
            "Effective ranks come from %d tokens in %d dimensions, fewer than it takes to fill them: compare them "
            "with each other only, or evaluate on more text.",
            n_tokens,
            n_features,
        )
    for number, domain in enumerate(inputs.texts):
        _add_text(record, inputs, store, number, domain, causal, n_worst)
        if on_log_probs is not None:
            with store.tables(number, causal) as (tables, _):
                for name, table in tables.items():
                    on_log_probs(name, domain, table.read("log_prob"))
    record.recovery = recovery_rows(record)
    record.settings = {
        "block_size": max(text.block_size for text in inputs.texts.values()),
        "top_k": 0 if store.format.is_exact else store.format.top_k,
        "n_tokens": n_tokens,
        "n_features": n_features,
    }
    return record


def expert_weights(weights: Mapping[str, float] | None, roles: Mapping[str, Role]) -> dict[str, float]:
    """
    Return the weights of the experts, scaled to sum to 1; equal by default.

    Raises:
        ArgumentError: If a weight is missing, negative or not finite, or all are 0.
    """
    experts = [name for name, role in roles.items() if role == "expert"]
    if weights is None:
        return dict.fromkeys(experts, 1 / max(len(experts), 1))
    for name in experts:
        if name not in weights or not 0 <= weights[name] < math.inf:
            raise ArgumentError(f"The weight of the expert {name!r} is {weights.get(name)}; pass one of at least 0.")
    total = math.fsum(weights[name] for name in experts)
    if experts and total == 0:
        raise ArgumentError("The weights of all experts are 0; at least one must count.")
    return {name: weights[name] / total for name in experts}


def _add_text(
    record: EvaluationRecord,
    inputs: Inputs,
    store: ResultStore,
    number: int,
    domain: str,
    models: Sequence[str],
    n_worst: int,
) -> None:
    """Add scores, distances, the objective and worst tokens of one text to the record."""
    blocks = inputs.texts[domain]
    targets = blocks.targets.numpy()
    with store.tables(number, models) as (tables, pairs):
        for name, table in tables.items():
            metrics = metrics_of(table.read("log_prob"), float(np.mean(table.read("first") == targets)))
            record.scores.append(Score(name, domain, metrics.by_name(), metrics.n_tokens, blocks.n_samples))
        record.distances += [summarise(one, two, domain, table) for (one, two), table in pairs.items()]
        experts = [name for name in record.experts if name in models]
        if MERGED not in models or not experts:
            return
        record.objectives.append(objective(domain, experts, record.weights, pairs))
        for expert in experts:
            pair = pairs[MERGED, expert]
            record.worst_tokens += worst_tokens(expert, domain, blocks, tables, pair, inputs.decode, n_worst)


def recovery_rows(record: EvaluationRecord) -> list[Recovered]:
    """Return the share of every expert's gain that the merged model keeps; empty without base or merged model."""
    measured = {score.model for score in record.scores}
    base = next((name for name, role in record.models.items() if role == "base"), None)
    if base not in measured or MERGED not in measured:
        return []
    return recovered(record.scores, [MERGED], [name for name in record.experts if name in measured], base)


def recovered(scores: Iterable[Score], merged: Iterable[str], experts: Sequence[str], base: str) -> list[Recovered]:
    """
    Return the share of every expert's gain over the base that every merged model keeps, on the text of that expert.

    The text of an expert is the one with its name; if there is none, the text on which it gains most over the base.

    Args:
        scores (`Iterable[Score]`): Scores of all these models on all texts.
        merged (`Iterable[str]`): Names of merged models.
        experts (`Sequence[str]`): Names of the experts.
        base (`str`): Name of the base model.

    Returns:
        `list[Recovered]`: one for every merged model and expert.
    """
    losses: dict[str, dict[str, float]] = {}
    for score in scores:
        losses.setdefault(score.model, {})[score.domain] = score.metrics["loss"]
    rows = []
    for model in merged:
        for expert in experts:
            by_domain = losses[expert]
            domain = (
                expert
                if expert in by_domain
                else max(by_domain, key=lambda name: losses[base][name] - by_domain[name])
            )
            base_loss, expert_loss, loss = (losses[name][domain] for name in (base, expert, model))
            # None, because a share of no gain is not a number that could be averaged or compared.
            share = recovery(base_loss, expert_loss, loss)
            known = None if math.isnan(share) else share
            rows.append(Recovered(model, expert, domain, base_loss - expert_loss, base_loss - loss, known))
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
    """Return the `n` tokens on which the merged model is farthest from an expert, farthest first."""
    distance = pair_distances(pair)
    # Stable: ties are in the order of the text, so the record is reproducible.
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
