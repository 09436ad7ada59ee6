"""
Run a plan: Gram pass, coefficients, combine pass, piece by piece, on plain threads.

The only module that knows about threads, memory budgets, processes and resume. Pieces of several tensors are under way
at once; what is computed never depends on which thread did it or when.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from hf_frmerge.checkpoints.reader import DTYPE_BITS
from hf_frmerge.errors import ArgumentError, ResumeError
from hf_frmerge.merging.blocks import PIECE_ELEMENTS, pieces
from hf_frmerge.merging.operands import digest, join_digests
from hf_frmerge.merging.solve import Solution, points_of, solve

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from hf_frmerge.checkpoints.writer import CheckpointWriter
    from hf_frmerge.kernels import Kernels
    from hf_frmerge.merging.journal import Journal
    from hf_frmerge.merging.operands import Piece, TensorInputs
    from hf_frmerge.merging.plan import MergePlan, TensorStep

logger = logging.getLogger(__name__)

# Below this mean square, float32 products of the first operand start to vanish; the Gram pass is then done again
# with float64 products. It is far below the weights of any trained model, so the second pass is paid by zeros only.
_TINY_MEAN_SQUARE = 1e-24


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


@dataclass
class _Tensor:
    """One tensor under way."""

    step: TensorStep
    inputs: TensorInputs
    pieces: list[Piece]
    skipped: bool = False
    grams: list[NDArray[np.float64] | None] = field(default_factory=list)
    input_digests: list[dict[int, str]] = field(default_factory=list)
    output_digests: list[str] = field(default_factory=list)
    done: bool = False

    def reset(self) -> None:
        self.grams = [None] * len(self.pieces)
        self.input_digests = [{} for _ in self.pieces]
        self.output_digests = [""] * len(self.pieces)

    def inputs_digest(self) -> dict[str, str]:
        owners = self.input_digests[0] if self.input_digests else {}
        return {str(owner): join_digests([piece[owner] for piece in self.input_digests]) for owner in owners}

    def output_digest(self) -> str:
        return join_digests(self.output_digests)


@dataclass
class _Group:
    """Tensors that share one sphere, under way together."""

    name: str
    tensors: list[_Tensor]
    then: Callable[[_Group], None]
    remaining: int = 0
    precise: bool = False
    solution: Solution | None = None
    done: bool = False


class Engine:
    """
    Compute and write the tensors of a plan.

    Args:
        plan: What to do.
        kernels: What computes.
        writer: Where results go; its files exist already.
        journal: Record of finished work; what it holds is checked and kept.
        observer: Told about every tensor.
        share_grams: With several processes and `block="model"`, gathers this process's Gram matrices
            `{tensor: (1, K, K)}` from all of them; by default there is one process.
    """

    def __init__(
        self,
        plan: MergePlan,
        kernels: Kernels,
        writer: CheckpointWriter,
        journal: Journal,
        observer: StepObserver,
        share_grams: Callable[[dict[str, NDArray[np.float64]]], dict[str, NDArray[np.float64]]] | None = None,
    ) -> None:
        self._plan = plan
        self._kernels = kernels
        self._writer = writer
        self._journal = journal
        self._observer = observer
        self._share_grams = share_grams
        self._workers = worker_count(plan)
        self._events: SimpleQueue[_Group | BaseException] = SimpleQueue()
        self._queued = 0
        self._local = threading.local()
        self._pool: ThreadPoolExecutor

    def run(self, steps: Sequence[TensorStep]) -> tuple[list[StepOutcome], bool]:
        """
        Run some steps of the plan to the end.

        Returns:
            Outcomes in the order of `steps`, and whether all of them were done (an observer may stop early).

        Raises:
            MergeError: Whatever went wrong, after all threads have stopped; finished tensors stay in the journal.
        """
        todo = deque(_grouped(steps))
        window: deque[_Group] = deque()
        outcomes: list[StepOutcome] = []
        self._pool = ThreadPoolExecutor(self._workers, thread_name_prefix="frmerge")
        go_on = True
        try:
            while (todo and go_on) or window:
                while todo and go_on and self._queued < 2 * self._workers:
                    window.append(self._admit(*todo.popleft()))
                if not window[0].done:
                    self._handle(self._events.get())
                while window and window[0].done:
                    for tensor in window.popleft().tensors:
                        outcomes.append(self._outcome(tensor))
                        go_on = self._observer.end(outcomes[-1]) and go_on
        finally:
            self._pool.shutdown(wait=True, cancel_futures=True)
        return outcomes, go_on and not todo

    # Scheduling: everything below until the jobs runs on the calling thread.

    def _admit(self, name: str, steps: list[TensorStep]) -> _Group:
        group = _Group(name, [self._open(step) for step in steps], self._solve)
        for tensor in group.tensors:
            tensor.reset()
        if group.tensors[0].step.action == "copy":
            known = steps[0].name in self._journal.written
            self._start(
                group, self._check_piece if known else self._copy_piece, self._checked if known else self._wrote
            )
        elif name in self._journal.solved:
            self._start(group, self._check_piece, self._checked)
        else:
            self._start(group, self._gram_piece, self._solve)
        return group

    def _open(self, step: TensorStep) -> _Tensor:
        skipped = not self._observer.begin(step) and step.action == "merge"
        if skipped:
            step = self._plan.copied(step)
        inputs = self._plan.inputs(step)
        return _Tensor(step, inputs, list(pieces(step.n_blocks, step.block_len)), skipped)

    def _start(
        self, group: _Group, job: Callable[[_Group, _Tensor, int], None], then: Callable[[_Group], None]
    ) -> None:
        """Queue one job per piece of the tensors that are not done; `then` follows when all have ended."""
        group.then = then
        work = [(tensor, index) for tensor in group.tensors if not tensor.done for index in range(len(tensor.pieces))]
        group.remaining = len(work)
        self._queued += len(work)
        for tensor, index in work:
            self._pool.submit(self._guarded, job, group, tensor, index)
        if not work:
            then(group)

    def _handle(self, event: _Group | BaseException) -> None:
        if isinstance(event, BaseException):
            raise event
        self._queued -= 1
        event.remaining -= 1
        if event.remaining == 0:
            event.then(event)

    def _solve(self, group: _Group) -> None:
        grams = {tensor.step.name: _sum_pieces(tensor) for tensor in group.tensors}
        if not group.precise and self._needs_precision(group, grams):
            group.precise = True
            self._start(group, self._gram_piece, self._solve)
            return
        if self._share_grams is not None:
            grams = self._share_grams(grams)
        gram = sum(grams[name] for name in sorted(grams)) if len(grams) > 1 else next(iter(grams.values()))
        step = group.tensors[0].step
        points = points_of(np.asarray(gram), self._plan.space, group.tensors[0].inputs.has_base)
        group.solution = solve(
            points,
            step.weights,
            self._plan.args.method,
            self._plan.span_options,
            tensor=step.name if len(grams) == 1 else (group.name or "the whole model"),
            experts=[expert.spec for expert in self._plan.experts],
        )
        digests = {tensor.step.name: tensor.inputs_digest() for tensor in group.tensors}
        self._journal.record_solved(group.name, group.solution, digests)
        self._start(group, self._combine_piece, self._wrote)

    def _needs_precision(self, group: _Group, grams: dict[str, NDArray[np.float64]]) -> bool:
        return any(
            np.any(grams[tensor.step.name][:, 0, 0] < _TINY_MEAN_SQUARE * max(1, tensor.step.block_len))
            for tensor in group.tensors
            if not tensor.inputs.factored
        )

    def _wrote(self, group: _Group) -> None:
        for tensor in group.tensors:
            if not tensor.done:
                inputs = tensor.inputs_digest() if tensor.step.action == "copy" else None
                self._journal.record_written(tensor.step.name, tensor.output_digest(), inputs)
                tensor.done = True
        group.done = True

    def _checked(self, group: _Group) -> None:
        """Keep what is still good, write again what is not, refuse if an input is not what it was."""
        recorded: dict[str, dict[str, str]] = {}
        if group.name in self._journal.solved:
            group.solution, recorded = self._journal.solved[group.name]
        for tensor in group.tensors:
            name = tensor.step.name
            written = self._journal.written.get(name, {})
            expected = recorded.get(name) or written.get("inputs") or {}
            found = tensor.inputs_digest()
            for owner, value in found.items():
                if expected.get(owner) != value:
                    raise ResumeError(
                        f"Tensor {name!r} of {tensor.inputs.labels[int(owner)]} is not what it was when this merge "
                        "was interrupted. Restore the file, or pass --overwrite to start anew."
                    )
            tensor.done = written.get("output") == tensor.output_digest()
        job = self._copy_piece if group.solution is None else self._combine_piece
        self._start(group, job, self._wrote)

    def _outcome(self, tensor: _Tensor) -> StepOutcome:
        solution = None
        if tensor.step.action == "merge":
            solution = self._journal.solved[tensor.step.group][0]
        action: Literal["merge", "copy", "skip"] = "skip" if tensor.skipped else tensor.step.action
        return StepOutcome(tensor.step, action, solution, tensor.inputs_digest(), tensor.output_digest())

    # Jobs: everything below runs on the pool's threads.

    def _guarded(
        self, job: Callable[[_Group, _Tensor, int], None], group: _Group, tensor: _Tensor, index: int
    ) -> None:
        try:
            job(group, tensor, index)
        except BaseException as error:  # handed to the thread that runs the engine, which raises it
            self._events.put(error)
        else:
            self._events.put(group)

    def _gram_piece(self, group: _Group, tensor: _Tensor, index: int) -> None:
        gram, digests = tensor.inputs.gram(self._kernels, tensor.pieces[index], precise=group.precise)
        tensor.grams[index] = gram
        tensor.input_digests[index] = digests

    def _combine_piece(self, group: _Group, tensor: _Tensor, index: int) -> None:
        assert group.solution is not None
        piece = tensor.pieces[index]
        coefficients = group.solution.coefficients
        if len(coefficients) > 1:
            coefficients = coefficients[piece.first_block : piece.first_block + piece.n_blocks]
        out = self._buffer(tensor.step, piece)
        tensor.inputs.combine(self._kernels, piece, coefficients, self._plan.space, out, tensor.step.dtype)
        self._write(tensor, index, out)
        tensor.inputs.release(piece)

    def _copy_piece(self, group: _Group, tensor: _Tensor, index: int) -> None:
        step, piece = tensor.step, tensor.pieces[index]
        data = tensor.inputs.copy(self._kernels, piece, self._buffer(step, piece), step.dtype)
        tensor.input_digests[index] = tensor.inputs.digests(piece)
        self._write(tensor, index, data)
        tensor.inputs.release(piece)

    def _check_piece(self, group: _Group, tensor: _Tensor, index: int) -> None:
        piece = tensor.pieces[index]
        tensor.input_digests[index] = tensor.inputs.digests(piece)
        if tensor.step.name in self._journal.written:
            start, stop = _byte_range(tensor.step, piece)
            tensor.output_digests[index] = digest(self._writer.read_back(tensor.step.name, start, stop))
        tensor.inputs.release(piece)

    def _write(self, tensor: _Tensor, index: int, data: NDArray[np.uint8]) -> None:
        self._writer.write(tensor.step.name, _byte_range(tensor.step, tensor.pieces[index])[0], data)
        tensor.output_digests[index] = digest(data)

    def _buffer(self, step: TensorStep, piece: Piece) -> NDArray[np.uint8]:
        """Return this thread's output buffer, cut to the piece. Fresh memory is slow, so it is kept."""
        start, stop = _byte_range(step, piece)
        held: NDArray[np.uint8] | None = self._local.__dict__.get("buffer")
        if held is None or held.size < stop - start:
            held = self._local.buffer = np.empty(max(stop - start, PIECE_ELEMENTS * 4), np.uint8)
        return held[: stop - start]


