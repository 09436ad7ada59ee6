"""Build the model of a checkpoint without its weights. Imports transformers, which takes seconds."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hf_frmerge.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Settings that say how many modules there are. To build each takes about a millisecond.
_COUNT = re.compile(r"(^|_)(layers?|blocks?|experts|depths?)($|_)")
_MOST_MODULES = 4096


def build_empty(config: Mapping[str, Any], spec: str, **changes: Any) -> PreTrainedModel:
    """
    Build a model on the meta device, where weights have shapes but no contents.

    Args:
        config (`Mapping[str, Any]`):
            Contents of `config.json`.
        spec (`str`):
            Name of the checkpoint as the user wrote it, for errors.
        changes:
            Settings that replace those of the config.

    Raises:
        CheckpointError: If transformers does not have its class, or cannot build it from this config.
    """
    import torch
    import transformers

    architecture = next(iter(config.get("architectures") or []), None)
    model_class = getattr(transformers, str(architecture), None)
    if model_class is None:
        raise CheckpointError(
            f"{spec!r}: config.json names the architecture {architecture!r}, which transformers "
            f"{transformers.__version__} does not have, so its layers are unknown."
        )
    settings = {key: value for key, value in {**config, **changes}.items() if key != "model_type"}
    _refuse_endless(settings, spec)
    try:
        with torch.device("meta"):
            model: PreTrainedModel = model_class(
                transformers.AutoConfig.for_model(config["model_type"], **_with_infinities(settings))
            )
    except Exception as error:  # what a stranger's settings lead to in the class is for the class to choose
        raise CheckpointError(
            f"{spec!r}: {architecture} cannot be built from its config.json ({type(error).__name__}: "
            f"{' '.join(str(error).split())}), so its layers are unknown."
        ) from error
    return model


def _with_infinities(value: Any) -> Any:
    """Return settings with the numbers that `{"__float__": "Infinity"}` stands for in a `config.json`."""
    if isinstance(value, dict):
        if value.keys() == {"__float__"}:
            return float(value["__float__"])
        return {key: _with_infinities(each) for key, each in value.items()}
    return [_with_infinities(each) for each in value] if isinstance(value, list) else value


def transposed_layers(config: Mapping[str, Any], spec: str) -> list[str]:
    """
    Return the names of the weights that the class of a checkpoint has transposed (`Conv1D` of GPT-2).

    Args:
        config, spec: As for `build_empty`. Without a class of transformers there are none: these layers are its own.
    """
    try:
        model = build_empty(config, spec)
    except CheckpointError:
        return []
    from transformers.pytorch_utils import Conv1D

    return [f"{path}.weight" for path, module in model.named_modules() if isinstance(module, Conv1D)]


def _refuse_endless(settings: Mapping[str, Any], spec: str) -> None:
    """Raise if a config asks for so many modules that to build them would not end."""
    for key, value in settings.items():
        if isinstance(value, dict):
            _refuse_endless(value, spec)
        for number in value if isinstance(value, list) else [value]:
            if _COUNT.search(str(key)) and isinstance(number, (int, float)) and number > _MOST_MODULES:
                raise CheckpointError(
                    f"{spec!r}: {key} in config.json is {number:g}, more than any model has ({_MOST_MODULES} are "
                    "allowed). Download the file again."
                )
