"""Load what a merge wrote: a whole model, or an adapter on its base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hf_frmerge.checkpoints.resolve import resolve


def whole_model(output_dir: str, base_model: str | None = None, token: str | None = None) -> str:
    """
    Return the folder of the whole model: the output itself or, if that is an adapter, the base it goes on.

    Args:
        output_dir (`str`):
            Folder a merge wrote.
        base_model (`str`, *optional*):
            Folder or Hub id of the base; by default the one the adapter's configuration names.
        token (`str`, *optional*):
            Token for the Hub.

    Raises:
        CheckpointError: If the base cannot be found.
    """
    config = Path(output_dir) / "adapter_config.json"
    if not config.is_file():
        return output_dir
    base = base_model or json.loads(config.read_text(encoding="utf-8"))["base_model_name_or_path"]
    return resolve(base, token=token).path


def load_merged(output_dir: str, base_model: str | None = None, token: str | None = None) -> Any:
    """Load the merged model in the class its configuration names; arguments as for `whole_model`."""
    import transformers

    folder = whole_model(output_dir, base_model, token)
    config = transformers.AutoConfig.from_pretrained(folder)
    architecture = getattr(transformers, (config.architectures or ["AutoModel"])[0], transformers.AutoModel)
    model = architecture.from_pretrained(folder)
    if folder == output_dir:
        return model
    from peft import PeftModel

    return PeftModel.from_pretrained(model, output_dir)
