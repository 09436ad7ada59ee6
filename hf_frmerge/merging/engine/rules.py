"""What the engine does for each kind of method: how it measures a tensor, and how it decides from the measurements."""

# Shape suffixes: N = experts.

from __future__ import annotations

import threading
from inspect import isgeneratorfunction
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np

from hf_frmerge.geometry.portable import fold
from hf_frmerge.kernels.elementwise import Band, Elementwise, has_nonfinite
from hf_frmerge.merging.decisions import Decided, Solution, scaled
from hf_frmerge.merging.engine.solve import points_of, solve
from hf_frmerge.merging.engine.tensor_work import TensorGram, sum_grams
from hf_frmerge.merging.operands.tensor_inputs import TensorInputs
from hf_frmerge.methods.sparse.rules import CountKeys
from hf_frmerge.methods.spectral.decision import Spectral
from hf_frmerge.methods.table import METHODS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from hf_frmerge.kernels.interface import Kernels
    from hf_frmerge.merging.decisions import Decision
    from hf_frmerge.merging.engine.tensor_work import TensorWork
    from hf_frmerge.merging.planning.plan import MergePlan
    from hf_frmerge.merging.planning.tensor_step import TensorStep
    from hf_frmerge.methods.sparse.rules import Measuring, Wish

    Gather = Callable[[list[Any]], list[Any]]

_Name = TypeVar("_Name")


class Rule(Protocol):
    """
    Measuring and deciding for one kind of method, before tensors are written.

    Attributes:
        rounds: how often all inputs are read before the decision, at least; 0 if it needs no measurement.
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
    if kind == "spectral":
        return SpectralRule(plan)
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
        scales = {tensor.step.group: tensor.step.scale for tensor in tensors}
        return {
            group: Decided(scaled(solution, scales[group]), {name: grams[name].inputs for name in sorted(grams)})
            for (group, grams), solution in zip(groups.items(), solutions)
        }

    def join(self) -> None:
        """Contribute no Gram matrix."""
        _joined(self._gather, {})


class SparseRule:
    """Ask the method what it wants to know of every group, round by round, until it decides."""

    def __init__(self, plan: MergePlan, gather: Gather | None) -> None:
        self._plan = plan
        self._gather = gather
        self._method = METHODS[plan.args.method].rule()
        self.rounds = 1 if isgeneratorfunction(self._method) else 0  # at least
        self._lock = threading.Lock()
        self._groups: dict[str, _Group] = {}

    def measure(self, kernels: Kernels, tensor: TensorWork, index: int) -> None:
        """Measure what the method wants to know of a piece."""
        assert isinstance(tensor.inputs, TensorInputs)
        piece = tensor.pieces[index]
        with self._lock:
            group = self._group(tensor.step.group, tensor.step.weights)
        operands, labels = tensor.inputs.delta_operands(piece.start, piece.stop)
        measured: NDArray[Any] = group.wish.measure(kernels, operands)
        if isinstance(group.wish, CountKeys) and group.wish.bins is None and has_nonfinite(measured):
            tensor.inputs.check_finite(kernels, operands, labels)
        with self._lock:
            group.add(tensor.step.name, index, measured)
        tensor.input_digests[index] = tensor.inputs.digests(piece)

    def unfinished(self, tensors: Sequence[TensorWork]) -> list[TensorWork]:
        """Tell the method what was measured; return the tensors of the groups of which it wants to know more."""
        names = dict.fromkeys(tensor.step.group for tensor in tensors)
        again = {name for name in names if self._groups[name].go_on(self._gather)}
        return [tensor for tensor in tensors if tensor.step.group in again]

    def decide(self, tensors: Sequence[TensorWork]) -> dict[str, Decided]:
        """Return the decisions of the method."""
        decided = {}
        for name, step in {tensor.step.group: tensor.step for tensor in tensors}.items():
            if not self.rounds:
                decision = self._method(self._plan.sparse_options(step.weights))
                decided[name] = Decided(scaled(decision, step.scale), {})
                continue
            decision = self._groups.pop(name).decision
            assert decision is not None
            inputs = {tensor.step.name: tensor.inputs_digest() for tensor in tensors if tensor.step.group == name}
            decided[name] = Decided(scaled(decision, step.scale), _joined(self._gather, inputs))
        return decided

    def join(self) -> None:
        """Contribute nothing to every round of the one group there is."""
        if not self.rounds:
            return
        weights = next(step.weights for step in self._plan.steps if step.action == "merge")
        group = self._group("", weights)
        while group.go_on(self._gather):
            pass
        _joined(self._gather, {})

    def _group(self, name: str, weights: tuple[float, ...]) -> _Group:
        if name not in self._groups:
            self._groups[name] = _Group(self._method(self._plan.sparse_options(weights)))
        return self._groups[name]


class _Group:
    """
    A group that a sparse method is asking about.

    Attributes:
        wish: what it wants to know now.
        decision: what it decided, once it has.
    """

    def __init__(self, method: Measuring) -> None:
        self._method = method
        self.wish: Wish = next(method)
        self.decision: Elementwise | None = None
        self._counts: NDArray[np.int64] | None = None
        self._sums: dict[tuple[str, int], NDArray[np.float64]] = {}

    def add(self, tensor: str, index: int, measured: NDArray[Any]) -> None:
        """Add what was measured of a piece: counts at once, numbers that are rounded later, in order."""
        if measured.dtype != np.int64:
            self._sums[tensor, index] = measured
        else:
            self._counts = measured if self._counts is None else self._counts + measured

    def go_on(self, gather: Gather | None) -> bool:
        """Send the method the answer of all processes; return whether it has another wish."""
        sums, counts = _joined(gather, self._sums), self._counts
        if gather is not None:
            parts = [part for part in gather([counts]) if part is not None]  # None: a process with nothing to merge
            counts = np.sum(parts, axis=0) if parts else None
        answer: Any = fold(np.stack([sums[place] for place in sorted(sums)])) if sums else counts
        self._sums, self._counts = {}, None
        try:
            self.wish = self._method.send(answer)
        except StopIteration as end:
            self.decision = end.value
        return self.decision is None


class SpectralRule:
    """Merge matrices by the method, and average the deltas of other tensors, or add them up; nothing is measured."""

    rounds = 0

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
        everything = Band((0.0,) * len(step.weights))
        scale = args.scale if METHODS[args.method].is_continual else 1.0 / len(step.weights)
        return Elementwise(everything, "sum", step.weights, scale)


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


def _joined(gather: Gather | None, by_name: dict[_Name, Any]) -> dict[_Name, Any]:
    """Combine the entries of all processes."""
    return by_name if gather is None else {name: value for part in gather([by_name]) for name, value in part.items()}
