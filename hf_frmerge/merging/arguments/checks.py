"""Checks of options: each by itself, and those that may contradict each other. All raise `ArgumentError`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from hf_frmerge.errors import ArgumentError
from hf_frmerge.merging.arguments.layer_scales import parse_layer_scales
from hf_frmerge.merging.arguments.values import did_you_mean
from hf_frmerge.methods.table import CHOICES, METHODS

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from hf_frmerge.methods.method import Method

# Field -> (test of a value that is not None, what the test asks for).
_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "beta": (math.isfinite, "finite"),
    "scale": (math.isfinite, "finite"),
    "density": (lambda v: 0 < v <= 1, "above 0 and at most 1 (share of the elements that stay)"),
    "gamma": (lambda v: 0 <= v < 1, "at least 0 and below 1 (share of the elements that are dropped)"),
    "epsilon": (lambda v: 0 <= v < 0.5, "at least 0 and below 0.5 (share of the elements)"),
    "agreement": (lambda v: 0 <= v < math.inf, "at least 0 and finite"),
    "min_change": (lambda v: 0 <= v < math.inf, "at least 0 and finite"),
    "descent_steps": (lambda v: 0 <= v < math.inf, "at least 0 and finite"),
    "off_diagonal": (lambda v: 0 <= v < 1, "at least 0 and below 1 (at 1 few prompts leave a layer undecided)"),
    "merged_before": (lambda v: v >= 1, "at least 1"),
    "svc_floor": (lambda v: 0 < v < math.inf, "above 0 and finite"),
    "seed": (lambda v: v >= 0, "at least 0"),
    "tol": (lambda v: 0 < v < math.inf, "above 0 and finite"),
    "max_iter": (lambda v: v >= 1, "at least 1"),
    "pad_to_multiple_of": (lambda v: v >= 1, "at least 1"),
    "num_workers": (lambda v: 1 <= v <= 1024, "from 1 to 1024"),
    "num_calibration_samples": (lambda v: v >= 1, "at least 1"),
    "max_calibration_length": (lambda v: v >= 2, "at least 2 (one token predicts the next)"),
    "calibration_batch_size": (lambda v: v >= 1, "at least 1"),
    "calibration_rank": (lambda v: v >= 1, "at least 1"),
    "refine_steps": (lambda v: v >= 0, "at least 0 (0 does not refine)"),
    "refine_learning_rate": (lambda v: 0 < v < math.inf, "above 0 and finite"),
    "refine_lmbda": (lambda v: 0 <= v <= 1, "from 0 to 1 (share of the steps)"),
    "refine_written_samples": (lambda v: v >= 0, "at least 0 (0 takes the given prompts alone)"),
    "refine_beta": (lambda v: 0 < v < 1, "between 0 and 1"),
    "refine_rho": (lambda v: 0 <= v < math.inf, "at least 0 and finite (0 takes plain steps)"),
    "adapter_rank": (lambda v: v >= 1, "at least 1"),
    "adapter_energy": (lambda v: 0 < v <= 1, "above 0 and at most 1 (share of the squared norm kept)"),
    "logging_steps": (lambda v: v >= 1, "at least 1"),
    "per_device_eval_batch_size": (lambda v: v >= 1, "at least 1"),
    "eval_block_size": (lambda v: v >= 2, "at least 2 (one token predicts the next)"),
    "dataloader_num_workers": (lambda v: v >= 0, "at least 0"),
}


def check_choices(options: DataclassInstance) -> None:
    """Check the fields that have `choices` in their metadata."""
    for option in fields(options):
        value, choices = options.__dict__[option.name], option.metadata.get("choices")
        if choices is not None and value is not None and value not in choices:
            raise ArgumentError(
                f"unknown {option.name} {value!r}: expected one of {', '.join(choices)}."
                + did_you_mean(value, choices)
            )


def check_ranges(values: Mapping[str, Any]) -> None:
    """Check the numbers among the values of the fields."""
    for name, (holds, wanted) in _RANGES.items():
        value = values[name]
        if value is not None and not holds(value):
            raise ArgumentError(f"`{name}` must be {wanted}, but got {value}.")


def check_table(method: Method, coefficients: str | None) -> None:
    """Check that there is a table of coefficients, or a method, but not both."""
    if (method.kind == "given") != (coefficients is not None):
        raise ArgumentError(
            f"`method={method.name!r}` and `coefficients={coefficients!r}` do not go together: a table of "
            "coefficients takes the place of a method. Give the table alone, or a method without it."
        )


def check_post_step(method: Method, post_step: str | None) -> None:
    """Check that a post-step has directions to tell apart, and that nothing is added behind it."""
    if post_step is not None and method.needs_prompts:
        raise ArgumentError(
            f"`post_step={post_step!r}` changes what a method makes of the experts' weights, but method="
            f"{method.name!r} decides by their outputs. Leave it out, or choose another method."
        )
    if post_step is not None and method.is_isotropic:
        raise ArgumentError(
            f"`post_step={post_step!r}` corrects the directions of a merged matrix, but those of "
            f"method={method.name!r} are all equally strong and cannot be told apart. Leave it out, or choose "
            "another method."
        )


def check_layer_scales(layer_scales: str | None, block: str, coefficients: str | None) -> None:
    """Check that factors by layer can be read, and that layers are decided one by one."""
    if layer_scales is None:
        return
    parse_layer_scales(layer_scales)
    if coefficients is not None or block == "model":
        raise ArgumentError(
            "`layer_scales` give every layer a factor, but "
            + ("a table of coefficients has its own" if coefficients else "block='model' decides once")
            + ". Leave them out, or choose a method with block='tensor' or 'layer'."
        )


def check_method(method: Method, block: str, density: float | None, epsilon: float) -> None:
    """Check that the method takes the block, and can draw elements with the chances that are asked for."""
    if block not in method.blocks:
        raise ArgumentError(f"`method={method.name!r}` takes block={' or '.join(method.blocks)}, but got {block!r}.")
    density = density or method.density or 1.0
    if "epsilon" in method.options and not epsilon < density <= 1.0 - epsilon:
        raise ArgumentError(
            f"`density={density}` and `epsilon={epsilon}` would keep an element with a chance outside of 0 "
            f"to 1. Choose a density between {epsilon} and {1 - epsilon:g}, or a smaller epsilon."
        )


def check_fisher(method: Method, fisher: str | None, calibration_form: str, refine_steps: int) -> None:
    """Check that lengths and angles by Fisher information decide something, and that nothing is fitted on top."""
    if fisher is None:
        return
    geometric = [known.name for known in METHODS.values() if known.is_geometric]
    if method.name not in geometric:
        raise ArgumentError(
            f"`fisher={fisher!r}` measures lengths and angles of the experts, by which `method={method.name!r}` does "
            f"not decide. Leave it out, or choose one of {', '.join(geometric)}."
        )
    if calibration_form != "auto" or refine_steps:
        option = f"refine_steps={refine_steps}" if refine_steps else f"calibration_form={calibration_form!r}"
        raise ArgumentError(
            f"With `fisher={fisher!r}` prompts tell how much every weight matters, and nothing is fitted to them. "
            f"Leave out {option}, or fisher."
        )


def check_prompts(method: Method, fisher: str | None, *, has_prompts: bool) -> None:
    """Check that there are prompts where the merge depends on what the experts do on them."""
    if (method.needs_prompts or fisher is not None) and not has_prompts:
        option = f"fisher={fisher!r}" if fisher is not None else f"method={method.name!r}"
        raise ArgumentError(
            f"`{option}` asks what the experts do on prompts, and there are none. Pass some: "
            "calibration_dataset, or --calibration EXPERT=FILE for each expert, --calibration FILE for all, or "
            "--calibration self, on which language models write them."
        )


def check_calls_for_prompts(method: str, fisher: str | None, refine_steps: int, *, has_prompts: bool) -> None:
    """
    Check that there are prompts for whatever the options do with some.

    Not done when a recorded merge is made again: what the prompts said is in its record.
    """
    check_prompts(CHOICES[method], fisher, has_prompts=has_prompts)
    if not refine_steps:
        return
    if not has_prompts:
        raise ArgumentError(
            "refine_steps (--refine) refines a merge that is fitted to prompts, and there are none. Pass "
            "calibration_dataset (--calibration), or leave it out."
        )
    if CHOICES[method].needs_prompts:
        raise ArgumentError(
            f"refine_steps (--refine) refines a merge that is fitted to its experts, and `method={method!r}` "
            "computes a merge of its own from the prompts. Leave out one of them."
        )


def check_adapter_options(output: str, rank: int | None, energy: float | None, pattern: str) -> None:
    """Check that the rank of a merged adapter is chosen once, and only if an adapter may be written."""
    if rank is not None and energy is not None:
        raise ArgumentError(
            f"`adapter_rank={rank}` and `adapter_energy={energy}` both choose the rank "
            "of the merged adapter: give one of them."
        )
    if output == "merged" and (rank is not None or energy is not None):
        raise ArgumentError(
            "`adapter_rank` and `adapter_energy` shape a merged adapter, but `adapter_output='merged'` adds it to "
            "the base model: leave them out, or choose `adapter_output='adapter'`."
        )
    if output == "merged" and pattern != "auto":
        raise ArgumentError(
            "`adapter_rank_pattern` shapes a merged adapter, but `adapter_output='merged'` adds it to the base model: "
            "leave it out, or choose `adapter_output='adapter'`."
        )
