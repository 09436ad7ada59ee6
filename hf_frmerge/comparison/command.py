"""The command that makes a merge of a comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from hf_frmerge.comparison.candidates import Cell, arguments_of
from hf_frmerge.merging.arguments.calibration import FIT_OPTIONS, REFINE_OPTIONS
from hf_frmerge.merging.arguments.merging_arguments import MergingArguments
from hf_frmerge.merging.arguments.result_options import is_about_the_result


def merge_command(
    cell: Cell,
    experts: Sequence[str],
    base_model: str | None,
    args: MergingArguments,
    output_dir: str,
    calibration: Any = None,
) -> list[str]:
    """
    Return the command line of `frmerge` that writes a merge, as arguments.

    Args:
        cell: The merge.
        experts, base_model: As the user named them.
        args: Arguments that all merges of the comparison share.
        output_dir: Folder for the model.
        calibration: What merges are fitted to. Data that is not in files has a placeholder in the command.
    """
    left_out = ["method"]
    if cell.fit is None:
        left_out += FIT_OPTIONS
    if not cell.is_refined:
        left_out += REFINE_OPTIONS
    defaults = {one.name: one.default for one in fields(MergingArguments)}
    shared = {
        name: value
        for name, value in args.to_dict().items()
        if is_about_the_result(name) and value != defaults[name] and name not in left_out
    }
    options: dict[str, Any] = shared | arguments_of(cell)
    command = ["frmerge", "merge", *experts]
    if base_model is not None:
        command += ["--base-model", base_model]
    if cell.weights is not None:
        command += ["--weights", ",".join(str(weight) for weight in cell.weights)]
    for name, value in options.items():
        for one in value if isinstance(value, list) else [value]:
            command += [_flag(name, one)] if isinstance(one, bool) else [_flag(name), str(one)]
    if cell.fit is not None:
        by_expert = calibration.items() if isinstance(calibration, Mapping) else [(None, calibration)]
        for expert, data in by_expert:
            file = str(data) if isinstance(data, (str, Path)) else "PROMPTS"
            command += ["--calibration", file if expert is None else f"{expert}={file}"]
    return [*command, "--output-dir", output_dir]


def _flag(name: str, value: bool = True) -> str:
    return ("--" if value else "--no-") + name.replace("_", "-")
