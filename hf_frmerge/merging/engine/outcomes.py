"""What the engine tells about each tensor, and whom."""

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
    What happened to one tensor.

    Attributes:
        decision: what the method decided; shared by the tensors of a group, `None` for copies.
        inputs: digest of every stored input by role (`"-1"` is the base, `"0"`, `"1"`, ... the experts).
        output: digest of the written bytes.
        details: of a module of a merged adapter: how its factors were written.
    """

    step: TensorStep
    action: Literal["merge", "copy", "skip"]
    decision: Decision | None
    inputs: dict[str, str]
    output: str
    details: FactorDetails | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in the output."""
        return self.step.nbytes

    @property
    def solution(self) -> Solution | None:
        """Coefficients, and geometry if it was measured, of a merge that is a sum of the experts."""
        return self.decision if isinstance(self.decision, Solution) else None

    @property
    def geometry(self) -> Geometry | None:
        """What was measured of the experts, if anything was."""
        return self.solution.geometry if self.solution is not None else None


class StepObserver:
    """Told about every tensor, in the order of the plan, on the thread that runs the engine."""

    def begin(self, step: TensorStep) -> bool:
        """Return whether the tensor is to be merged; if not, it is copied from the base or the first expert."""
        return True

    def end(self, outcome: StepOutcome) -> bool:
        """Return whether to go on."""
        return True
