"""What the engine does for each kind of method: how it measures a tensor, and how it decides from the measurements."""

# Shape suffixes: N = experts.

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np

from hf_frmerge.kernels.elementwise import Band, Elementwise
from hf_frmerge.merging.decisions import Decided, Solution, scaled
from hf_frmerge.merging.engine.gather import joined
from hf_frmerge.merging.engine.solve import measure, points_of, solve
from hf_frmerge.merging.engine.tensor_work import TensorGram, sum_grams
from hf_frmerge.methods.spectral.decision import Spectral
from hf_frmerge.methods.table import METHODS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hf_frmerge.kernels.interface import Kernels
    from hf_frmerge.merging.decisions import Decision
    from hf_frmerge.merging.engine.gather import Gather
    from hf_frmerge.merging.engine.tensor_work import TensorWork
    from hf_frmerge.merging.planning.plan import MergePlan
    from hf_frmerge.merging.planning.tensor_step import TensorStep


class Rule(Protocol):
    """
    Measuring and deciding for one kind of method, before tensors are written.

    Attributes:
        rounds: how often all inputs are read before the decision, at least; 0 if it needs no measurement.
        is_blockwise: whether it measures blocks alike whatever tensor they are of, and decides on sums of the experts.
    """

    rounds: int
    is_blockwise: bool

    def measure(self, kernels: Kernels, tensor: TensorWork, index: int) -> None:
        """Measure one piece of a tensor; called from any thread."""
        ...

    def unfinished(self, tensors: Sequence[TensorWork]) -> list[TensorWork]:
        """Return the tensors of a batch that need another round, after all their pieces were measured."""
        ...

    def decide(self, tensors: Sequence[TensorWork]) -> dict[str, Decided]:
        """Return the decision for every group of a batch."""
        ...

    def join(self) -> None:
        """Take part in the exchange with the other processes from one that has nothing to merge."""
        ...


def rule_for(plan: MergePlan, gather: Gather | None = None) -> Rule:
    """
    Return the rule of a plan's method.

    Args:
        plan: Plan of the merge.
        gather: Exchange between processes that decide together (`block="model"`): returns what all of them pass.
    """
    kind = METHODS[plan.args.method].kind
    if kind == "given":
        return GivenRule(plan)
    if kind == "spectral":
        return SpectralRule(plan)
    if kind == "sparse":
        from hf_frmerge.merging.engine.sparse_rule import SparseRule  # on use, with the methods that it asks

        return SparseRule(plan, gather)
    return SpanRule(plan, gather)


