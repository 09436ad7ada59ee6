"""The command that makes a merge of a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from hf_frmerge.comparison.candidates import Cell, arguments_of
from hf_frmerge.merging.arguments.merging_arguments import MergingArguments
from hf_frmerge.merging.arguments.result_options import is_about_the_result


def merge_command(
    cell: Cell, experts: Sequence[str], base_model: str | None, args: MergingArguments, output_dir: str
) -> list[str]:
    """
    Return the command line of `frmerge` that writes a merge, as arguments.

    Args:
        cell: The merge.
        experts, base_model: As the user named them.
        args: Arguments that all merges of the comparison share.
        output_dir: Folder for the model.
    """
    defaults = {one.name: one.default for one in fields(MergingArguments)}
    shared = {
        name: value
        for name, value in args.to_dict().items()
        if is_about_the_result(name) and value != defaults[name] and name != "method"
    }
    options: dict[str, Any] = shared | arguments_of(cell)
    command = ["frmerge", "merge", *experts]
    if base_model is not None:
        command += ["--base-model", base_model]
    if cell.weights is not None:
        command += ["--weights", ",".join(str(weight) for weight in cell.weights)]
    for name, value in options.items():
        command += [_flag(name, value)] if isinstance(value, bool) else [_flag(name), str(value)]
    return [*command, "--output-dir", output_dir]


def _flag(name: str, value: bool = True) -> str:
    return ("--" if value else "--no-") + name.replace("_", "-")
