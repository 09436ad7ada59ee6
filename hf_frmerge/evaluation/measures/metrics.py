"""
Wrap the measures of this package as metrics of the `evaluate` library, for use with `evaluate.combine`.

They load nothing from the Hub, and call the same code as an evaluation. Each ignores the inputs of the others:

```python
>>> import evaluate
>>> from hf_frmerge.evaluation.measures.metrics import Perplexity, TokenAccuracy
>>> metric = evaluate.combine([Perplexity(), TokenAccuracy()])
>>> metric.compute(log_probs=[0.0, 0.0], predictions=[5, 7], references=[5, 6])
{'perplexity': 1.0, 'token_accuracy': 0.5}

```
"""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
import numpy as np
import torch

from hf_frmerge.evaluation.measures.collapse import ActivationStatistics
from hf_frmerge.evaluation.record import LayerActivations
from hf_frmerge.evaluation.text.forward import metrics_of
from hf_frmerge.evaluation.text.token_blocks import IGNORED_LABEL

_VECTOR = datasets.Sequence(datasets.Value("float32"))


class Perplexity(evaluate.Metric):
    """Compute `perplexity` from `log_probs`, the log-probability of each token of a text in nats."""

    def _info(self) -> evaluate.MetricInfo:
        return _info("exp of the mean negative log-likelihood a token", log_probs=datasets.Value("float64"))

    def _compute(self, log_probs: Any, **others: Any) -> dict[str, float]:
        return {"perplexity": metrics_of(np.asarray(log_probs, np.float64), 0.0).perplexity}


class TokenAccuracy(evaluate.Metric):
    """Compute `token_accuracy` from `predictions`, likeliest tokens, and `references`, tokens or -100 to skip."""

    def _info(self) -> evaluate.MetricInfo:
        token = datasets.Value("int64")
        return _info("share of tokens that were the first guess", predictions=token, references=token)

    def _compute(self, predictions: Any, references: Any, **others: Any) -> dict[str, float]:
        guesses, tokens = np.asarray(predictions), np.asarray(references)
        counts = tokens != IGNORED_LABEL
        return {"token_accuracy": float((guesses == tokens)[counts].mean())}


class ActivationVariance(evaluate.Metric):
    """Compute `activation_variance` (arXiv 2603.04972, Fig. 2) from `activations` of one layer, a vector per token."""

    def _info(self) -> evaluate.MetricInfo:
        return _info("variance over tokens of every feature, averaged over features", activations=_VECTOR)

    def _compute(self, activations: Any, **others: Any) -> dict[str, float]:
        return {"activation_variance": _layer_statistics(activations).activation_variance}


class EffectiveRank(evaluate.Metric):
    """Compute `effective_rank` (Roy and Vetterli 2007) from `activations` of one layer, a vector per token."""

    def _info(self) -> evaluate.MetricInfo:
        return _info("exp of the entropy of the eigenvalues of the centred covariance", activations=_VECTOR)

    def _compute(self, activations: Any, **others: Any) -> dict[str, float]:
        return {"effective_rank": _layer_statistics(activations).effective_rank}


class RepresentationCollapse(evaluate.Metric):
    """
    Compute `variance_ratio` and `rank_ratio`, the merged model's values over the mean of the experts'.

    Inputs are `activations` of one layer of the merged model, a vector per token, and `expert_activations` on the same
    tokens, for each token a list with one vector per expert.
    """

    def _info(self) -> evaluate.MetricInfo:
        return _info(
            "activation variance and effective rank over the mean of the experts'",
            activations=_VECTOR,
            expert_activations=datasets.Sequence(_VECTOR),
        )

    def _compute(self, activations: Any, expert_activations: Any, **others: Any) -> dict[str, float]:
        merged = _layer_statistics(activations)
        # `evaluate` asks for one entry per token in every input: `(tokens, experts, d)`.
        experts = [_layer_statistics(expert) for expert in np.asarray(expert_activations).swapaxes(0, 1)]
        return {
            "variance_ratio": merged.activation_variance / float(np.mean([e.activation_variance for e in experts])),
            "rank_ratio": merged.effective_rank / float(np.mean([e.effective_rank for e in experts])),
        }


def _info(description: str, **features: Any) -> evaluate.MetricInfo:
    """Describe a metric and its inputs, as `evaluate` asks for."""
    return evaluate.MetricInfo(
        description=description, citation="arXiv 2603.04972", features=datasets.Features(features)
    )


def _layer_statistics(activations: Any) -> LayerActivations:
    """Measure `(tokens, d)` activations of one layer."""
    states = torch.as_tensor(np.asarray(activations))[None]
    statistics = ActivationStatistics()
    statistics.update([states], torch.ones(states.shape[:2]))
    return statistics.results("")[0]
