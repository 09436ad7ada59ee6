"""Weights of the experts for each tensor: defaults, rules by name, and gradients over the layers."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hf_frmerge.errors import ArgumentError
from hf_frmerge.merging.arguments.values import validate_weights

_LAYER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")


def layer_index(name: str) -> int | None:
    """
    Return the index of the layer a tensor belongs to: the first part of its name that is a number.

    Example:

    ```python
    >>> layer_index("model.layers.11.mlp.experts.3.w1.weight"), layer_index("lm_head.weight")
    (11, None)

    ```
    """
    match = _LAYER.search(name)
    return int(match.group(1)) if match else None


@dataclass(frozen=True)
class _Rule:
    text: str
    pattern: re.Pattern[str]
    anchors: tuple[tuple[float, ...], ...]  # one row per expert; a row of one number holds for all layers

    @property
    def is_gradient(self) -> bool:
        return any(len(row) > 1 for row in self.anchors)

    def applies(self, tensor_name: str) -> bool:
        """Whether the rule decides a tensor's weights; a gradient does not for a tensor outside of the layers."""
        matches = self.pattern.search(tensor_name) is not None
        return matches and not (self.is_gradient and layer_index(tensor_name) is None)


@dataclass(frozen=True)
class WeightSchedule:
    """
    Ordered rules `REGEX=w1,w2,...`: the first that applies to a tensor gives its weights.

    The rule is split at its last `=`, and the expression is searched for anywhere in the name (`re.search`). Each
    weight is a number, or a gradient `a:b:c`: its anchors are spread evenly over the layers, from the first layer to
    the last, and interpolated linearly. A rule with a gradient does not apply to a tensor that belongs to no layer
    (see [`layer_index`]); then the next rules are tried. A tensor that no rule applies to gets the default weights.

    Create one with [`~WeightSchedule.parse`].
    """

    default_weights: tuple[float, ...]
    rules: tuple[_Rule, ...]
    method: str

    @classmethod
    def parse(
        cls, rules: Iterable[str], default_weights: Sequence[float], n_experts: int, method: str = "karcher"
    ) -> WeightSchedule:
        """
        Parse rules.

        Args:
            rules (`Iterable[str]`):
                Rules in the order in which they are tried.
            default_weights (`Sequence[float]`):
                Weights of the tensors that no rule applies to, one per expert, as `validate_weights` returns them.
            n_experts (`int`):
                Number of experts; every rule has as many weights.
            method (`str`, *optional*, defaults to `"karcher"`):
                Method that they are for; see [`validate_weights`].

        Raises:
            ArgumentError: If a rule cannot be parsed, or its weights do not fit the experts.
        """
        parsed = tuple(_parse_rule(text, n_experts, method) for text in rules)
        return cls(tuple(default_weights), parsed, method)

    def weights_for(self, tensor_name: str, n_layers: int) -> list[float]:
        """
        Return the weights for one tensor, as `validate_weights` returns them.

        Args:
            tensor_name (`str`):
                Name of the tensor.
            n_layers (`int`):
                Number of layers that gradients are spread over; larger than the index of every layer.

        Raises:
            ArgumentError: If all weights of a gradient are zero at this layer.
        """
        for rule in self.rules:
            if not rule.applies(tensor_name):
                continue
            # Without a layer index only constant weights apply, and these do not depend on the layer.
            layer = layer_index(tensor_name) or 0
            weights = [interpolate(row, layer, n_layers) for row in rule.anchors]
            try:
                return validate_weights(weights, len(weights), self.method)
            except ArgumentError as error:
                raise ArgumentError(f"Weight rule {rule.text!r} at {tensor_name!r}: {error}") from error
        return list(self.default_weights)

    def unused_rules(self, tensor_names: Iterable[str]) -> list[str]:
        """Return the rules that decide no tensor's weights: they match no name, or earlier rules match first."""
        used = set()
        for name in tensor_names:
            used.add(next((i for i, rule in enumerate(self.rules) if rule.applies(name)), None))
        return [rule.text for i, rule in enumerate(self.rules) if i not in used]


def interpolate(anchors: tuple[float, ...], layer: int, n_layers: int) -> float:
    """Return the value at a layer of anchors that are spread evenly from the first layer to the last."""
    if len(anchors) == 1 or n_layers == 1:
        return anchors[0]
    # In integers, so that a layer that lies on an anchor (the first and the last do) gets exactly its value.
    lower, rest = divmod(layer * (len(anchors) - 1), n_layers - 1)
    if rest == 0:
        return anchors[lower]
    share = rest / (n_layers - 1)
    return (1 - share) * anchors[lower] + share * anchors[lower + 1]


def _parse_rule(text: str, n_experts: int, method: str) -> _Rule:
    expression, equals, weights = text.rpartition("=")
    if not equals or not expression:
        raise ArgumentError(
            f"Weight rule {text!r} must read REGEX=w1,w2,..., such as 'layers\\.0\\.=0.7,0.3' ('.*' fits all tensors)."
        )
    try:
        pattern = re.compile(expression)
    except re.error as error:
        raise ArgumentError(f"Weight rule {text!r}: {expression!r} is not a regular expression: {error}.") from error
    try:
        anchors = tuple(tuple(float(anchor) for anchor in weight.split(":")) for weight in weights.split(","))
    except ValueError as error:
        raise ArgumentError(
            f"Weight rule {text!r}: weights are numbers, or gradients such as 0:0.5:1, separated by commas; but got "
            f"{weights!r}."
        ) from error
    # Check one anchor of each expert: one that may be invalid if there is any, else the largest, because a gradient
    # may be zero at one end.
    to_check = [next((a for a in row if not 0 <= a < math.inf), max(row)) for row in anchors]
    try:
        validate_weights(to_check, n_experts, method)
    except ArgumentError as error:
        raise ArgumentError(f"Weight rule {text!r}: {error}") from error
    return _Rule(text, pattern, anchors)
