"""Find the class of transformers that puts the head of a task on a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hf_frmerge.checkpoints.names.empty_model import build_empty
from hf_frmerge.checkpoints.names.model_names import ModelNames, names_of

# PEFT's name of a task -> mapping of transformers from configs to classes with a head for it.
_MAPPINGS = {
    "SEQ_CLS": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    "TOKEN_CLS": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING",
    "QUESTION_ANS": "MODEL_FOR_QUESTION_ANSWERING_MAPPING",
}


@dataclass(frozen=True)
class TaskModel:
    """
    A model with the head of a task.

    Attributes:
        config: what its `config.json` has in place of that of the model without the head.
        shapes: name in memory -> shape.
        names: names of its tensors; None if the installed transformers has no such table.
    """

    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    names: ModelNames | None

    @property
    def n_labels(self) -> int:
        """Number of labels."""
        return len(self.config["id2label"])

    def fits(self, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """Whether it has tensors of all these names and shapes."""
        return all(self.shapes.get(name) == shape for name, shape in shapes.items())


def find_task_model(config: Mapping[str, Any], spec: str, task: str | None, n_labels: int) -> TaskModel | None:
    """
    Build the model of a task on the meta device.

    Args:
        config (`Mapping[str, Any]`):
            Contents of the `config.json` of a model without the head.
        spec (`str`):
            Name of that model as the user wrote it, for errors.
        task (`str`, *optional*):
            `task_type` of an adapter.
        n_labels (`int`):
            Number of labels.

    Returns:
        `TaskModel`, *optional*: None if transformers has no class for the task.

    Raises:
        CheckpointError: If it cannot be built.
    """
    import transformers

    if task not in _MAPPINGS or config.get("model_type") not in transformers.CONFIG_MAPPING:
        return None
    mapping = getattr(transformers, _MAPPINGS[task])
    model_class = mapping.get(transformers.CONFIG_MAPPING[config["model_type"]], None)
    if model_class is None:
        return None
    labels = [f"LABEL_{row}" for row in range(n_labels)]
    changes = {
        "architectures": [model_class.__name__],
        "id2label": {str(row): label for row, label in enumerate(labels)},
        "label2id": {label: row for row, label in enumerate(labels)},
    }
    without = {key: value for key, value in config.items() if key != "num_labels"}
    model = build_empty({**without, **changes}, spec)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tied = {name for name in model.all_tied_weights_keys if name in shapes}
    return TaskModel(changes, {name: shape for name, shape in shapes.items() if name not in tied}, names_of(model))
