"""Files the output takes from its donor (the base, else the first full expert), and the config with a new dtype."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_frmerge.checkpoints.disk import write_file
from hf_frmerge.checkpoints.folders import open_folder
from hf_frmerge.checkpoints.local_folder import LocalFolder
from hf_frmerge.checkpoints.remote_folder import RemoteFolder
from hf_frmerge.checkpoints.resolve import Source
from hf_frmerge.checkpoints.tensors.small_files import read_file, read_json
from hf_frmerge.errors import CheckpointError

CONFIG_FILE = "config.json"

_SUFFIXES = (".json", ".jinja", ".model", ".txt", ".tiktoken", ".spm", ".codes", ".py")
_TEMPLATES = "additional_chat_templates"
# Not copied: files about the donor's weights, its training or its evaluation.
_NOT_COPIED = {
    CONFIG_FILE,
    "config_sentence_transformers.json",
    "merge_manifest.json",
    "modules.json",
    "hf_quant_config.json",
    "quantize_config.json",
    "requirements.txt",
    "sentence_bert_config.json",
    "trainer_state.json",
}
_NOT_COPIED_PARTS = ("adapter_", ".index.json", "_results", "eval_", "train_", "training_", "optimizer", "readme")
# Names to try if a server cannot list a folder.
_KNOWN = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "video_preprocessor_config.json",
    "vocab.json",
    "vocab.txt",
)


def donor_files(source: Source) -> list[str]:
    """
    List the files that a merged model takes from its donor, besides weights and `config.json`.

    Args:
        source (`Source`):
            Base model, else first full expert.

    Returns:
        `list[str]`: Generation config, tokenizer, chat template, processor and remote-code files, sorted.

    Raises:
        CheckpointError: If the folder cannot be read.
    """
    folder = open_folder(source.path)
    try:
        names = list_folder(folder)
    except OSError as error:
        raise CheckpointError(f"{source.spec!r} cannot be listed: {error}.") from error
    return [name for name in names if name.startswith(f"{_TEMPLATES}/") or _is_copied(name)]


def write_config(
    source: Source, output_dir: str | Path, *, dtype: str | None = None, changes: Mapping[str, Any] | None = None
) -> Path:
    """
    Write the donor's `config.json`, changed only in its dtype and in what `changes` says.

    It must be the last file: no loader takes a folder without it for a model.

    Args:
        source (`Source`):
            Base model, else first full expert.
        output_dir (`str` or `Path`):
            Folder to write into.
        dtype (`str`, *optional*):
            Name of the output dtype, such as `"bfloat16"`. None or `"auto"` keeps the donor's.
        changes (`Mapping[str, Any]`, *optional*):
            Entries that take the place of the donor's; None removes one.

    Returns:
        `Path`: The file.
    """
    folder = open_folder(source.path)
    config = read_json(folder, CONFIG_FILE, source.spec)
    content: bytes | str = read_file(folder, CONFIG_FILE, source.spec)
    kept = config.keys() - (changes or {}).keys()  # its own entries may be null
    config = {key: value for key, value in {**config, **(changes or {})}.items() if value is not None or key in kept}
    if (dtype not in (None, "auto") and _set_dtype(config, str(dtype))) or changes:
        content = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    path = Path(output_dir) / CONFIG_FILE
    write_file(path, content)
    return path


def list_folder(folder: LocalFolder | RemoteFolder) -> list[str]:
    """List the files of a folder and its further chat templates; if a server cannot list, the known names it has."""
    try:
        templates = [name for name in folder.names(_TEMPLATES) if name.endswith(".jinja")]
        return folder.names() + [f"{_TEMPLATES}/{name}" for name in templates]
    except (OSError, NotImplementedError):
        if isinstance(folder, LocalFolder):
            raise
        return [name for name in _KNOWN if folder.exists(name)]


def _is_copied(name: str) -> bool:
    lowered = name.lower()
    return (
        lowered.endswith(_SUFFIXES)
        and not name.startswith(".")
        and lowered not in _NOT_COPIED
        and not any(part in lowered for part in _NOT_COPIED_PARTS)
    )


def _set_dtype(config: dict[str, Any], dtype: str) -> bool:
    """Set the dtype of a config and of the configs nested in it; return whether anything changed."""
    changed = False
    # transformers renamed `torch_dtype` to `dtype`: change whichever the config has.
    keys = [key for key in ("dtype", "torch_dtype") if key in config]
    for key in keys:
        changed |= config[key] != dtype
        config[key] = dtype
    for value in config.values():
        if isinstance(value, dict) and ("dtype" in value or "torch_dtype" in value):
            changed |= _set_dtype(value, dtype)
    if not keys and "model_type" in config:
        config["dtype"] = dtype
        changed = True
    return changed
