"""Weights of the experts, and the factor of the merged delta, for every tensor."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from hf_frmerge.errors import ArgumentError
from hf_frmerge.merging.arguments.layer_scales import layer_scale, parse_layer_scales
from hf_frmerge.merging.arguments.weight_rules import WeightSchedule, layer_index

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hf_frmerge.merging.arguments.merging_arguments import MergingArguments
    from hf_frmerge.merging.planning.tensor_step import TensorStep


def weights_by_tensor(
    args: MergingArguments, weights: list[float], names: list[str]
) -> tuple[dict[str, tuple[float, ...]], list[str]]:
    """Return the weights of every tensor, and a note for each rule that decides none."""
    schedule = WeightSchedule.parse(args.weight_rules or [], weights, len(weights), args.method)
    if not args.weight_rules:
        return dict.fromkeys(names, tuple(schedule.default_weights)), []
    depth = _depths(names)
    notes = [f"Weight rule {rule!r} decides no tensor's weights." for rule in schedule.unused_rules(names)]
    return {name: tuple(schedule.weights_for(name, depth.get(_stack(name), 1))) for name in names}, notes


def scales_by_tensor(args: MergingArguments, names: list[str]) -> dict[str, float]:
    """Return the factor of every tensor's merged delta."""
    if args.layer_scales is None:
        return dict.fromkeys(names, 1.0)
    anchors, depth = parse_layer_scales(args.layer_scales), _depths(names)
    return {name: layer_scale(anchors, layer_index(name), depth.get(_stack(name), 1)) for name in names}


def check_groups(steps: Sequence[TensorStep]) -> None:
    """Raise `ArgumentError` if tensors of one group, which get the same coefficients, have different weights."""
    first: dict[str, TensorStep] = {}
    for step in steps:
        other = first.setdefault(step.group, step) if step.action == "merge" else step
        if other.weights != step.weights:
            raise ArgumentError(
                f"weight_rules give {other.name!r} and {step.name!r} different weights, but both lie on one sphere "
                f"(group {step.group or 'model'!r}). Use block='tensor', or rules that do not divide a group."
            )


def _depths(names: list[str]) -> dict[str, int]:
    """
    Return the number of layers of every stack of layers.

    An encoder and a decoder may have different depths: a gradient runs over the stack a tensor belongs to.
    """
    depth: dict[str, int] = {}
    for name in names:
        index = layer_index(name)
        if index is not None:
            depth[_stack(name)] = max(depth.get(_stack(name), 0), index + 1)
    return depth


def _stack(name: str) -> str:
    """Return the part of a tensor's name before its layer index: `encoder.layers`, say."""
    return re.split(r"\.\d+(?:\.|$)", name, maxsplit=1)[0]
