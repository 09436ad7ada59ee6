"""Find the tensors of a classifier that have a row for every class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_frmerge.checkpoints.names.empty_model import build_empty


def tensors_of_classes(config: Mapping[str, Any], spec: str, n_classes: int) -> dict[str, bool]:
    """
    Find the tensors whose size depends on the number of classes, by building the model with one class more.

    Args:
        config (`Mapping[str, Any]`):
            Contents of `config.json`.
        spec (`str`):
            Name of the checkpoint as the user wrote it, for errors.
        n_classes (`int`):
            Number of classes.

    Returns:
        `dict[str, bool]`: Name in memory -> whether row `k` belongs to class `k`, and there are no other rows.

    Raises:
        CheckpointError: If the model cannot be built.
    """
    without = {key: value for key, value in config.items() if key not in ("id2label", "label2id", "num_labels")}
    exact, more = (
        {name: tuple(tensor.shape) for name, tensor in build_empty(without, spec, num_labels=n).state_dict().items()}
        for n in (n_classes, n_classes + 1)
    )
    return {
        name: shape[:1] == (n_classes,) and more[name] == (n_classes + 1, *shape[1:])
        for name, shape in exact.items()
        if name in more and more[name] != shape
    }
