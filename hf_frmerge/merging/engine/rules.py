"""How the engine carries out each kind of method: what it measures of a tensor, and what it decides from that."""

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
    What a kind of method does before a tensor can be written.

    Attributes:
        rounds: how often all inputs are read before the decision; 0 if it is known without.
    """

    rounds: int

    def measure(self, kernels: Kernels, tensor: TensorWork, index: int) -> None:
        """Look at one piece of a tensor; on any thread."""
        ...

    def unfinished(self, tensors: Sequence[TensorWork]) -> list[TensorWork]:
        """Return those of a batch that have to be measured once more, after all their pieces were."""
        ...

    def decide(self, tensors: Sequence[TensorWork]) -> dict[str, Decided]:
        """Decide for every group of a batch."""
        ...

    def join(self) -> None:
        """Take part in what the other processes decide together, as one that has nothing to merge."""
        ...


def rule_for(plan: MergePlan, gather: Gather | None = None) -> Rule:
    """
    Return the rule of a plan's method.

    Args:
        plan: What to do.
        gather: With several processes that decide together (`block="model"`), returns what each of them passes.
    """
    kind = METHODS[plan.args.method].kind
    if kind == "given":
        return GivenRule(plan)
    return SparseRule(plan, gather) if kind == "sparse" else SpanRule(plan, gather)


class SpanRule:
    """Gram matrices of the differences, and coefficients from them."""

    rounds = 1

    def __init__(self, plan: MergePlan, gather: Gather | None) -> None:
        self._plan = plan
        self._gather = gather

    def measure(self, kernels: Kernels, tensor: TensorWork, index: int) -> None:
        """Take the Gram matrices of the blocks of a piece, or of the part of a block that it is."""
        piece = tensor.pieces[index]
        gram, tensor.input_digests[index] = tensor.inputs.gram(kernels, piece, precise=tensor.precise)
        first = index if tensor.is_cut else piece.first_block
        tensor.grams[first : first + piece.n_blocks] = gram

    def unfinished(self, tensors: Sequence[TensorWork]) -> list[TensorWork]:
        """Return tensors so small that float32 products vanished; they will be multiplied in float64."""
        rough = [tensor for tensor in tensors if tensor.needs_precision(tensor.gram())]
        for tensor in rough:
            tensor.precise = True
        return rough

    def decide(self, tensors: Sequence[TensorWork]) -> dict[str, Decided]:
        """Solve all groups at once: on so few numbers it is the calls that take the time."""
        spheres: dict[str, dict[str, TensorGram]] = {}
        for tensor in tensors:
            gram = TensorGram(tensor.gram(), tensor.inputs_digest())
            spheres.setdefault(tensor.step.group, {})[tensor.step.name] = gram
        spheres = {group: _joined(self._gather, found) for group, found in spheres.items()}
        weights = {tensor.step.group: tensor.step.weights for tensor in tensors}
        solutions = solve(
            points_of(
                np.stack([sum_grams(found) for found in spheres.values()]),
                self._plan.space,
                tensors[0].inputs.has_base,
            ),
            [weights[group] for group in spheres],
            self._plan.args.method,
            self._plan.span_options,
            tensors=[
                next(iter(found)) if len(found) == 1 else group or "the whole model"
                for group, found in spheres.items()
            ],
            experts=[expert.spec for expert in self._plan.experts],
        )
        return {
            group: Decided(solution, {name: found[name].inputs for name in sorted(found)})
            for (group, found), solution in zip(spheres.items(), solutions)
        }

    def join(self) -> None:
        """Hand in no Gram matrix."""
        _joined(self._gather, {})


class SparseRule:
    """Magnitudes of the deltas, counted in two rounds, and the threshold of every expert from them."""

    rounds = 2

    def __init__(self, plan: MergePlan, gather: Gather | None) -> None:
        self._plan = plan
        self._gather = gather
        self._lock = threading.Lock()
        # Group -> counts of every expert, of the round under way; and what the first round found.
        self._counts: dict[str, list[NDArray[np.int64]]] = {}
        self._searches: dict[str, list[Search]] = {}

    def measure(self, kernels: Kernels, tensor: TensorWork, index: int) -> None:
        """Add the magnitudes of a piece to the counts of its group. Whole numbers: the order does not matter."""
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
        """Return all tensors of the groups of which only the bins of the thresholds are known so far."""
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
            thresholds = np.array(keys, dtype=np.uint32).view(np.float32)
            trimming = Trimming(tuple(thresholds.tolist()), weights, self._plan.args.scale)
            inputs = {tensor.step.name: tensor.inputs_digest() for tensor in tensors if tensor.step.group == group}
            decided[group] = Decided(trimming, _joined(self._gather, inputs))
        return decided

    def join(self) -> None:
        """Hand in empty counts, once for every round."""
        nothing = [np.zeros(0, np.int64)] * len(self._plan.experts)
        for _ in range(self.rounds):
            self._everyones(nothing)
        _joined(self._gather, {})

    def _everyones(self, counts: list[NDArray[np.int64]]) -> list[NDArray[np.int64]]:
        if self._gather is None:
            return counts
        parts = [part for part in self._gather([counts]) if part[0].size]
        return [np.sum(of_expert, axis=0) for of_expert in zip(*parts)] if parts else counts


class GivenRule:
    """Coefficients from a table; nothing is measured."""

    rounds = 0

    def __init__(self, plan: MergePlan) -> None:
        assert plan.coefficients is not None
        self._rows = plan.coefficients.rows

    def measure(self, kernels: Kernels, tensor: TensorWork, index: int) -> None:
        """Do nothing: with no round, nobody asks."""
        raise AssertionError("nothing is measured")

    def unfinished(self, tensors: Sequence[TensorWork]) -> list[TensorWork]:
        """Return none."""
        return []

    def decide(self, tensors: Sequence[TensorWork]) -> dict[str, Decided]:
        """Look the coefficients up."""
        return {tensor.step.group: Decided(Solution(self._rows[tensor.step.name], None), {}) for tensor in tensors}

    def join(self) -> None:
        """Do nothing: the table is there for all."""


def _joined(gather: Gather | None, own: dict[str, Any]) -> dict[str, Any]:
    """Put together what all processes know by name."""
    return own if gather is None else {name: value for part in gather([own]) for name, value in part.items()}
