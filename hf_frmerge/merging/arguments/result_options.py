"""Tell options that decide the merged model from those that only decide how it is computed, written or pushed."""

from __future__ import annotations

from dataclasses import fields

from hf_frmerge.merging.arguments.merging_arguments import MergingArguments

# Without these the model might not be made, though they change no bit of it.
_NEEDED = ("strict", "allow_license")


def result_options() -> list[str]:
    """Return the names of the options that can change a bit of the output."""
    return [option.name for option in fields(MergingArguments) if option.metadata.get("decides_result")]


def is_about_the_result(argument: str) -> bool:
    """Whether an argument is needed to make the same model again; False for devices, logging, pushing and the like."""
    is_known = argument in {option.name for option in fields(MergingArguments)}
    return argument in (*result_options(), *_NEEDED) or not (is_known or argument.endswith("_token"))