def worker_count(plan: MergePlan) -> int:
    """
    Return how many threads the memory budget and the machine allow.

    Raises:
        ArgumentError: If the budget is too small for one.
    """
    budget = plan.args.memory_budget_bytes
    affordable = budget // plan.piece_memory
    if affordable < 1:
        raise ArgumentError(
            f"memory_budget is {budget / 2**20:.0f} MiB, but one worker needs {plan.piece_memory / 2**20:.0f} MiB for "
            f"{len(plan.experts)} experts. Raise memory_budget."
        )
    wanted = plan.args.num_workers or min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1)
    return int(min(wanted, affordable))


def _grouped(steps: Sequence[TensorStep]) -> list[tuple[str, list[TensorStep]]]:
    """Gather the steps of each group; copies stand alone."""
    groups: dict[str, list[TensorStep]] = {}
    for step in steps:
        groups.setdefault(step.group if step.action == "merge" else f"copy {step.name}", []).append(step)
    return list(groups.items())


def _sum_pieces(tensor: _Tensor) -> NDArray[np.float64]:
    """Add up the pieces' Gram matrices, always in the same order."""
    first = tensor.grams[0] if tensor.grams else None
    size = first.shape[-1] if first is not None else tensor.inputs.n_experts + tensor.inputs.has_base
    total = np.zeros((tensor.step.n_blocks, size, size))
    for piece, gram in zip(tensor.pieces, tensor.grams):
        assert gram is not None
        total[piece.first_block : piece.first_block + piece.n_blocks] += gram
    return total


