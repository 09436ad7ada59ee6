"""Where weights are searched: the simplex, times a range of scales."""

# Shape suffixes: N = experts, P = points, K = free coordinates.

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

GRIDS = {1: 1000, 2: 100, 3: 30}
"""Dimension -> steps of a grid from one expert to another, and from the smallest to the largest scale."""


@dataclass(frozen=True)
class Region:
    """
    Coefficients of the experts, `scale * weights`: weights that sum to 1, and a scale within a range.

    Attributes:
        n_experts: two or more.
        scales: smallest and largest scale; the same twice if it is fixed.
    """

    n_experts: int
    scales: tuple[float, float] = (1.0, 1.0)

    @property
    def dimension(self) -> int:
        """Number of free coordinates: one for each expert, less one if the scale is fixed."""
        return self.n_experts - (self.scales[0] == self.scales[1])

    @property
    def n_coefficients(self) -> int:
        """Number of coefficients of a quadratic function: the least number of points that it can be fitted to."""
        return math.comb(self.dimension + 2, 2)

    @property
    def n_evaluations(self) -> int:
        """Number of points that MAP measures: (K + 1) (K + 2), twice as many as there are coefficients."""
        return 2 * self.n_coefficients

    def coordinates(self, points_PN: Array) -> Array:
        """Return the free coordinates of points, `(P, K)`, all about as far apart in every direction."""
        return points_PN[:, : self.dimension] / self.scales[1]

    def sample(self, n_points: int, generator: np.random.Generator) -> Array:
        """
        Draw points: each expert alone, all alike, and the others uniformly on the simplex, at scales of even spread.

        Args:
            n_points: Number of points; with fewer than N + 1 the last of these are left out.
            generator: Source of the draw.
        """
        fixed_PN = np.vstack([np.eye(self.n_experts), np.full(self.n_experts, 1.0 / self.n_experts)])
        # Gaps between sorted uniform numbers are uniform on the simplex.
        cuts = np.sort(generator.random((max(0, n_points - len(fixed_PN)), self.n_experts - 1)), axis=1)
        drawn_PN = np.diff(cuts, axis=1, prepend=0.0, append=1.0)
        weights_PN = np.vstack([fixed_PN, drawn_PN])[:n_points]
        strata_P = (generator.permutation(n_points) + generator.random(n_points)) / n_points
        scales_P = self.scales[0] + (self.scales[1] - self.scales[0]) * strata_P
        return weights_PN * scales_P[:, None]

    def grid(self) -> Array:
        """Return points on a grid over all of it, up to 15,000; it has at most three dimensions."""
        steps = GRIDS[self.dimension]
        shares = [
            (*part, steps - sum(part))
            for part in itertools.product(range(steps + 1), repeat=self.n_experts - 1)
            if sum(part) <= steps
        ]
        weights_PN = np.array(shares, dtype=np.float64) / steps
        scales = np.linspace(*self.scales, 1 if self.scales[0] == self.scales[1] else steps + 1)
        return np.vstack([scale * weights_PN for scale in scales])


def angles(points_PN: Array) -> Array:
    """
    Return hyperspherical angles of points with no negative coordinate, `(P, N - 1)`, each in [0, pi / 2].

    The angles of `(cos a, sin a cos b, sin a sin b)` are a and b.
    """
    tails_PN = np.sqrt(np.cumsum(np.square(points_PN[:, ::-1]), axis=1))[:, ::-1]
    return np.arctan2(tails_PN[:, 1:], points_PN[:, :-1])


def directions(angles_PA: Array) -> Array:
    """Return the unit vectors with given hyperspherical angles, `(P, N)`."""
    sines_PA = np.cumprod(np.sin(angles_PA), axis=1)
    ones_P1 = np.ones((len(angles_PA), 1))
    return np.hstack([ones_P1, sines_PA]) * np.hstack([np.cos(angles_PA), ones_P1])


def n_bins(n_experts: int) -> int:
    """Return into how many parts an angle is divided: MAP's 4 with two or three experts, 2 with more."""
    return 4 if n_experts < 4 else 2


def bins(points_PN: Array) -> NDArray[np.int64]:
    """Return the bin of every point, `(P,)`: angles are divided evenly, and bins numbered across all of them."""
    n_experts = points_PN.shape[1]
    parts = n_bins(n_experts)
    steps_PA = np.minimum((angles(points_PN) / (math.pi / 2) * parts).astype(np.int64), parts - 1)
    numbers: NDArray[np.int64] = steps_PA @ parts ** np.arange(n_experts - 1)
    return numbers


def draw_in_bins(numbers_P: NDArray[np.int64], region: Region, generator: np.random.Generator) -> Array:
    """Draw a point in each of the given bins: at even angles, and an even scale."""
    parts, n_angles = n_bins(region.n_experts), region.n_experts - 1
    steps_PA = numbers_P[:, None] // parts ** np.arange(n_angles) % parts
    angles_PA = (steps_PA + generator.random(steps_PA.shape)) * (math.pi / 2 / parts)
    directions_PN = directions(angles_PA)
    scales_P = generator.uniform(*region.scales, size=len(numbers_P))
    return directions_PN / directions_PN.sum(1, keepdims=True) * scales_P[:, None]
