"""What a method decided for the tensors of a group. The decision is the record: with it the tensors come out again."""

from __future__ import annotations

import base64
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Geometry:
    """
    What the Gram matrices of a tensor say about its experts and about the merge.

    Attributes:
        norms: norm of every expert's point over the whole tensor.
        norm_ratio: norm of the merged point over the weighted mean norm of the experts' points; below 1 the merge
            shrank the tensor.
        linear_norm_ratio: the same for the plain weighted mean, the honest baseline: what averaging would have kept.
        max_angle: largest angle between two experts in any block, in radians.
        mean_angle: mean of those angles over pairs and blocks, in radians.
        gap_to_nre: largest angle in any block between the merged point and the norm-rescaled mean, in radians.
        n_iter: most steps any block took.
        residual: worst tangent norm at the end, in radians.
        unconverged: indices of the blocks that did not meet the tolerance.
        n_ambiguous: blocks in which no direction is preferred.
        pair_angles: median over blocks of the angle between two experts, in radians, to four digits, of the pairs
            (0, 1), (0, 2), ..., (1, 2), ...; `None` where one of the two is zero.
    """

    norms: tuple[float, ...]
    norm_ratio: float
    linear_norm_ratio: float
    max_angle: float
    mean_angle: float
    gap_to_nre: float
    n_iter: int
    residual: float
    unconverged: tuple[int, ...]
    n_ambiguous: int
    pair_angles: tuple[float | None, ...] = ()

    @property
    def converged(self) -> bool:
        """Whether every block met the tolerance."""
        return not self.unconverged


@dataclass(frozen=True)
class Solution:
    """
    Coefficients of a merge that is a sum of the experts.

    Attributes:
        coefficients: `(B, N)`, float64, on the points of every block; one row where all blocks share it.
        geometry: what was measured; `None` where the coefficients were given.
    """

    coefficients: NDArray[np.float64]
    geometry: Geometry | None

    def to_journal(self) -> dict[str, Any]:
        """Return it as JSON values, all bits kept."""
        coefficients = {
            "shape": list(self.coefficients.shape),
            "data": base64.b64encode(self.coefficients.tobytes()).decode(),
        }
        return {"coefficients": coefficients, "geometry": vars(self.geometry) if self.geometry else None}


@dataclass(frozen=True)
class Trimming:
    """
    What TIES decided: the magnitude from which on the deltas of an expert stay, and how what stays is put together.

    Attributes:
        thresholds: one an expert; float32 values.
        weights: of the experts, in the vote and in the mean.
        scale: factor of the merged delta.
    """

    thresholds: tuple[float, ...]
    weights: tuple[float, ...]
    scale: float

    def to_journal(self) -> dict[str, Any]:
        """Return it as JSON values; they give every number back exactly."""
        return vars(self)


Decision = Solution | Trimming


class Decided(NamedTuple):
    """The decision for a group, and the digests of the inputs it was taken from, by tensor and role."""

    decision: Decision
    inputs: dict[str, dict[str, str]]


def from_journal(entry: dict[str, Any]) -> Decision:
    """Read back what `to_journal` of any decision returned."""
    if "thresholds" in entry:
        return trimming_of(entry)
    coefficients, geometry = entry["coefficients"], entry["geometry"]
    table = np.frombuffer(base64.b64decode(coefficients["data"]), np.float64).reshape(coefficients["shape"])
    return Solution(table, geometry_of(geometry) if geometry is not None else None)


def trimming_of(entry: dict[str, Any]) -> Trimming:
    """Read a `Trimming` from the JSON values of its fields."""
    return Trimming(tuple(entry["thresholds"]), tuple(entry["weights"]), entry["scale"])


def geometry_of(entry: dict[str, Any]) -> Geometry:
    """Read a `Geometry` from the JSON values of its fields; others are passed over."""
    values: dict[str, Any] = {field.name: entry[field.name] for field in fields(Geometry)}
    lists: dict[str, Any] = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    return Geometry(**{**values, **lists})
