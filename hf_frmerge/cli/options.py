"""Generate command-line options from the fields of `ExpertArguments` and `MergingArguments`; read config files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

import click

from hf_frmerge.cli.command import SectionOption, warn_of_token
from hf_frmerge.errors import ArgumentError
from hf_frmerge.merging.arguments.calibration import FIT_OPTIONS, REFINE_OPTIONS
from hf_frmerge.merging.arguments.config_file import read_config
from hf_frmerge.merging.arguments.expert_arguments import ExpertArguments
from hf_frmerge.merging.arguments.merging_arguments import MergingArguments

EXPERTS = {"Experts": ("weights", "base_model", "stream_from_hub", "allow_pickle")}
VOCABULARY = {"Tokens and settings": ("tokenizer_source", "pad_to_multiple_of", "settings_from")}
MEAN = {
    "The mean": (
        "method",
        "space",
        "block",
        "norm",
        "beta",
        "scale",
        "weight_rules",
        "tol",
        "max_iter",
        "on_ambiguous",
        "density",
        "gamma",
        "epsilon",
        "agreement",
        "min_change",
        "seed",
        "descent_steps",
        "off_diagonal",
        "fisher",
        "fisher_labels",
        "merged_before",
        "layer_scales",
        "post_step",
        "svc_floor",
        "coefficients",
    ),
    "Tensors that are not merged": ("leave_out", "take"),
}
CALIBRATION = {
    "Fitting to what the experts compute": ("calibration", *FIT_OPTIONS, *REFINE_OPTIONS),
}
CURVATURE = {
    "Curvature of the experts' predictions, on prompts": (
        "calibration",
        "num_calibration_samples",
        "max_calibration_length",
        "fisher_labels",
        "seed",
        "device",
    )
}
OUTPUT = {
    "Output": ("output_dir", "dtype", "on_overflow", "max_shard_size", "overwrite", "resume_from_checkpoint"),
    "What is accepted": ("strict", "allow_license"),
    "Merged adapters": ("adapter_output", "adapter_rank", "adapter_energy", "adapter_rank_pattern"),
}
RUNNING = {"Running": ("memory_budget", "num_workers", "device")}
PROGRESS = {
    "Progress and reports": (
        "disable_tqdm",
        "log_level",
        "logging_steps",
        "logging_first_step",
        "report_to",
        "run_name",
    ),
}
HUB = {"The Hub": ("push_to_hub", "hub_model_id", "hub_private_repo", "hub_revision", "hub_collection", "hub_token")}

CONFIG_SUFFIXES = (".yaml", ".yml", ".json")

_FLAGS = {
    "resume_from_checkpoint": ("--resume/--no-resume",),
    "output_dir": ("--output-dir",),
    "refine_steps": ("--refine", "--refine-steps"),
}
_METAVARS = {
    "weights": "W,W,...|NAME",
    "output_dir": "DIR",
    "base_model": "MODEL",
    "weight_rules": "RULE",
    "leave_out": "REGEX",
    "take": "REGEX=EXPERT",
    "tokenizer_source": "base|union|EXPERT",
    "settings_from": "base|EXPERT",
    "calibration": "[EXPERT=]FILE|self|self:chat",
    "refine_steps": "STEPS",
}


def options_from(*groups: Mapping[str, Sequence[str]]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """
    Return a decorator that adds one option per field: `--a-b` for `a_b`, `--x/--no-x` for a bool.

    The options have no defaults, so that unset ones do not override the configuration file. The help shows the
    default of the field.

    Args:
        groups (`Mapping[str, Sequence[str]]`):
            Heading in the help -> names of fields of `ExpertArguments` or `MergingArguments`.
    """

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        options = [_option(name, section) for group in groups for section, names in group.items() for name in names]
        for option in reversed(options):  # click lists options from the last decorator applied to the first
            command = option(command)
        return command

    return add


def arguments_from(
    experts: Sequence[str], config: str | None, options: Mapping[str, Any]
) -> tuple[ExpertArguments, MergingArguments]:
    """
    Build the arguments of a merge; the command line overrides the configuration file.

    Args:
        experts (`Sequence[str]`):
            Positional arguments: the experts, or a single configuration file.
        config (`str` or `None`):
            Configuration file.
        options (`Mapping[str, Any]`):
            Field -> value of its option; `None` and `()` mean that it was not set.

    Raises:
        ArgumentError: If there are no experts, or if a key or value is invalid.
    """
    if config is None and len(experts) == 1 and Path(experts[0]).suffix in CONFIG_SUFFIXES:
        config, experts = experts[0], ()
    values = read_config(config) if config is not None else {}
    if experts:
        values["experts"] = list(experts)
    # Last, so that the command line wins over the file.
    values |= {name: value for name, value in options.items() if value is not None and value != ()}
    if "experts" not in values:
        raise ArgumentError(
            "No experts were named. Give two or more folders or Hub ids, or a configuration file that lists `experts`."
        )
    expert_names = {f.name for f in fields(ExpertArguments)}
    return (
        ExpertArguments(**{name: value for name, value in values.items() if name in expert_names}),
        MergingArguments(**{name: value for name, value in values.items() if name not in expert_names}),
    )


def _option(name: str, section: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Build the click option of one field from its type, metadata and default."""
    field, hint = _field(name)
    kind, is_list = _scalar(hint)
    settings: dict[str, Any] = {"type": kind}
    flag = "--" + name.replace("_", "-")
    if kind is bool:
        settings = {}
        flag += "/--no" + flag.removeprefix("-")
    elif "choices" in field.metadata:
        settings["type"] = click.Choice(field.metadata["choices"])
    elif is_list and kind is float:
        settings["type"] = str  # "0.5,0.3,0.2": `ExpertArguments` parses it and reports errors
    elif is_list:
        settings["multiple"] = True
    if name == "hub_token":
        settings["callback"] = warn_of_token
    if name in _METAVARS:
        settings["metavar"] = _METAVARS[name]
    help_text = field.metadata["help"]
    if field.default is not MISSING and field.default is not None and kind is not bool:
        help_text += f" [default: {field.default}]"
    return click.option(
        *_FLAGS.get(name, (flag,)), name, cls=SectionOption, section=section, default=None, help=help_text, **settings
    )


def _field(name: str) -> tuple[Field[Any], Any]:
    """Return a field of either class of arguments, and its type."""
    for arguments in (ExpertArguments, MergingArguments):
        for field in fields(arguments):
            if field.name == name:
                return field, _hints(arguments)[name]
    raise KeyError(name)


_hints = cache(get_type_hints)  # cached: each call evaluates all annotations of the class


def _scalar(hint: Any) -> tuple[type, bool]:
    """Return the element type of a hint and whether it is a list: `list[float] | None` -> `(float, True)`."""
    kinds = [kind for kind in get_args(hint) if kind is not NoneType]
    if get_origin(hint) is list or not kinds:
        kinds = [hint]
    (kind,) = kinds
    return (get_args(kind)[0], True) if get_origin(kind) is list else (kind, False)
