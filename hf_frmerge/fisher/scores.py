r"""
Run a model so that the gradients of what is run back, taken together, are its Fisher information.

\(F = \frac1n \sum_t E_{y \sim p_t} [\partial \log p_t(y) \, \partial \log p_t(y)^T]\), with \(p_t\) one of the n
predictions: of a language model the next token after every token of the prompts, of a classifier the class of every
prompt. A **score** is a number whose gradients g make this up: the sum of g g^T over all scores, divided by n, is F,
exactly or in the mean. There are three kinds:

* sampled: of each prompt one label is drawn for every prediction from the model's own probabilities, and the score is
  the sum of their logarithms. The gradients of drawn labels are independent given the text and zero in the mean, so
  what the square of a sum has more than the sum of squares is zero in the mean, too: unbiased, at one backward pass a
  prompt.
* exact: of every prediction and label one score, the square root of its probability (taken as constant) times the
  logarithm. No chance is left, at a backward pass for every one of them.
* empirical: the labels are the next tokens of the text. This is another quantity wherever the model is unsure of the
  text, and named for what it is. These gradients are not zero in the mean; each logarithm gets a random sign, which
  makes them so, and the estimate unbiased.
"""

# Shape suffixes: T = predictions, V = vocabulary or classes.

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hf_frmerge.errors import ArgumentError, NonFiniteError
from hf_frmerge.evaluation.models.loading import predicts_next_token

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MOST_LABELS = 256
"""Size of the largest vocabulary that is summed over exactly: every label is a backward pass."""


def run_scores(model: torch.nn.Module, prompts: Iterable[NDArray[np.int64]], *, labels: str, seed: int) -> int:
    """
    Run all prompts forwards, and all their scores backwards; hooks of the caller take the gradients.

    Args:
        model: Model of transformers that gives logits, `(1, T, V)` or `(1, V)`.
        prompts: Token ids `(T,)` of every prompt.
        labels: `"sampled"`, `"exact"` or `"empirical"`.
        seed: Of what is drawn.

    Returns:
        The number of predictions, by which the sum over scores is to be divided.

    Raises:
        ArgumentError: If the model gives no probabilities, or the labels cannot be had.
        NonFiniteError: If it predicts values that are not finite.
    """
    model_any: Any = model
    generator = torch.Generator(model_any.device).manual_seed(seed)
    n_predictions = 0
    model.eval()
    for ids in prompts:
        ids_1T = torch.from_numpy(ids)[None].to(model_any.device)
        logits = _logits(model, model_any(input_ids=ids_1T))
        if labels == "empirical":
            if logits.ndim < 3 or not predicts_next_token(model):
                raise ArgumentError(
                    f"fisher_labels='empirical' takes the next tokens of the prompts as labels, and "
                    f"{type(model).__name__} predicts something else. Leave it out: labels are then drawn from the "
                    "model's own predictions."
                )
            logits = logits[:, :-1]
        log_probs_TV = logits.reshape(-1, logits.shape[-1]).log_softmax(-1)
        for score, is_last in _scores(log_probs_TV, ids_1T[0], labels, generator):
            score.backward(retain_graph=not is_last)
        n_predictions += len(log_probs_TV)
    return n_predictions


def _scores(
    log_probs_TV: Tensor, ids_T: Tensor, labels: str, generator: torch.Generator
) -> Iterator[tuple[Tensor, bool]]:
    """Yield the scores of a prompt, and whether each is the last."""
    if labels == "exact":
        n_labels = log_probs_TV.shape[1]
        if n_labels > MOST_LABELS:
            raise _too_many(n_labels)
        roots_M = (log_probs_TV.detach().exp().sqrt() * log_probs_TV).flatten()
        for place, score in enumerate(roots_M):
            yield score, place == len(roots_M) - 1
    elif labels == "empirical":
        signs_T = torch.randint(0, 2, (len(log_probs_TV),), generator=generator, device=ids_T.device) * 2 - 1
        yield (signs_T * log_probs_TV.gather(1, ids_T[1:, None])[:, 0]).sum(), True
    else:
        labels_T1 = torch.multinomial(log_probs_TV.detach().exp(), 1, generator=generator)
        yield log_probs_TV.gather(1, labels_T1).sum(), True


def _logits(model: torch.nn.Module, output: Any) -> Tensor:
    """Return the logits of all predictions."""
    logits: Tensor | None = getattr(output, "logits", None)
    if logits is None or logits.shape[-1] < 2:
        raise _no_probabilities(model)
    if not logits.isfinite().all():
        raise NonFiniteError(f"{type(model).__name__} predicts values that are not finite for a prompt. Leave it out.")
    # In float32 at least.
    return logits.float() if logits.dtype != torch.float64 else logits


def check_scores(model: PreTrainedModel, labels: str) -> None:
    """
    Raise `ArgumentError` for what can be told of a model without running it: `run_scores` would find it, but later.

    Args:
        model: Modules of the model, without weights if need be.
        labels: As for `run_scores`.
    """
    if model.base_model is model:  # it has no head
        raise _no_probabilities(model)
    if labels == "exact" and predicts_next_token(model):
        n_labels = model.config.get_text_config().vocab_size
        if n_labels > MOST_LABELS:
            raise _too_many(n_labels)


def _no_probabilities(model: torch.nn.Module) -> ArgumentError:
    return ArgumentError(
        f"{type(model).__name__} gives no probabilities, and Fisher information is about these. Choose a method that "
        "needs none, such as regmean, and leave out fisher (--fisher)."
    )


def _too_many(n_labels: int) -> ArgumentError:
    return ArgumentError(
        f"fisher_labels='exact' runs backwards once for every label of every prediction, and there are {n_labels:,} "
        f"labels: more than {MOST_LABELS}. Leave it out: labels are then drawn."
    )
