"""Read the options of a merge from a YAML or JSON file."""

from __future__ import annotations

import json
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

from hf_frmerge.checkpoints.json_text import parse_json
from hf_frmerge.errors import ArgumentError
from hf_frmerge.merging.arguments.expert_arguments import ExpertArguments
from hf_frmerge.merging.arguments.merging_arguments import MergingArguments
from hf_frmerge.merging.arguments.values import did_you_mean

_MOST_BYTES = 100_000  # of a configuration file; YAML of megabytes takes minutes to parse


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """
    Read options by name from a YAML or JSON file. The names are checked; the values are not converted yet.

    Args:
        path (`str` or `os.PathLike`):
            File that ends in `.yaml`, `.yml` or `.json` and holds one mapping. Its keys are fields of
            [`ExpertArguments`] and [`MergingArguments`], side by side.

    Raises:
        ArgumentError: If the file is missing or broken, does not hold a mapping, or has a key that is not an option.
    """
    file = Path(path)
    if not file.is_file():
        raise ArgumentError(f"The configuration file {str(file)!r} does not exist.")
    content = _read(file)
    if file.suffix == ".json":
        try:
            config = parse_json(content)
        except ValueError as error:
            raise ArgumentError(f"The configuration file {str(file)!r} is not valid JSON: {error}.") from error
    elif file.suffix in (".yaml", ".yml"):
        import yaml

        try:
            config = yaml.safe_load(content.decode())
        except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, or no such date
            raise ArgumentError(f"The configuration file {str(file)!r} is not valid YAML{_place(error)}.") from error
    else:
        raise ArgumentError(f"A configuration file ends in .yaml, .yml or .json, but got {str(file)!r}.")
    if not isinstance(config, dict):
        raise ArgumentError(
            f"The configuration file {str(file)!r} must hold options by name, such as `method: karcher`."
        )
    known = [f.name for f in (*fields(ExpertArguments), *fields(MergingArguments))]
    if "merge_method" in config:
        raise ArgumentError(
            f"unknown key 'merge_method' in {str(file)!r}: this is a configuration of mergekit. Here it reads\n"
            f"{_translated(config, known)}\nWhat of it is not listed has no counterpart of the same name."
        )
    for key in config:
        if key not in known:
            raise ArgumentError(f"unknown key {key!r} in {str(file)!r}.{did_you_mean(str(key), known)}")
    return config


def _place(error: Exception) -> str:
    """Return what is wrong and where. YAML's own errors quote the line, which may hold a token."""
    from yaml import MarkedYAMLError

    if not isinstance(error, MarkedYAMLError) or error.problem_mark is None:
        return f": {error}"
    mark = error.problem_mark
    return f" at line {mark.line + 1}, column {mark.column + 1}: {error.problem}"


def _read(file: Path) -> bytes:
    try:
        content = file.open("rb").read(_MOST_BYTES + 1)
    except OSError as error:
        raise ArgumentError(f"The configuration file {str(file)!r} could not be read: {error.strerror}.") from error
    if len(content) > _MOST_BYTES:
        raise ArgumentError(
            f"The configuration file {str(file)!r} has more than {_MOST_BYTES} bytes, which is more than all options "
            "take. Pass a file of options."
        )
    return content


def _translated(config: dict[str, Any], known: list[str]) -> str:
    """Return what a configuration of mergekit says, as far as there is a name for it here; indented YAML."""
    models = [model for model in config.get("models") or [] if isinstance(model, dict)]
    weights = [(model.get("parameters") or {}).get("weight") for model in models]
    parameters = config.get("parameters")
    options = {
        "method": config["merge_method"],
        "experts": [model.get("model") for model in models],
        "weights": None if None in weights else weights,
        "base_model": config.get("base_model"),
        "dtype": config.get("dtype"),
        **(parameters if isinstance(parameters, dict) else {}),
        "output_dir": "merged",
    }
    return "\n".join(f"    {key}: {json.dumps(value)}" for key, value in options.items() if value and key in known)
