"""The metrics of `evaluate` against numpy, combined and batch by batch, with no Hub."""

from __future__ import annotations

import evaluate
import numpy as np
import pytest

from hf_frmerge.evaluation.measures.metrics import (
    ActivationVariance,
    EffectiveRank,
    Perplexity,
    RepresentationCollapse,
    TokenAccuracy,
)

GENERATOR = np.random.default_rng(0)
TOKENS = GENERATOR.integers(0, 5, 40)
GUESSES = np.where(GENERATOR.random(40) < 0.6, TOKENS, 5)
LOG_PROBS = -GENERATOR.random(40)
STATES = GENERATOR.normal(size=(40, 6)).astype(np.float32) @ np.diag([3, 1, 1, 0.5, 0.1, 0.1]).astype(np.float32)
EXPERTS = GENERATOR.normal(size=(40, 2, 6)).astype(np.float32) + 7  # far from the origin: variance is centred


def naive_variance(states: np.ndarray) -> float:
    return states.astype(np.float64).var(axis=0).mean()


def naive_rank(states: np.ndarray) -> float:
    singular = np.linalg.svd(states.astype(np.float64) - states.mean(axis=0, dtype=np.float64), compute_uv=False)
    shares = singular**2 / (singular**2).sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def test_combined_metrics_take_each_what_is_theirs() -> None:
    metric = evaluate.combine(
        [Perplexity(), TokenAccuracy(), ActivationVariance(), EffectiveRank(), RepresentationCollapse()]
    )
    actual = metric.compute(
        predictions=GUESSES, references=TOKENS, log_probs=LOG_PROBS, activations=STATES, expert_activations=EXPERTS
    )
    experts = [EXPERTS[:, 0], EXPERTS[:, 1]]
    assert actual == pytest.approx(
        {
            "perplexity": np.exp(-LOG_PROBS.mean()),
            "token_accuracy": (GUESSES == TOKENS).mean(),
            "activation_variance": naive_variance(STATES),
            "effective_rank": naive_rank(STATES),
            "variance_ratio": naive_variance(STATES) / np.mean([naive_variance(e) for e in experts]),
            "rank_ratio": naive_rank(STATES) / np.mean([naive_rank(e) for e in experts]),
        },
        rel=1e-5,
    )


def test_batches_add_up_and_ignored_labels_do_not_count() -> None:
    metric = TokenAccuracy()
    references = TOKENS.copy()
    references[:10] = -100
    for start in (0, 25):
        stop = start + 25 if start == 0 else 40
        metric.add_batch(predictions=GUESSES[start:stop], references=references[start:stop])
    assert metric.compute() == {"token_accuracy": (GUESSES == TOKENS)[10:].mean()}
