"""Rules that measure once for many merges of the same experts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hf_frmerge.checkpoints.disk import disk_errors
from hf_frmerge.merging.engine.rules import SpanRule, SpectralRule
from hf_frmerge.methods.spectral.decision import Spectral

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from hf_frmerge.merging.decisions import Decided, Decision
    from hf_frmerge.merging.engine.tensor_work import TensorWork
    from hf_frmerge.merging.planning.plan import MergePlan
    from hf_frmerge.merging.planning.tensor_step import TensorStep
    from hf_frmerge.methods.spectral.inputs import Experts, Matrix


class SharedGrams(SpanRule):
    """
    Rule of span methods that takes the Gram matrices of an earlier merge.

    Args:
        plan: Plan of the merge.
        known: Tensor -> Gram matrices of its blocks, or of their pieces, from a merge of the same experts in the same
            space and blocks; filled in if there are not those of all tensors, as after a merge that failed.
    """

    def __init__(self, plan: MergePlan, known: dict[str, NDArray[np.float64]]) -> None:
        super().__init__(plan, None)
        self._known = known
        self.rounds = 0 if known.keys() >= {step.name for step in plan.steps if step.action == "merge"} else 1

    def decide(self, tensors: Sequence[TensorWork]) -> dict[str, Decided]:
        """Solve all groups of a batch from known Gram matrices, or from those that were just measured."""
        for tensor in tensors:
            if self.rounds:
                self._known[tensor.step.name] = tensor.grams
            else:
                tensor.grams = self._known[tensor.step.name]
        return super().decide(tensors)


class SharedMatrices(SpectralRule):
    """
    Rule of a spectral method that takes the merged deltas of an earlier merge, which differ from its own by a factor.

    Args:
        plan: Plan of the merge.
        folder: Folder for the merged deltas, one file a matrix: together they are a model in float32.
    """

    def __init__(self, plan: MergePlan, folder: Path) -> None:
        super().__init__(plan)
        self._files = {step.name: folder / f"{number}.npy" for number, step in enumerate(plan.steps)}

    def decision_for(self, step: TensorStep) -> Decision:
        """Return the decision for one tensor; that for a matrix keeps the merged delta."""
        decision = super().decision_for(step)
        if not isinstance(decision, Spectral):
            return decision
        return _KeptMatrix(decision.rule, decision.weights, decision.scale, decision.options, self._files[step.name])


@dataclass(frozen=True)
class _KeptMatrix(Spectral):
    """Decision of a spectral method that keeps its merged delta in a file."""

    file: Path

    def merge(self, experts: Experts) -> Matrix:
        if self.file.exists():
            kept: Matrix = np.load(self.file)
            return kept
        merged = super().merge(experts)
        with disk_errors(self.file, "written"):
            np.save(self.file, merged)
        return merged
