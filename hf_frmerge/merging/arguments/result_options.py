"""Which options decide the merged model, and which only where it is computed, written, shown or pushed."""

from __future__ import annotations

from dataclasses import fields

from hf_frmerge.merging.arguments.merging_arguments import MergingArguments

# A resume may not change these, and a card shows them. tests/merging/arguments/test_result_options.py asks of every
# option that it is here or named there as one that decides nothing.
RESULT_OPTIONS = (
    "method",
    "space",
    "block",
    "norm",
    "beta",
    "scale",
    "density",
    "coefficients",
    "tol",
    "max_iter",
    "on_ambiguous",
    "weight_rules",
    "dtype",
    "max_shard_size",
    "adapter_output",
    "adapter_rank",
    "adapter_energy",
)

# Without these the model might not be made, though they change no bit of it.
_NEEDED = ("strict", "allow_license")


def is_about_the_result(argument: str) -> bool:
    """Whether it takes this argument to make the same model: not if it says where to run, what to print or to push."""
    is_known = argument in {option.name for option in fields(MergingArguments)}
    return argument in (*RESULT_OPTIONS, *_NEEDED) or not (is_known or argument.endswith("_token"))
