"""Find the tensors of a model that have a row for every token, and write another number of tokens into its config."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from hf_frmerge.checkpoints.names.empty_model import build_empty
from hf_frmerge.errors import CheckpointError


def tensors_of_tokens(config: Mapping[str, Any], spec: str) -> tuple[dict[str, int], frozenset[str]]:
    """
    Find the tensors whose size depends on the number of tokens, by building the model with one token more.

    Args:
        config (`Mapping[str, Any]`):
            Contents of `config.json`.
        spec (`str`):
            Name of the checkpoint as the user wrote it, for errors.

    Returns:
        `tuple[dict[str, int], frozenset[str]]`: Name in memory -> axis that counts the tokens; and the names in memory
        of all tensors.

    Raises:
        CheckpointError: If the model cannot be built, or a tensor has more than a row for each token.
    """
    model = build_empty(config, spec)
    n_tokens = model.config.get_text_config().vocab_size
    more = build_empty({**config, **with_n_tokens(config, n_tokens, n_tokens + 1)}, spec).state_dict()
    axes: dict[str, int] = {}
    for name, tensor in model.state_dict().items():
        shape, larger = tuple(tensor.shape), tuple(more[name].shape) if name in more else ()
        if shape == larger:
            continue
        grown = [axis for axis, (old, new) in enumerate(zip(shape, larger)) if old != new]
        # Rows are runs of elements: no axis before that of the tokens may have more than one index.
        is_rows = len(shape) == len(larger) and len(grown) == 1 and set(shape[: grown[0]]) <= {1}
        if not is_rows or (shape[grown[0]], larger[grown[0]]) != (n_tokens, n_tokens + 1):
            raise CheckpointError(
                f"{spec!r}: {name} ({list(shape)}) depends on the number of tokens ({n_tokens}), but does not have a "
                "row for each of them, so its rows cannot be matched by token. Give all models one tokenizer."
            )
        axes[name] = grown[0]
    return axes, frozenset(model.state_dict())


def with_n_tokens(config: Mapping[str, Any], before: int, after: int) -> dict[str, Any]:
    """
    Return the entries of a `config.json` that say how many tokens there are, with another number.

    Args:
        config (`Mapping[str, Any]`): Contents of `config.json`.
        before (`int`): The number that it says now. Other vocabularies, such as those of sound, are left alone.
        after (`int`): The new number.
    """
    changed = copy.deepcopy(dict(config))
    levels = [level for level in _levels(changed) if level.get("vocab_size") == before]
    # A number that the class has by default need not be written down.
    for level in levels or [changed.get("text_config", changed)]:
        level["vocab_size"] = after
    return {key: value for key, value in changed.items() if value != config.get(key)}


def _levels(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield config
    for value in config.values():
        if isinstance(value, dict):
            yield from _levels(value)
