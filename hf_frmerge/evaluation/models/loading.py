"""Load models for evaluation, one at a time: whole ones, and adapters on their base, which is loaded once."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import torch

from hf_frmerge.checkpoints.resolve import Source
from hf_frmerge.errors import ArgumentError


class ModelLoader:
    """
    Loads one model after the other; each takes the place of the one before.

    Args:
        base (`Source`, *optional*): What adapters are put on.
        dtype (`str` or `torch.dtype`): Dtype to load in; `"auto"` is the one a model is stored in.
        device_map (`str` or `dict`, *optional*): As in `from_pretrained`, for models larger than one device.
    """

    def __init__(self, base: Source | None, dtype: str | torch.dtype, device_map: str | dict[str, Any] | None) -> None:
        self._base, self._dtype, self._device_map = base, dtype, device_map
        self._loaded: tuple[str, Any] | None = None  # a whole model, by its path

    def load(self, source: Source) -> torch.nn.Module:
        """Return a model; the one returned before must not be used any more."""
        if source.kind == "full":
            return self._whole(source.path)
        if self._base is None:
            raise ArgumentError(f"{source.spec!r} is an adapter: pass the model it was trained from as base_model.")
        from peft import PeftModel

        model = PeftModel.from_pretrained(self._whole(self._base.path), source.path)
        self._loaded = None  # there is an adapter in it now
        return model

    def release(self, model: torch.nn.Module) -> None:
        """Take back a model that `load` returned. Its memory is free unless it is the base, kept for adapters."""
        from peft import PeftModel

        if isinstance(model, PeftModel) and self._base is not None and _leaves_base_unchanged(model):
            self._loaded = (self._base.path, model.unload())
        elif self._loaded is not None and (self._base is None or self._loaded[0] != self._base.path):
            self._loaded = None
        del model
        gc.collect()  # models hold reference cycles; the next one is loaded into the memory this frees

    def _whole(self, path: str) -> Any:
        if self._loaded is None or self._loaded[0] != path:
            self._loaded = None
            gc.collect()
            model_class = _class_of(path)
            self._loaded = (path, model_class.from_pretrained(path, dtype=self._dtype, device_map=self._device_map))
        return self._loaded[1]


def predicts_next_token(model: torch.nn.Module) -> bool:
    """Tell causal language models, whose logits are next-token predictions, from encoders and classifiers."""
    model_any: Any = model
    can_generate = getattr(model_any, "can_generate", None)  # modules of users need not have one
    if can_generate is None:
        return True
    return bool(can_generate()) and not model_any.config.is_encoder_decoder


def _leaves_base_unchanged(model: Any) -> bool:
    return all(not getattr(config, "modules_to_save", None) for config in model.peft_config.values())


def _class_of(path: str) -> Any:
    import transformers

    config = json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))
    name = (config.get("architectures") or [""])[0]
    return getattr(transformers, name, transformers.AutoModelForCausalLM)
