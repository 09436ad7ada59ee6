"""A made-up record of an evaluation, for tests of what shows it."""

from __future__ import annotations

import math
from typing import Any

from hf_frmerge.evaluation.record import (
    MERGED,
    EvaluationRecord,
    FunctionDistance,
    Generation,
    LayerActivations,
    Objective,
    Recovered,
    Score,
    Spread,
    WorstToken,
)

LOSS = {
    "base": {"math": 3.0, "code": 2.5},
    "expert-math": {"math": 2.0, "code": 2.6},
    "expert-code": {"math": 3.2, "code": 1.5},
    MERGED: {"math": 2.3, "code": 2.0},
}


def make_record(n_layers: int = 6, **changes: Any) -> EvaluationRecord:
    """Two experts and a base on two domains; layer 4 of the merged model has collapsed."""
    experts = ["expert-math", "expert-code"]
    record = EvaluationRecord(
        models={"base": "base", "expert-math": "expert", "expert-code": "expert", MERGED: "merged"},
        weights={"expert-math": 0.5, "expert-code": 0.5},
        settings={"block_size": 256, "dtype": "bfloat16", "top_k": 128},
    )
    for model, losses in LOSS.items():
        for domain, loss in losses.items():
            metrics = {"loss": loss, "perplexity": math.exp(loss), "token_accuracy": 1 / (1 + loss)}
            record.scores.append(Score(model, domain, metrics, n_tokens=1000))
    record.recovery = [
        Recovered(MERGED, "expert-math", "math", 1.0, 0.7, 0.7),
        Recovered(MERGED, "expert-code", "code", 1.0, 0.5, 0.5),
    ]
    for domain in ("math", "code"):
        for number, expert in enumerate(experts):
            record.distances.append(_distance(MERGED, expert, domain, 0.3 + 0.2 * number))
        record.distances.append(_distance("expert-code", "expert-math", domain, 0.9))
        record.objectives.append(Objective(domain, 1000, 0.25, 0.2, Spread(0.2, 0.18, 0.5, 1.1)))
        for number in range(3):
            record.worst_tokens.append(
                WorstToken(
                    experts[0],
                    domain,
                    f"{number} <b>times</b> | two is",
                    " four",
                    2.9 - number / 10,
                    " four",
                    " 4\n",
                    0.9,
                    0.05,
                )
            )
    for model in record.models:
        for layer in range(n_layers + 1):
            weak = 0.6 if model == MERGED and layer == 4 else 1.0
            record.layers.append(LayerActivations(model, layer, weak * (1 + layer), weak * (20 + 3 * layer)))
        record.generations.append(Generation(model, "math", "2 + 2", " = 4, and that is that", 0.1, 1.5))
    for name, value in changes.items():
        setattr(record, name, value)
    return record


def _distance(model: str, other: str, domain: str, mean: float) -> FunctionDistance:
    edges = [index * math.pi / 20 for index in range(20)]
    counts = [round(1000 * math.exp(-(((edge - mean) / 0.3) ** 2))) for edge in edges]
    return FunctionDistance(
        model,
        other,
        domain,
        1000,
        Spread(mean, 0.9 * mean, 2 * mean, 3.0),
        mean**2 * 1.2,
        0.11,
        0.12,
        0.03,
        0.8,
        error=0.004,
        histogram=tuple(zip(edges, counts)),
    )
