"""Load the output of a merge: a whole model, or an adapter on its base."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_frmerge.checkpoints.local_folder import LocalFolder
from hf_frmerge.checkpoints.resolve import resolve
from hf_frmerge.checkpoints.source import refuse_gguf
from hf_frmerge.checkpoints.tensors.small_files import read_config, read_json
from hf_frmerge.errors import CheckpointError
from hf_frmerge.evaluation.models.loading import ModelLoader

if TYPE_CHECKING:
    import torch
    from transformers import BaseImageProcessor, PreTrainedTokenizerBase


def whole_model(
    output_dir: str, base_model: str | None = None, token: str | None = None, allow_pickle: bool = False
) -> str:
    """
    Return the folder of the whole model: the output of a merge, or the base if the output is an adapter.

    Args:
        output_dir (`str`):
            Output folder of a merge.
        base_model (`str`, *optional*):
            Folder or Hub id of the base; by default the one in the adapter's configuration.
        token (`str`, *optional*):
            Token for the Hub.
        allow_pickle (`bool`, *optional*, defaults to `False`):
            Whether the weights of the base may be pickles.

    Raises:
        CheckpointError: If the base is not named, cannot be found, or is a GGUF file.
    """
    config = Path(output_dir) / "adapter_config.json"
    if not config.is_file():
        return output_dir
    # The caller's base first: the configuration may name a folder of the machine the adapter was trained on.
    base = base_model or read_json(LocalFolder(output_dir), config.name, output_dir).get("base_model_name_or_path")
    if not isinstance(base, str):
        raise CheckpointError(f"{config} names no base model. Say which it is (--base-model, base_model).")
    source = resolve(base, token=token, allow_pickle=allow_pickle)
    refuse_gguf([source])
    return source.path


def tokenizer_of(folder: str) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer in a folder; `None` if there is none."""
    if not any(Path(folder).glob("tokenizer*")):
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def image_processor_of(folder: str) -> BaseImageProcessor | None:
    """Load the image processor in a folder; `None` if there is none."""
    if not (Path(folder) / "preprocessor_config.json").is_file():
        return None
    from transformers import AutoImageProcessor

    processor: BaseImageProcessor = AutoImageProcessor.from_pretrained(folder)
    return processor


def architecture_of(folder: str) -> str:
    """Return the class name in the configuration of a whole model, such as `"LlamaForCausalLM"`; empty without one."""
    config = read_config(LocalFolder(folder), folder)
    return (config.get("architectures") or [""])[0]


def load_merged(
    output_dir: str,
    base_model: str | None = None,
    token: str | None = None,
    *,
    dtype: str | torch.dtype = "auto",
    device_map: str | dict[str, Any] | None = None,
    allow_pickle: bool = False,
) -> Any:
    """
    Load the merged model as the class in its configuration.

    Args:
        output_dir, base_model, token, allow_pickle:
            As for `whole_model`.
        dtype (`str` or `torch.dtype`, *optional*, defaults to `"auto"`):
            Dtype to load in; `"auto"` is the one the model is stored in.
        device_map (`str` or `dict`, *optional*):
            As in `from_pretrained`, for a model larger than one device.
    """
    folder = whole_model(output_dir, base_model, token, allow_pickle)
    base = resolve(folder, token=token, allow_pickle=allow_pickle) if folder != output_dir else None
    return ModelLoader(base, dtype, device_map).load(resolve(output_dir))
