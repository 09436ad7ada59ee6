"""Outcome of each tensor, and the observer that the engine notifies of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from hf_frmerge.merging.decisions import Solution

if TYPE_CHECKING:
    from hf_frmerge.merging.decisions import Decision, Geometry
    from hf_frmerge.merging.planning.tensor_step import TensorStep


@dataclass(frozen=True)
class FactorDetails:
    """
    How one module of an adapter was written.

    Attributes:
        rank: of the written factors.
        norm: Frobenius norm of the merged delta.
        truncation_error: norm of what recompression left out, as a share of `norm`; 0 where nothing was.
    """

    rank: int
    norm: float
    truncation_error: float


@dataclass(frozen=True)
class StepOutcome:
    """
    Outcome of one tensor.

    Attributes:
        decision: decision of the method, shared by the tensors of a group; `None` for copies.
        inputs: digest of every stored input by role (`"-1"` is the base, `"0"`, `"1"`, ... the experts).
        output: digest of the written bytes.
        details: of a module of a merged adapter: how its factors were written.
        n_saturated: values that were beyond the output's dtype and became its largest number.
    """

    step: TensorStep
    action: Literal["merge", "copy", "skip"]
    decision: Decision | None
    inputs: dict[str, str]
    output: str
    details: FactorDetails | None = None
    n_saturated: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in the output."""
        return self.step.nbytes

    @property
    def solution(self) -> Solution | None:
        """The decision if it is a set of coefficients, with the geometry if that was measured; else `None`."""
        return self.decision if isinstance(self.decision, Solution) else None

    @property
    def geometry(self) -> Geometry | None:
        """Measurements of the experts, if there are any."""
        return self.decision.geometry if isinstance(self.decision, Solution) else None


class StepObserver:
    """Observer of the engine, notified of every tensor in the order of the plan, on the thread that called `run`."""

    def begin(self, step: TensorStep) -> bool:
        """Return whether to merge the tensor; otherwise it is copied from the base or the first expert."""
        return True

    def end(self, outcome: StepOutcome) -> bool:
        """Take the outcome of a tensor; return whether to continue the merge."""
        return True
