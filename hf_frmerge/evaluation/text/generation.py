"""Short greedy continuations: a collapsed model repeats itself, or is unsure of everything."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

NGRAM = 4


def continue_greedily(
    model: torch.nn.Module, prompts: torch.Tensor, max_new_tokens: int
) -> list[tuple[list[int], float]]:
    """
    Let a model go on after prompts, always with its first guess.

    Args:
        model (`torch.nn.Module`): Causal language model of transformers.
        prompts (`torch.Tensor`): `(P, T)`, int64, none of it padding.
        max_new_tokens (`int`): Tokens to add, unless the model ends earlier.

    Returns:
        `list[tuple[list[int], float]]`: for every prompt the tokens added, without the one that ends the text, and
        the mean entropy of the predictions along them, in nats.
    """
    from transformers import GenerationConfig

    model_any: Any = model
    own = model_any.generation_config
    end = own.eos_token_id if isinstance(own.eos_token_id, (list, type(None))) else [own.eos_token_id]
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=end,
        pad_token_id=own.pad_token_id if own.pad_token_id is not None else (end or [0])[0],
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
    # (P, steps)
    entropies = torch.stack(
        [torch.distributions.Categorical(logits=step.float()).entropy() for step in output.logits], 1
    )
    results = []
    for tokens, entropy in zip(added.tolist(), entropies.tolist()):
        length = next((place for place, token in enumerate(tokens) if token in (end or [])), len(tokens))
        predicted = entropy[: length + 1]  # that the text ends is a prediction too
        results.append((tokens[:length], sum(predicted) / len(predicted)))
    return results


def repetition(tokens: Sequence[int], n: int = NGRAM) -> float:
    """Return the share of n-grams that occurred before in `tokens`, in `[0, 1]`; 0 if there are none."""
    grams = [tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)]
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0