class SpanRule:
    """Measure Gram matrices of the differences, and solve for coefficients where no fit found them."""

    rounds = 1
    is_blockwise = True

    def __init__(self, plan: MergePlan, gather: Gather | None) -> None:
        self._plan = plan
        self._gather = gather
        self._fitted = plan.fitted.rows if plan.fitted is not None else {}
        self._are_numbers: dict[str, bool] = {}  # group -> whether its blocks are single numbers
        for step in plan.steps:
            alone = step.group not in self._are_numbers
            self._are_numbers[step.group] = alone and step.block_len == 1

    def measure(self, kernels: Kernels, tensor: TensorWork, index: int) -> None:
        """Compute the Gram matrices of the blocks of a piece, or of the part of a block in it."""
        piece = tensor.pieces[index]
        gram, tensor.input_digests[index] = tensor.inputs.gram(kernels, piece, precise=tensor.precise)
        first = index if tensor.is_cut else piece.first_block
        tensor.grams[first : first + piece.n_blocks] = gram

    def unfinished(self, tensors: Sequence[TensorWork]) -> list[TensorWork]:
        """Return tensors with values so small that float32 products underflow; they are measured again in float64."""
        tiny = [tensor for tensor in tensors if tensor.needs_precision(tensor.gram())]
        for tensor in tiny:
            tensor.precise = True
        return tiny

    def decide(self, tensors: Sequence[TensorWork]) -> dict[str, Decided]:
        """Solve all groups of a batch in one call, as `solve` explains; what was fitted is measured alone."""
        fitted = [tensor for tensor in tensors if tensor.step.name in self._fitted]
        others = [tensor for tensor in tensors if tensor.step.name not in self._fitted]
        return (self._measured(fitted) if fitted else {}) | (self._solved(others) if others else {})

    def _measured(self, tensors: Sequence[TensorWork]) -> dict[str, Decided]:
        """Return the coefficients that a fit found; each tensor is a group of its own."""
        steps = [tensor.step for tensor in tensors]
        has_base = tensors[0].inputs.has_base
        solutions = measure(
            points_of(np.stack([tensor.gram() for tensor in tensors]), self._plan.space, has_base),
            [step.weights for step in steps],
            np.stack([self._fitted[step.name] for step in steps]),
            tensors=[step.name for step in steps],
        )
        return {
            tensor.step.group: Decided(solution, {tensor.step.name: tensor.inputs_digest()})
            for tensor, solution in zip(tensors, solutions)
        }

    def _solved(self, tensors: Sequence[TensorWork]) -> dict[str, Decided]:
        groups: dict[str, dict[str, TensorGram]] = {}
        for tensor in tensors:
            gram = TensorGram(tensor.gram(), tensor.inputs_digest())
            groups.setdefault(tensor.step.group, {})[tensor.step.name] = gram
        groups = {group: joined(self._gather, grams) for group, grams in groups.items()}
        weights = {tensor.step.group: tensor.step.weights for tensor in tensors}
        solutions = solve(
            points_of(
                np.stack([sum_grams(grams) for grams in groups.values()]),
                self._plan.space,
                tensors[0].inputs.has_base,
            ),
            [weights[group] for group in groups],
            self._plan.args.method,
            self._plan.span_options,
            tensors=[
                next(iter(grams)) if len(grams) == 1 else group or "the whole model" for group, grams in groups.items()
            ],
            experts=[expert.spec for expert in self._plan.experts],
            numbers=[self._are_numbers[group] for group in groups],
        )
        scales = {tensor.step.group: tensor.step.scale for tensor in tensors}
        return {
            group: Decided(scaled(solution, scales[group]), {name: grams[name].inputs for name in sorted(grams)})
            for (group, grams), solution in zip(groups.items(), solutions)
        }

    def join(self) -> None:
        """Contribute no Gram matrix."""
        joined(self._gather, {})


class SpectralRule:
    """Merge matrices by the method, and average the deltas of other tensors, or add them up; nothing is measured."""

    rounds = 0
    is_blockwise = False

    def __init__(self, plan: MergePlan) -> None:
        self._plan = plan

    def measure(self, kernels: Kernels, tensor: TensorWork, index: int) -> None:
        """Never called, as there are no rounds."""
        raise AssertionError("nothing is measured")

    def unfinished(self, tensors: Sequence[TensorWork]) -> list[TensorWork]:
        """Return no tensor."""
        return []

    def decide(self, tensors: Sequence[TensorWork]) -> dict[str, Decided]:
        """Return the method for matrices, and the mean or the sum for the rest."""
        return {
            tensor.step.group: Decided(scaled(self.decision_for(tensor.step), tensor.step.scale), {})
            for tensor in tensors
        }

    def join(self) -> None:
        """Do nothing: every process decides alike."""

    def decision_for(self, step: TensorStep) -> Decision:
        """Return the decision for one tensor."""
        args = self._plan.args
        if step.is_matrix:
            return Spectral(args.method, step.weights, args.scale, self._plan.spectral_options)
        n_experts, is_sum = len(step.weights), METHODS[args.method].is_continual
        if self._plan.layout is None:  # factors are summed side by side, with coefficients
            return Solution((n_experts * args.scale if is_sum else 1.0) * np.array([step.weights]), None)
        everything = Band((0.0,) * n_experts)
        return Elementwise(everything, "sum", step.weights, args.scale if is_sum else 1.0 / n_experts)


class GivenRule:
    """Take coefficients from a table; nothing is measured."""

    rounds = 0
    is_blockwise = False

    def __init__(self, plan: MergePlan) -> None:
        assert plan.coefficients is not None
        self._rows = plan.coefficients.rows

    def measure(self, kernels: Kernels, tensor: TensorWork, index: int) -> None:
        """Never called, as there are no rounds."""
        raise AssertionError("nothing is measured")

    def unfinished(self, tensors: Sequence[TensorWork]) -> list[TensorWork]:
        """Return no tensor."""
        return []

    def decide(self, tensors: Sequence[TensorWork]) -> dict[str, Decided]:
        """Return the coefficients of the table."""
        return {tensor.step.group: Decided(Solution(self._rows[tensor.step.name], None), {}) for tensor in tensors}

    def join(self) -> None:
        """Do nothing: every process has the table."""
