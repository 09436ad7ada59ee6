"""Tell options that decide the merged model from those that only decide how it is computed, written or pushed."""

from __future__ import annotations

from dataclasses import fields

from hf_frmerge.merging.arguments.calibration import FIT_OPTIONS, REFINE_OPTIONS
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
    "tol",
    "max_iter",
    "on_ambiguous",
    "weight_rules",
    "leave_out",
    "take",
    "tokenizer_source",
    "pad_to_multiple_of",
    "settings_from",
    *FIT_OPTIONS,
    *REFINE_OPTIONS,
    "dtype",
    "on_overflow",
    "max_shard_size",
    "adapter_output",
    "adapter_rank",
    "adapter_energy",
    "adapter_rank_pattern",
)

# Without these the model might not be made, though they change no bit of it.
_NEEDED = ("strict", "allow_license")


def is_about_the_result(argument: str) -> bool:
    """Whether an argument is needed to make the same model again; False for devices, logging, pushing and the like."""
    is_known = argument in {option.name for option in fields(MergingArguments)}
    return argument in (*RESULT_OPTIONS, *_NEEDED) or not (is_known or argument.endswith("_token"))
