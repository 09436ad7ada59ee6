"""What a spectral method is given: one matrix of all experts, and its options."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float32]
Doubles = NDArray[np.float64]


@dataclass(frozen=True)
class Experts:
    """
    One matrix of all experts.

    Attributes:
        deltas: `(N, m, n)`, float32: the experts' deltas, or their cores (`geometry.core_space`).
        base: `(m, n)`, float32: the matrix of the base model; `None` for cores.
        shape: rows and columns of the matrix that `deltas` are cores of; `None` if they are no cores.
    """

    deltas: Matrix
    base: Matrix | None = None
    shape: tuple[int, int] | None = None

    @property
    def full_shape(self) -> tuple[int, int]:
        """Rows and columns of the matrix in the model."""
        rows, cols = self.shape or self.deltas.shape[1:]
        return rows, cols

    def zero(self) -> Matrix:
        """Return a delta of zero."""
        return np.zeros(self.deltas.shape[1:], np.float32)

    def sum(self, weights_N: NDArray[np.float64]) -> Matrix:
        """Return `N` times the weighted sum of the deltas."""
        total = self.zero()
        for delta_mn, factor in zip(self.deltas, (len(self.deltas) * weights_N).astype(np.float32)):
            total += factor * delta_mn
        return total


@dataclass(frozen=True)
class SpectralOptions:
    """
    Options of the spectral methods.

    Args:
        density: Share of directions: common ones in `iso_cts`, those that are changed in `swudi`, those that are
            made equally strong in `ace`. Share of elements that are kept in `knots` and `dc_merge`.
        descent_steps: Steps of gradient descent that `swudi` stands for.
    """

    density: float = 1.0
    descent_steps: float = 300.0


SpectralMethod = Callable[[Experts, NDArray[np.float64], SpectralOptions], Matrix]
