"""Factors of the merged delta by layer."""

from __future__ import annotations

import math

from hf_frmerge.errors import ArgumentError
from hf_frmerge.merging.arguments.weight_rules import interpolate


def parse_layer_scales(text: str) -> tuple[float, ...]:
    """
    Parse factors such as `0.5:1:1.5`: two or more finite numbers.

    Raises:
        ArgumentError: If they are not.
    """
    try:
        anchors = tuple(float(anchor) for anchor in text.split(":"))
    except ValueError:
        anchors = ()
    if len(anchors) < 2 or not all(map(math.isfinite, anchors)):
        raise ArgumentError(
            f"`layer_scales` expects factors for the first layer to the last, such as 0.5:1.5; got {text!r}. One "
            "factor for all layers is `scale`, of the methods that have it."
        )
    return anchors


def layer_scale(anchors: tuple[float, ...], layer: int | None, n_layers: int) -> float:
    """Return the factor of a layer, 1 for a tensor that belongs to none."""
    return 1.0 if layer is None else interpolate(anchors, layer, n_layers)
