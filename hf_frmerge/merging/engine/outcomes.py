"""What the engine tells about each tensor, and whom."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from hf_frmerge.merging.engine.solve import Solution
    from hf_frmerge.merging.planning.plan import TensorStep


@dataclass(frozen=True)
class StepOutcome:
    """
    What happened to one tensor.

    Attributes:
        solution: coefficients and geometry; shared by the tensors of a group, `None` for copies.
        inputs: digest of every stored input by role (`"-1"` is the base, `"0"`, `"1"`, ... the experts).
        output: digest of the written bytes.
    """

    step: TensorStep
    action: Literal["merge", "copy", "skip"]
    solution: Solution | None
    inputs: dict[str, str]
    output: str


class StepObserver:
    """Told about every tensor, in the order of the plan, on the thread that runs the engine."""

    def begin(self, step: TensorStep) -> bool:
        """Return whether the tensor is to be merged; if not, it is copied from the base or the first expert."""
        return True

    def end(self, outcome: StepOutcome) -> bool:
        """Return whether to go on."""
        return True
