"""Read the small files of a checkpoint, such as its configuration; what is wrong with them is told by its name."""

from __future__ import annotations

from typing import Any

from hf_frmerge.checkpoints.json_text import parse_json
from hf_frmerge.checkpoints.local_folder import LocalFolder
from hf_frmerge.checkpoints.remote_folder import RemoteFolder
from hf_frmerge.errors import CheckpointError

CONFIG_FILES = {"full": "config.json", "adapter": "adapter_config.json"}


def read_file(folder: LocalFolder | RemoteFolder, name: str, spec: str) -> bytes:
    """Read a small file of a checkpoint; `spec` names the checkpoint in errors."""
    try:
        return folder.read(name)
    except OSError as error:
        raise CheckpointError(f"{spec!r}: {name} could not be read: {reason(error)}.") from error


def read_json(folder: LocalFolder | RemoteFolder, name: str, spec: str) -> dict[str, Any]:
    """Read a JSON object from a file of the folder; empty if there is no such file."""
    try:
        if not folder.exists(name):
            return {}
    except OSError as error:
        raise CheckpointError(f"{spec!r}: {name} could not be read: {reason(error)}.") from error
    try:
        parsed = parse_json(read_file(folder, name, spec))
    except ValueError as error:
        raise CheckpointError(f"{spec!r}: {name} is not valid JSON: {error}.") from error
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{spec!r}: {name} must hold a JSON object, found a {type(parsed).__name__}.")
    return parsed


def read_config(folder: LocalFolder | RemoteFolder, spec: str) -> dict[str, Any]:
    """Read `config.json`, empty if there is none; the class and the type of the model, if it has any, are names."""
    config = read_json(folder, CONFIG_FILES["full"], spec)
    names = config.get("architectures") or []
    model_type = config.get("model_type") or ""
    if not (isinstance(names, list) and all(isinstance(name, str) for name in [*names, model_type])):
        raise CheckpointError(
            f"{spec!r}: config.json has architectures {_short(names)} and model_type {_short(model_type)}, expected a "
            "list of class names, and a name. Download the file again."
        )
    return config


def reason(error: OSError) -> str:
    """Say why the system refused, and of which file."""
    text = error.strerror or str(error) or type(error).__name__
    return f"{text} ({error.filename})" if error.filename else text


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."
