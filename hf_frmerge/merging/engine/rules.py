"""What the engine does for each kind of method: how it measures a tensor, and how it decides from the measurements."""

# Shape suffixes: N = experts.

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from hf_frmerge.merging.decisions import Decided, Solution, Trimming
from hf_frmerge.merging.engine.solve import points_of, solve
from hf_frmerge.merging.engine.tensor_work import TensorGram, sum_grams
from hf_frmerge.merging.operands.tensor_inputs import TensorInputs
from hf_frmerge.methods.sparse import Search, count_high, count_low, magnitude_keys, n_kept
from hf_frmerge.methods.table import METHODS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from hf_frmerge.kernels.interface import Kernels
    from hf_frmerge.merging.engine.tensor_work import TensorWork
    from hf_frmerge.merging.planning.plan import MergePlan

    Gather = Callable[[list[Any]], list[Any]]


class Rule(Protocol):
    """
    Measuring and deciding for one kind of method, before tensors are written.

    Attributes:
        rounds: how often all inputs are read before the decision; 0 if it needs no measurement.
    """

    rounds: int

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
    return SparseRule(plan, gather) if kind == "sparse" else SpanRule(plan, gather)


class SpanRule:
    """Measure Gram matrices of the differences, and solve for coefficients."""

    rounds = 1

    def __init__(self, plan: MergePlan, gather: Gather | None) -> None:
        self._plan = plan
        self._gather = gather
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
        """Solve all groups of a batch in one call, as `solve` explains."""
        groups: dict[str, dict[str, TensorGram]] = {}
        for tensor in tensors:
            gram = TensorGram(tensor.gram(), tensor.inputs_digest())
            groups.setdefault(tensor.step.group, {})[tensor.step.name] = gram
        groups = {group: _joined(self._gather, grams) for group, grams in groups.items()}
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
        return {
            group: Decided(solution, {name: grams[name].inputs for name in sorted(grams)})
            for (group, grams), solution in zip(groups.items(), solutions)
        }

    def join(self) -> None:
        """Contribute no Gram matrix."""
        _joined(self._gather, {})


class SparseRule:
    """Count the magnitudes of the deltas in two rounds, and find every expert's threshold from the counts."""

    rounds = 2

    def __init__(self, plan: MergePlan, gather: Gather | None) -> None:
        self._plan = plan
        self._gather = gather
        self._lock = threading.Lock()
        # Group -> counts of every expert in the current round; and the bins that the first round found.
        self._counts: dict[str, list[NDArray[np.int64]]] = {}
        self._searches: dict[str, list[Search]] = {}

    def measure(self, kernels: Kernels, tensor: TensorWork, index: int) -> None:
        """Add the magnitudes of a piece to the counts of its group; integer counts do not depend on the order."""
        piece, searches = tensor.pieces[index], self._searches.get(tensor.step.group)
        assert isinstance(tensor.inputs, TensorInputs)
        for _, deltas_ND in tensor.inputs.deltas(kernels, piece):
            keys_ND = magnitude_keys(deltas_ND)
            counted = [
                count_high(keys_D) if searches is None else count_low(keys_D, searches[expert])
                for expert, keys_D in enumerate(keys_ND)
            ]
            with self._lock:
                before = self._counts.get(tensor.step.group)
                total = counted if before is None else [a + b for a, b in zip(before, counted)]
                self._counts[tensor.step.group] = total
        tensor.input_digests[index] = tensor.inputs.digests(piece)

    def unfinished(self, tensors: Sequence[TensorWork]) -> list[TensorWork]:
        """After the first round find the bins of the thresholds, and return all tensors for the second."""
        again = []
        for group in dict.fromkeys(tensor.step.group for tensor in tensors):
            if group not in self._searches:
                counts = self._everyones(self._counts.pop(group))
                kept = [n_kept(int(c.sum()), self._plan.args.density) for c in counts]
                self._searches[group] = [Search.begin(c, rank) for c, rank in zip(counts, kept)]
                again += [tensor for tensor in tensors if tensor.step.group == group]
        return again

    def decide(self, tensors: Sequence[TensorWork]) -> dict[str, Decided]:
        """Return the thresholds of every group."""
        decided = {}
        for group, weights in {tensor.step.group: tensor.step.weights for tensor in tensors}.items():
            counts = self._everyones(self._counts.pop(group))
            keys = [search.end(c) for search, c in zip(self._searches.pop(group), counts)]
            # A key is the bits of a float32 magnitude.
            thresholds = np.array(keys, dtype=np.uint32).view(np.float32)
            trimming = Trimming(tuple(thresholds.tolist()), weights, self._plan.args.scale)
            inputs = {tensor.step.name: tensor.inputs_digest() for tensor in tensors if tensor.step.group == group}
            decided[group] = Decided(trimming, _joined(self._gather, inputs))
        return decided

    def join(self) -> None:
        """Contribute empty counts, once for every round."""
        nothing = [np.zeros(0, np.int64)] * len(self._plan.experts)
        for _ in range(self.rounds):
            self._everyones(nothing)
        _joined(self._gather, {})

    def _everyones(self, counts: list[NDArray[np.int64]]) -> list[NDArray[np.int64]]:
        if self._gather is None:
            return counts
        parts = [part for part in self._gather([counts]) if part[0].size]  # empty: a process that has nothing to merge
        return [np.sum(of_expert, axis=0) for of_expert in zip(*parts)] if parts else counts


class GivenRule:
    """Take coefficients from a table; nothing is measured."""

    rounds = 0

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


def _joined(gather: Gather | None, by_name: dict[str, Any]) -> dict[str, Any]:
    """Combine the entries of all processes."""
    return by_name if gather is None else {name: value for part in gather([by_name]) for name, value in part.items()}
