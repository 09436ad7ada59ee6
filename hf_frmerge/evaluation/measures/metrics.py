"""
What is measured here, as metrics of the `evaluate` library, so that `evaluate.combine` takes them.

They need no Hub, and hold no maths of their own. Each reads its own inputs, and leaves those of others alone:

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
    """`log_probs`: of the tokens of a text, in nats -> `perplexity`."""

    def _info(self) -> evaluate.MetricInfo:
        return _info("exp of the mean negative log-likelihood a token", log_probs=datasets.Value("float64"))

    def _compute(self, log_probs: Any, **others: Any) -> dict[str, float]:
        return {"perplexity": metrics_of(np.asarray(log_probs, np.float64), 0.0).perplexity}


class TokenAccuracy(evaluate.Metric):
    """`predictions`: first guesses, `references`: tokens of the text, -100 where none counts -> `token_accuracy`."""

    def _info(self) -> evaluate.MetricInfo:
        token = datasets.Value("int64")
        return _info("share of tokens that were the first guess", predictions=token, references=token)

    def _compute(self, predictions: Any, references: Any, **others: Any) -> dict[str, float]:
        guesses, tokens = np.asarray(predictions), np.asarray(references)
        counts = tokens != IGNORED_LABEL
        return {"token_accuracy": float((guesses == tokens)[counts].mean())}


class ActivationVariance(evaluate.Metric):
    """`activations`: of one layer, a vector a token -> `activation_variance` (arXiv 2603.04972, Fig. 2)."""

    def _info(self) -> evaluate.MetricInfo:
        return _info("variance over tokens of every feature, averaged over features", activations=_VECTOR)

    def _compute(self, activations: Any, **others: Any) -> dict[str, float]:
        return {"activation_variance": _measured(activations).activation_variance}


class EffectiveRank(evaluate.Metric):
    """`activations`: of one layer, a vector a token -> `effective_rank` of the covariance (Roy and Vetterli 2007)."""

    def _info(self) -> evaluate.MetricInfo:
        return _info("exp of the entropy of the eigenvalues of the centred covariance", activations=_VECTOR)

    def _compute(self, activations: Any, **others: Any) -> dict[str, float]:
        return {"effective_rank": _measured(activations).effective_rank}


class RepresentationCollapse(evaluate.Metric):
    """
    `activations`: of the merged model, a vector a token; `expert_activations`: of every expert on the same tokens, a
    list of vectors a token -> `variance_ratio` and `rank_ratio`, to the mean of the experts.
    """

    def _info(self) -> evaluate.MetricInfo:
        return _info(
            "activation variance and effective rank over the mean of the experts'",
            activations=_VECTOR,
            expert_activations=datasets.Sequence(_VECTOR),
        )

    def _compute(self, activations: Any, expert_activations: Any, **others: Any) -> dict[str, float]:
        merged = _measured(activations)
        experts = [_measured(of_one) for of_one in np.asarray(expert_activations).swapaxes(0, 1)]
        return {
            "variance_ratio": merged.activation_variance / float(np.mean([e.activation_variance for e in experts])),
            "rank_ratio": merged.effective_rank / float(np.mean([e.effective_rank for e in experts])),
        }


def _info(description: str, **features: Any) -> evaluate.MetricInfo:
    return evaluate.MetricInfo(
        description=description, citation="arXiv 2603.04972", features=datasets.Features(features)
    )


def _measured(activations: Any) -> LayerActivations:
    states = torch.as_tensor(np.asarray(activations))[None]
    statistics = ActivationStatistics()
    statistics.update([states], torch.ones(states.shape[:2]))
    return statistics.results("")[0]
