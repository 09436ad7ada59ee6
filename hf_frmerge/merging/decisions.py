"""Decisions of a method for the tensors of a group. They are what a merge records: the tensors follow from them."""

from __future__ import annotations

import base64
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from hf_frmerge.kernels.elementwise import KEEPS, Elementwise
from hf_frmerge.methods.spectral.decision import Spectral
from hf_frmerge.methods.spectral.inputs import SpectralOptions

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Geometry:
    """
    Measurements of a tensor's experts and of the merge, from Gram matrices.

    Attributes:
        norms: norm of every expert's point over the whole tensor.
        norm_ratio: norm of the merged point over the weighted mean norm of the experts' points; below 1 the merge
            shrank the tensor.
        linear_norm_ratio: the same for the plain weighted mean, as a baseline: what averaging would have kept.
        max_angle: largest angle between two experts in any block, in radians.
        mean_angle: mean of those angles over pairs and blocks, in radians.
        gap_to_nre: largest angle in any block between the merged point and the norm-rescaled mean, in radians.
        n_iter: largest number of steps over the blocks.
        residual: largest gradient norm over the blocks at the last step, in radians.
        unconverged: indices of the blocks that did not reach the tolerance.
        n_ambiguous: number of blocks in which no direction is preferred.
        pair_angles: angle between two experts as the median over blocks, in radians, to four digits, for the pairs
            (0, 1), (0, 2), ..., (1, 2), ...; `None` if one of the two is zero.
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
        """Whether every block reached the tolerance."""
        return not self.unconverged


@dataclass(frozen=True)
class Solution:
    """
    Coefficients of a merge that is a sum of the experts.

    Attributes:
        coefficients: `(B, N)`, float64, on the points of every block; one row if all blocks share it.
        geometry: measurements; `None` if the coefficients come from a table.
    """

    coefficients: NDArray[np.float64]
    geometry: Geometry | None

    def to_journal(self) -> dict[str, Any]:
        """Return JSON values that keep every bit of the coefficients."""
        coefficients = {
            "shape": list(self.coefficients.shape),
            "data": base64.b64encode(self.coefficients.tobytes()).decode(),
        }
        return {"coefficients": coefficients, "geometry": vars(self.geometry) if self.geometry else None}


Decision = Solution | Elementwise | Spectral


class Decided(NamedTuple):
    """Decision for a group, with the digests of the inputs it was computed from, by tensor and role."""

    decision: Decision
    inputs: dict[str, dict[str, str]]


def scaled(decision: Decision, factor: float) -> Decision:
    """Return a decision about deltas, all of which are merged with `factor` on top."""
    if factor == 1.0:
        return decision
    if not isinstance(decision, Solution):
        return replace(decision, scale=decision.scale * factor)
    geometry = decision.geometry
    if geometry is not None:
        geometry = replace(geometry, norm_ratio=geometry.norm_ratio * abs(factor))
    return Solution(decision.coefficients * factor, geometry)


def from_journal(entry: dict[str, Any]) -> Decision:
    """Read a decision from the JSON values that its `to_journal` returned."""
    if "keep" in entry:
        return elementwise_of(entry)
    if "rule" in entry:
        return spectral_of(entry)
    coefficients, geometry = entry["coefficients"], entry["geometry"]
    table = np.frombuffer(base64.b64decode(coefficients["data"]), np.float64).reshape(coefficients["shape"])
    return Solution(table, geometry_of(geometry) if geometry is not None else None)


def elementwise_of(entry: dict[str, Any]) -> Elementwise:
    """Read a decision about single elements from the JSON values of its fields."""
    kind, numbers = entry["keep"]["kind"], {name: v for name, v in entry["keep"].items() if name != "kind"}
    values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in numbers.items()}
    votes = tuple(entry["votes"]) if "votes" in entry else None
    return Elementwise(KEEPS[kind](**values), entry["join"], tuple(entry["weights"]), entry["scale"], votes)


def spectral_of(entry: dict[str, Any]) -> Spectral:
    """Read a decision of a spectral method from the JSON values of its fields."""
    return Spectral(entry["rule"], tuple(entry["weights"]), entry["scale"], SpectralOptions(**entry["options"]))


def geometry_of(entry: dict[str, Any]) -> Geometry:
    """Read a `Geometry` from the JSON values of its fields; others are passed over."""
    values: dict[str, Any] = {field.name: entry[field.name] for field in fields(Geometry)}
    lists: dict[str, Any] = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    return Geometry(**{**values, **lists})
