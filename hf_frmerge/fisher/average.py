"""Average weights by their Fisher information."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOOR = 1e-3
"""Least information of an element, relative to the weighted mean over the tensor and the experts."""


def fisher_average(
    values: Sequence[Tensor], information: Sequence[Tensor], shares: Sequence[float]
) -> tuple[Tensor, float]:
    r"""
    Return the average of the experts' values by weight and information, element by element.

    \(\sum_i w_i F_i x_i / \sum_i w_i F_i\) (Matena and Raffel, arXiv 2111.09832): the most probable weights if
    each expert is the centre of a normal distribution with F as its precision. The floor keeps elements on which no
    expert's predictions depend at the plain average, and is the same for all experts. It is relative, since the
    information of language models is so small that an absolute one would make the whole a plain average.

    Args:
        values: Of every expert, all of one shape.
        information: Diagonal Fisher information of the values, not negative; all experts' in one unit.
        shares: Weights of the experts, summing to 1.

    Returns:
        The average, in the dtype of the values, and the share of information that is at the floor.
    """
    least = FLOOR * sum(share * float(each.mean()) for share, each in zip(shares, information))
    average = torch.stack([share * value for share, value in zip(shares, values)]).sum(0)
    total, pull, n_least = torch.zeros_like(average), torch.zeros_like(average), 0
    for value, each, share in zip(values, information, shares):
        precision = share * each.clamp(min=least)
        n_least += int((each <= least).sum())
        total += precision
        pull += precision * (value - average)
    # Without any information all experts count alike: the average.
    return average + pull / total.where(total > 0, 1.0), n_least / (len(values) * average.numel())
