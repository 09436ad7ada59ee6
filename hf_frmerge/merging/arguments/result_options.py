"""Which options decide the merged model, and which only where it is computed, written, shown or pushed."""

from __future__ import annotations

from dataclasses import fields

from hf_frmerge.merging.arguments.merging_arguments import MergingArguments

# Without these the model might not be made, though they change no bit of it.
_NEEDED = ("strict", "allow_license")


def result_options() -> list[str]:
    """Return the names of the options that can change a bit of the output."""
    return [option.name for option in fields(MergingArguments) if option.metadata.get("decides_result")]


def is_about_the_result(argument: str) -> bool:
    """Whether it takes this argument to make the same model: not if it says where to run, what to print or to push."""
    is_known = argument in {option.name for option in fields(MergingArguments)}
    return argument in (*result_options(), *_NEEDED) or not (is_known or argument.endswith("_token"))
