"""Learn from the class of a model what its tensors do not show. Imports transformers, which takes seconds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hf_frmerge.checkpoints.model_structure import ModelStructure, may_be_tied, stated_ties
from hf_frmerge.checkpoints.names.empty_model import build_empty
from hf_frmerge.errors import CheckpointError

if TYPE_CHECKING:
    from hf_frmerge.checkpoints.tensors.reader import Checkpoint


def read_structure(base: Checkpoint) -> ModelStructure:
    """
    Find which tensors a model ties, and which of its layers store their weight transposed.

    The model is built to find out, since `config.json` may leave the tie to the default of the class. For a class that
    transformers does not have, the config decides, or an output layer that is stored beside the embedding.
    """
    try:
        model = build_empty(base.config(), base.source.spec)
    except CheckpointError:
        return ModelStructure(frozenset() if _is_untied(base) else None, None)
    from transformers.pytorch_utils import Conv1D

    tied = model.all_tied_weights_keys
    conv1d = (path for path, module in model.named_modules() if isinstance(module, Conv1D))
    return ModelStructure(frozenset(tied) | frozenset(tied.values()), frozenset(conv1d))


def _is_untied(base: Checkpoint) -> bool:
    """Whether config or tensors show that input embedding and output layer are separate."""
    config = base.config()
    stated = stated_ties(config)
    if stated:
        return not any(stated)
    rows = next((value["vocab_size"] for value in _levels(config) if "vocab_size" in value), None)
    # Two matrices with a row for every token: the embedding, and an output layer of its own.
    tall = [name for name, info in base.tensors.items() if info.shape[:1] == (rows,) and len(info.shape) == 2]
    return len([name for name in tall if may_be_tied(name)]) > 1


def _levels(config: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a config and those nested in it."""
    return [config, *(level for value in config.values() if isinstance(value, dict) for level in _levels(value))]
