"""Rows of a comparison of this package with other code on the same matrices, and the table they make."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hf_frmerge.methods.spectral.decision import RULES
from hf_frmerge.methods.spectral.inputs import Experts, SpectralOptions
from hf_frmerge.methods.table import METHODS

TOLERANCE = 1e-4
"""Of float32 results, relative to the merged delta."""


@dataclass(frozen=True)
class Row:
    """
    One method on one kind of experts.

    Attributes:
        method: our name.
        experts: what is merged.
        theirs, ours: return the merged delta.
        reason: what is set for both to mean the same, or why they differ.
        agree: whether they should.
        tolerance: distance up to which they do.
    """

    method: str
    experts: str
    theirs: Callable[[], Tensor]
    ours: Callable[[], Tensor]
    reason: str
    agree: bool = True
    tolerance: float = TOLERANCE

    def distance(self) -> float:
        """Return the Frobenius norm of the difference, relative to their result."""
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # what theirs print
            theirs, ours = self.theirs().double(), self.ours().double()
        return float((theirs - ours).norm() / theirs.norm())


def print_table(rows: Iterable[Row]) -> int:
    """Print a line for every row, and return how many differ that should not."""
    print("| method | experts | relative distance | set, or why |\n|---|---|---|---|")
    failed = 0
    for row in rows:
        distance = row.distance()
        is_far = row.agree and not distance <= row.tolerance
        failed += is_far
        note = f"**more than {row.tolerance:.0e}**; " if is_far else ""
        print(f"| {row.method} | {row.experts} | {distance:.1e} | {note}{row.reason} |")
    return failed


def by_rule(
    method: str,
    deltas: Tensor,
    *,
    base: Tensor | None = None,
    density: float | None = None,
    descent_steps: float = SpectralOptions.descent_steps,
) -> Callable[[], Tensor]:
    """Return what merges deltas `(N, m, n)` by one of our spectral methods, with equal weights."""
    options = SpectralOptions(density or METHODS[method].density or 1.0, descent_steps)
    weights = np.full(len(deltas), 1 / len(deltas))

    def merge() -> Tensor:
        experts = Experts(deltas.float().numpy(), None if base is None else base.float().numpy())
        return torch.from_numpy(RULES[method](experts, weights, options))

    return merge
