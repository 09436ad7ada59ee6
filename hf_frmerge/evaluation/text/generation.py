"""Generate short greedy continuations and measure repetition: collapsed models loop, or predict near uniformly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

NGRAM = 4


def continue_greedily(
    model: torch.nn.Module, prompts: torch.Tensor, max_new_tokens: int
) -> list[tuple[list[int], float]]:
    """
    Continue prompts greedily, and measure how uncertain the model was.

    Args:
        model (`torch.nn.Module`): Causal language model of transformers.
        prompts (`torch.Tensor`): `(P, T)`, int64, without padding.
        max_new_tokens (`int`): Most tokens to add; the model may end the text earlier.

    Returns:
        `list[tuple[list[int], float]]`: for every prompt the tokens added, without the end-of-text token, and the mean
        entropy of their predictions, in nats.
    """
    from transformers import GenerationConfig

    model_any: Any = model
    defaults = model_any.generation_config
    end = defaults.eos_token_id if isinstance(defaults.eos_token_id, (list, type(None))) else [defaults.eos_token_id]
    # A fresh configuration: the model's may ask for sampling, beams or repetition penalties, which hide a collapse.
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=end,
        pad_token_id=defaults.pad_token_id if defaults.pad_token_id is not None else (end or [0])[0],
        output_logits=True,
        return_dict_in_generate=True,
    )
    was_training = model.training
    model.eval()
    prompts = prompts.to(model_any.device)
    with torch.inference_mode():
        output = model_any.generate(prompts, attention_mask=torch.ones_like(prompts), generation_config=config)
    model.train(was_training)
    added = output.sequences[:, prompts.shape[1] :]
    # (P, steps); float32, or the sum over a bfloat16 model's vocabulary would be rounded to three digits
    entropies = torch.stack(
        [torch.distributions.Categorical(logits=step.float()).entropy() for step in output.logits], 1
    )
    results = []
    for tokens, entropy in zip(added.tolist(), entropies.tolist()):
        length = next((place for place, token in enumerate(tokens) if token in (end or [])), len(tokens))
        predicted = entropy[: length + 1]  # the end-of-text token is a prediction too
        results.append((tokens[:length], sum(predicted) / len(predicted)))
    return results


def repetition(tokens: Sequence[int], n: int = NGRAM) -> float:
    """Return the share of n-grams that occurred earlier in `tokens`, in `[0, 1]`; 0 for fewer than `n` tokens."""
    grams = [tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)]
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0
