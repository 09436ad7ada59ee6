r"""
Lengths and angles of weights by Fisher information: by what a change does to predictions, and not by its size.

Near a model with Fisher information F, a small step x in its weights changes the predictions by a Kullback-Leibler
divergence of half of its squared length in the inner product

\(\langle x, y\rangle_F = x \cdot F y = (F^{1/2} x) \cdot (F^{1/2} y)\)

A method that decides by lengths and angles can take these. That is the same as to multiply every expert by
\(F^{1/2}\) ("whitening"), merge, and divide by it, norms included: the sum \(\sum_i c_i F^{1/2} x_i\) is
\(F^{1/2} \sum_i c_i x_i\). So all that is needed is the Gram matrix of the experts; no root is ever taken.

With several experts, F is their mean by weight. A multiple of F changes no coefficient, so it is scaled to a mean of 1
on its diagonal; a constant F is then no weighting at all.
"""

# Shape suffixes: B = blocks of a tensor, L = elements of a block, R = rows of a block, I = columns, K = operands.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hf_frmerge.fisher.average import FLOOR


class Metric(Protocol):
    """Fisher information of one tensor, block by block: what connects two blocks is left out."""

    def times(self, x_BL: Tensor) -> Tensor:
        """Return F x, `(B, L)`, float64."""
        ...


@dataclass(frozen=True)
class DiagonalMetric:
    """Fisher information that takes weights one by one."""

    information_BL: Tensor

    def times(self, x_BL: Tensor) -> Tensor:
        """Return F x."""
        return self.information_BL * x_BL


@dataclass(frozen=True)
class KroneckerMetric:
    """
    Sum of Kronecker products: F x is the sum of `left @ x @ right` over its terms, with a block x as a matrix.

    Attributes:
        terms: the factors of the rows of every block, `(B, R, R)`, and of the columns, `(I, I)`; symmetric.
    """

    terms: tuple[tuple[Tensor, Tensor], ...]

    def times(self, x_BL: Tensor) -> Tensor:
        """Return F x."""
        rows, columns = self.terms[0][0].shape[-1], len(self.terms[0][1])
        x_BRI = x_BL.reshape(-1, rows, columns)
        return torch.stack([left @ (x_BRI @ right) for left, right in self.terms]).sum(0).reshape(x_BL.shape)


def diagonal_metric(information: Sequence[Tensor], shares: Sequence[float], n_blocks: int) -> DiagonalMetric | None:
    """
    Return the mean of the experts' diagonal information of a tensor, or `None` if there is no information.

    Args:
        information: Of every expert, not negative; all in one unit.
        shares: Weights of the experts, summing to 1.
        n_blocks: Blocks that the tensor is cut into.

    Elements with less than `FLOOR` of the mean get that much, so that nothing but zero has the length zero.
    """
    mean = torch.stack([share * each.double() for share, each in zip(shares, information)]).sum(0)
    unit = mean.mean()
    if not unit > 0:
        return None
    return DiagonalMetric((mean / unit).clamp(min=FLOOR).reshape(n_blocks, -1))


def kronecker_metric(
    factors: Sequence[tuple[Tensor, Tensor]], shares: Sequence[float], n_blocks: int, *, is_flipped: bool
) -> KroneckerMetric | None:
    """
    Return the mean of the experts' information of a linear layer's weight, or `None` if there is no information.

    Args:
        factors: A `(in, in)` and G `(out, out)` of every expert; the information is G (x) A.
        shares: Weights of the experts, summing to 1.
        n_blocks: Runs of rows that the stored tensor is cut into.
        is_flipped: Whether it is stored as `(in, out)`.

    Each factor gets `FLOOR` of the mean of its diagonal on top of it: few prompts leave most directions without any.
    """
    units = [float(a.double().diagonal().mean() * g.double().diagonal().mean()) for a, g in factors]
    unit = sum(share * each for share, each in zip(shares, units))
    if not unit > 0:
        return None
    terms = []
    for (of_inputs, of_outputs), share, own in zip(factors, shares, units):
        if not share * own > 0:
            continue
        left, right = (_damped(each) for each in ((of_inputs, of_outputs) if is_flipped else (of_outputs, of_inputs)))
        size = len(left) // n_blocks
        every = torch.arange(n_blocks)
        left_BRR = left.reshape(n_blocks, size, n_blocks, size)[every, :, every]
        terms.append((share * own / unit * left_BRR, right))
    return KroneckerMetric(tuple(terms))


def _damped(factor: Tensor) -> Tensor:
    """Return a factor with a mean of 1 on its diagonal, and nowhere near zero."""
    scaled = factor.double() / factor.double().diagonal().mean()
    return (scaled + FLOOR * torch.eye(len(scaled), dtype=scaled.dtype)) / (1 + FLOOR)


def weighted_gram(operands: Sequence[Tensor], metric: Metric) -> NDArray[np.float64]:
    """
    Return the Gram matrices `(B, K, K)` of a tensor's blocks.

    Args:
        operands: K tensors `(B, L)`, float64.
        metric: Their inner product.
    """
    gram_BKK = np.zeros((len(operands[0]), len(operands), len(operands)))
    for k, operand_BL in enumerate(operands):
        seen_BL = metric.times(operand_BL)
        for j in range(k + 1):
            gram_BKK[:, j, k] = gram_BKK[:, k, j] = (operands[j] * seen_BL).sum(1).numpy()
    return gram_BKK
