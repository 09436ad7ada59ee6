"""Load models for evaluation one at a time; the base of several adapters is loaded once."""

from __future__ import annotations

import gc
from typing import Any

import torch

from hf_frmerge.checkpoints.local_folder import LocalFolder
from hf_frmerge.checkpoints.resolve import Source
from hf_frmerge.checkpoints.tensors.small_files import read_config
from hf_frmerge.errors import ArgumentError


class ModelLoader:
    """
    Load models one after another; each replaces the one before.

    Args:
        base (`Source`, *optional*): Base of adapters.
        dtype (`str` or `torch.dtype`): Dtype to load in; `"auto"` is the one a model is stored in.
        device_map (`str` or `dict`, *optional*): As in `from_pretrained`, for models larger than one device.
    """

    def __init__(self, base: Source | None, dtype: str | torch.dtype, device_map: str | dict[str, Any] | None) -> None:
        self._base, self._dtype, self._device_map = base, dtype, device_map
        self._loaded: tuple[str, Any] | None = None  # path and model; never one with an adapter

    def load(self, source: Source) -> torch.nn.Module:
        """
        Load a model; the one loaded before must not be used any more.

        Raises:
            ArgumentError: If the checkpoint is an adapter and the loader has no base.
        """
        if source.kind == "full":
            return self._whole(source.path)
        if self._base is None:
            raise ArgumentError(f"{source.spec!r} is an adapter: pass the model it was trained from as base_model.")
        from peft import PeftModel

        model = PeftModel.from_pretrained(self._whole(self._base.path), source.path)
        self._loaded = None  # it has the adapter's layers now; `release` takes them out again
        return model

    def release(self, model: torch.nn.Module) -> None:
        """Release a model from `load` and free its memory; the base is kept for further adapters."""
        from peft import PeftModel

        if isinstance(model, PeftModel) and self._base is not None and _leaves_base_unchanged(model):
            self._loaded = (self._base.path, model.unload())
        elif self._loaded is not None and (self._base is None or self._loaded[0] != self._base.path):
            self._loaded = None
        del model
        gc.collect()  # models hold reference cycles, and the next one needs the memory

    def _whole(self, path: str) -> Any:
        """Return the model in a folder, loaded unless it is still there."""
        if self._loaded is None or self._loaded[0] != path:
            self._loaded = None
            gc.collect()  # before loading, or two models would be in memory
            model_class = model_class_of(path)
            self._loaded = (path, model_class.from_pretrained(path, dtype=self._dtype, device_map=self._device_map))
        return self._loaded[1]


def predicts_next_token(model: torch.nn.Module) -> bool:
    """Return whether a model is a causal language model, not an encoder, encoder-decoder or classifier."""
    model_any: Any = model
    # A user's own module may lack `can_generate`; it is taken for a causal language model.
    can_generate = getattr(model_any, "can_generate", None)
    if can_generate is None:
        return True
    return bool(can_generate()) and not model_any.config.is_encoder_decoder


def _leaves_base_unchanged(model: Any) -> bool:
    """Return whether unloading the adapter restores the base; `modules_to_save` replaces modules of it."""
    return all(not getattr(config, "modules_to_save", None) for config in model.peft_config.values())


def model_class_of(path: str) -> Any:
    """Return the transformers class in the configuration of a model, or the auto class for causal models."""
    import transformers

    config = read_config(LocalFolder(path), path)
    name = (config.get("architectures") or [""])[0]
    return getattr(transformers, name, transformers.AutoModelForCausalLM)
