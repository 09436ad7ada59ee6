"""How the engine measures for sparse methods, which ask round by round until they decide."""

from __future__ import annotations

import threading
from inspect import isgeneratorfunction
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_frmerge.geometry.portable import fold
from hf_frmerge.kernels.elementwise import Elementwise, has_nonfinite
from hf_frmerge.merging.decisions import Decided, scaled
from hf_frmerge.merging.engine.gather import joined
from hf_frmerge.merging.operands.tensor_inputs import TensorInputs
from hf_frmerge.methods.sparse.rules import CountKeys
from hf_frmerge.methods.table import METHODS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from hf_frmerge.kernels.interface import Kernels
    from hf_frmerge.merging.engine.gather import Gather
    from hf_frmerge.merging.engine.tensor_work import TensorWork
    from hf_frmerge.merging.planning.plan import MergePlan
    from hf_frmerge.methods.sparse.rules import Measuring, Wish


class SparseRule:
    """Ask the method what it wants to know of every group, round by round, until it decides."""

    is_blockwise = False

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
        if not tensor.input_digests[index]:  # in the first round
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
            decided[name] = Decided(scaled(decision, step.scale), joined(self._gather, inputs))
        return decided

    def join(self) -> None:
        """Contribute nothing to every round of the one group there is."""
        if not self.rounds:
            return
        weights = next(step.weights for step in self._plan.steps if step.action == "merge")
        group = self._group("", weights)
        while group.go_on(self._gather):
            pass
        joined(self._gather, {})

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
        elif self._counts is None:
            self._counts = measured
        else:
            self._counts += measured

    def go_on(self, gather: Gather | None) -> bool:
        """Send the method the answer of all processes; return whether it has another wish."""
        if self.decision is not None:  # other groups of its batch take more rounds
            return False
        sums, counts = joined(gather, self._sums), self._counts
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