def _byte_range(step: TensorStep, piece: Piece) -> tuple[int, int]:
    bits = DTYPE_BITS[step.dtype]
    return piece.start * bits // 8, piece.stop * bits // 8


def summary(outcomes: Sequence[StepOutcome]) -> dict[str, Any]:
    """Return totals over all merged tensors: angles in radians, norm ratios, iterations, residuals."""
    merged = {o.step.group: o.solution.geometry for o in outcomes if o.solution is not None}
    geometry = list(merged.values())
    counts = {action: sum(o.action == action for o in outcomes) for action in ("merge", "copy", "skip")}
    totals: dict[str, Any] = {"n_merged": counts["merge"], "n_copied": counts["copy"], "n_skipped": counts["skip"]}
    if not geometry:
        return totals
    angles = [g.max_angle for g in geometry]
    ratios = [g.norm_ratio for g in geometry]
    linear = [g.linear_norm_ratio for g in geometry]
    gaps = [g.gap_to_nre for g in geometry]
    return totals | {
        "max_angle": {"min": min(angles), "median": float(np.median(angles)), "max": max(angles)},
        "norm_ratio": {"min": min(ratios), "median": float(np.median(ratios))},
        "linear_norm_ratio": {"min": min(linear), "median": float(np.median(linear))},
        "gap_to_nre": {"median": float(np.median(gaps)), "max": max(gaps)},
        "n_iter": max(g.n_iter for g in geometry),
        "residual": max(g.residual for g in geometry),
        "n_not_converged": sum(not g.converged for g in geometry),
        "n_ambiguous": sum(g.n_ambiguous for g in geometry),
    }
