"""Embeddings of texts as a sentence-transformers model makes them: prompt, longest input, pooling. No retrieval."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hf_frmerge.checkpoints.beside.sentence_transformers import Pipeline
from hf_frmerge.errors import ArgumentError
from hf_frmerge.evaluation.text.token_blocks import NO_TOKENIZER, Rows, text_of

_POOLINGS = ("cls", "mean", "max", "mean_sqrt_len_tokens", "lasttoken")
# Steps after which angles are as they were.
_WITHOUT_EFFECT = ("Normalize",)


@dataclass(frozen=True)
class EmbeddingSteps:
    """
    How an embedding is made of a text.

    Attributes:
        pooling: `"cls"`, `"mean"`, `"max"`, `"mean_sqrt_len_tokens"` or `"lasttoken"`, over the last hidden states.
        max_length: longest input in tokens; `None` for the tokenizer's.
        lower_case: whether texts are lower-cased first.
        prompt: what is put before every text.
    """

    pooling: str
    max_length: int | None = None
    lower_case: bool = False
    prompt: str = ""


def embedding_steps(pipeline: Pipeline) -> EmbeddingSteps | str:
    """Return how a pipeline makes embeddings, or why that is not measured, as the end of a sentence."""
    kinds = [module.kind for module in pipeline.modules if module.kind not in _WITHOUT_EFFECT]
    if kinds != ["Transformer", "Pooling"]:
        return f"they are made in steps that are not measured ({', '.join(kinds)})"
    (folder,) = (module.path for module in pipeline.modules if module.kind == "Pooling")
    pooling = pipeline.settings(f"{folder}/config.json")
    general = pipeline.settings("config_sentence_transformers.json")
    encoder = next((name for name in pipeline.files if name.endswith("_config.json")), "sentence_bert_config.json")
    limits = pipeline.settings(encoder)
    mode = pooling.get("pooling_mode", "mean")
    prompts, default = general.get("prompts"), general.get("default_prompt_name")
    prompt = prompts.get(default, "") if isinstance(prompts, dict) and isinstance(default, str) else ""
    length = limits.get("max_seq_length")
    if mode not in _POOLINGS:
        return f"their pooling is not measured ({mode})"
    if not isinstance(prompt, str) or (prompt and pooling.get("include_prompt") is False):
        return "their pooling leaves the prompt out, which is not measured"
    return EmbeddingSteps(mode, length if isinstance(length, int) else None, bool(limits.get("do_lower_case")), prompt)


def embed(
    model: Any, rows: Rows, tokenizer: Any, steps: EmbeddingSteps, *, batch_size: int, device: torch.device
) -> NDArray[np.float64]:
    """
    Return the embeddings of all rows, `(n, d)`, float64, of norm 1.

    Args:
        model (`PreTrainedModel`): Encoder or decoder. It is moved to `device` unless it was dispatched over several.
        rows (`Iterable`): Rows with `input_ids` or else `text`, or strings, of which every line is a text.
        tokenizer (`PreTrainedTokenizerBase`): Tokenizer with a padding token.
        steps (`EmbeddingSteps`): How embeddings are made.
        batch_size (`int`): Texts a forward pass.
        device (`torch.device`): Where to run.

    Raises:
        ArgumentError: If a row has no text, there is none, or no tokenizer that pads.
    """
    if tokenizer is None:
        raise ArgumentError(NO_TOKENIZER)
    encoded = [_encode(text, tokenizer, steps) for text in _texts(rows)]
    if not encoded:
        raise ArgumentError("The evaluation data has no texts. Check that the file or the dataset split is not empty.")
    if tokenizer.pad_token is None:
        raise ArgumentError(
            "The texts have different lengths, and the tokenizer has no padding token: set `pad_token`."
        )
    if getattr(model, "hf_device_map", None) is None:
        model.to(device)
    was_training = model.training
    model.eval()
    pooled = []
    for start in range(0, len(encoded), batch_size):
        batch = tokenizer.pad(encoded[start : start + batch_size], return_tensors="pt").to(device)
        with torch.inference_mode():
            states = model(**batch, output_hidden_states=True).hidden_states[-1]
        pooled.append(_pool(states.double(), batch["attention_mask"].to(states.device), steps.pooling).cpu().numpy())
    model.train(was_training)
    embeddings = np.concatenate(pooled)
    return embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)


def mean_cosine(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """Return the mean cosine of embeddings of the same texts, both `(n, d)` of norm 1."""
    return float((one * other).sum(axis=1).mean())


def _texts(rows: Rows) -> Iterator[str | Sequence[int]]:
    """Yield texts, or the tokens of those that are tokens."""
    for number, row in enumerate(rows):
        if isinstance(row, str):
            yield from (line for line in row.splitlines() if line.strip())
        elif "input_ids" in row:
            yield np.asarray(row["input_ids"]).tolist()
        else:
            yield text_of(row, number)


def _encode(text: str | Sequence[int], tokenizer: Any, steps: EmbeddingSteps) -> dict[str, Any]:
    if not isinstance(text, str):
        return {"input_ids": list(text)[: steps.max_length]}
    text = steps.prompt + text
    return dict(tokenizer(text.lower() if steps.lower_case else text, truncation=True, max_length=steps.max_length))


def _pool(states: torch.Tensor, mask: torch.Tensor, mode: str) -> torch.Tensor:
    """Return one vector a text, `(B, d)`, of the states `(B, T, d)` that are not padding, on either side."""
    places = torch.arange(mask.shape[1], device=mask.device)
    if mode == "cls":
        return states[torch.arange(len(states)), mask.argmax(dim=1)]
    if mode == "lasttoken":
        return states[torch.arange(len(states)), (mask * places).argmax(dim=1)]
    if mode == "max":
        return states.masked_fill(mask[..., None] == 0, -torch.inf).amax(dim=1)
    # The two means have one direction.
    return (states * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)
