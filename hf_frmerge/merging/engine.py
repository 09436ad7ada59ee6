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
from dataclasses import dataclass, field
from itertools import count
from queue import PriorityQueue, SimpleQueue
from typing import TYPE_CHECKING, Literal

import numpy as np

from hf_frmerge.checkpoints.reader import DTYPE_BITS
from hf_frmerge.errors import ArgumentError, ResumeError
from hf_frmerge.kernels import digest
from hf_frmerge.merging.blocks import PIECE_ELEMENTS, pieces
from hf_frmerge.merging.operands import Piece, join_digests
from hf_frmerge.merging.outcomes import StepObserver, StepOutcome
from hf_frmerge.merging.solve import points_of, solve

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from hf_frmerge.checkpoints.writer import CheckpointWriter
    from hf_frmerge.kernels import Kernels
    from hf_frmerge.merging.journal import Journal
    from hf_frmerge.merging.operands import TensorInputs
    from hf_frmerge.merging.plan import MergePlan, TensorStep
    from hf_frmerge.merging.solve import Solution

logger = logging.getLogger(__name__)

# Below this mean square, float32 products of the first operand start to vanish; the Gram pass is then done again
# with float64 products. It is far below the weights of any trained model, so the second pass is paid by zeros only.
_TINY_MEAN_SQUARE = 1e-24

_AHEAD = 4
"""Jobs a worker finds queued, at least: the calling thread needs the interpreter lock to queue more."""

_STOP, _SOON, _LATER = range(3)
"""Urgency of a job; to stop comes before everything that is queued."""


_Gram = tuple["NDArray[np.float64]", dict[str, str]]
_Job = Callable[["_Group", "_Tensor", int], None]


@dataclass
class _Tensor:
    """One tensor under way."""

    step: TensorStep
    inputs: TensorInputs
    pieces: list[Piece]
    skipped: bool = False
    precise: bool = False
    input_digests: list[dict[int, str]] = field(default_factory=list)
    output_digests: list[str] = field(default_factory=list)
    done: bool = False

    def __post_init__(self) -> None:
        # Of blocks, or of parts of blocks. One array: small ones that outlive the buffers allocated beside them would
        # leave holes of that size, 20 kB a piece.
        size = self.inputs.n_experts + self.inputs.has_base
        self.grams: NDArray[np.float64] = np.zeros((max(self.step.n_blocks, len(self.pieces)), size, size))
        self.input_digests = [{} for _ in self.pieces]
        self.output_digests = [""] * len(self.pieces)

    @property
    def is_cut(self) -> bool:
        """Whether the pieces are parts of blocks, not runs of them."""
        return len(self.pieces) > self.step.n_blocks

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
    is_large: bool = False
    remaining: int = 0
    solution: Solution | None = None


class Engine:
    """
    Compute and write the tensors of a plan.

    Args:
        plan: What to do.
        kernels: What computes.
        writer: Where results go; its files exist already.
        journal: Record of finished work; what it holds is checked and kept.
        observer: Told about every tensor.
        share_grams: With several processes and `block="model"`, gathers from all of them what each holds:
            `{tensor: (its Gram matrix, (1, K, K), and the digests of its inputs)}`. Every process calls it once. By
            default there is one process.
    """

    def __init__(
        self,
        plan: MergePlan,
        kernels: Kernels,
        writer: CheckpointWriter,
        journal: Journal,
        observer: StepObserver,
        share_grams: Callable[[dict[str, _Gram]], dict[str, _Gram]] | None = None,
    ) -> None:
        self._plan = plan
        self._kernels = kernels
        self._writer = writer
        self._journal = journal
        self._observer = observer
        self._share_grams = share_grams
        self._workers = worker_count(plan)
        self._budget = plan.args.memory_budget_bytes
        # Groups to go on with on the calling thread, errors, and None to have it look again.
        self._events: SimpleQueue[_Group | BaseException | None] = SimpleQueue()
        self._lock = threading.Lock()
        # By urgency, then by age.
        self._jobs: PriorityQueue[tuple[int, int, tuple[_Job, _Group, _Tensor, int] | None]] = PriorityQueue()
        self._age = count()
        self._queued = 0
        self._local = threading.local()

    def run(self, steps: Sequence[TensorStep]) -> tuple[list[StepOutcome], bool]:
        """
        Run some steps of the plan to the end.

        Returns:
            Outcomes in the order of `steps`, and whether all of them were done (an observer may stop early).

        Raises:
            MergeError: Whatever went wrong, after all threads have stopped; finished tensors stay in the journal.
        """
        todo = deque(_grouped(steps))
        window: deque[_Tensor] = deque()
        outcomes: list[StepOutcome] = []
        threads = [threading.Thread(target=self._work, name=f"frmerge-{i}", daemon=True) for i in range(self._workers)]
        for thread in threads:
            thread.start()
        go_on = True
        try:
            while (todo and go_on) or window:
                while todo and go_on and self._queued < _AHEAD * self._workers:
                    window.extend(self._admit(todo.popleft()))
                if not window[0].done:
                    self._handle(self._events.get())
                while window and window[0].done:
                    outcomes.append(self._outcome(window.popleft()))
                    go_on = self._observer.end(outcomes[-1]) and go_on
        finally:
            for _ in threads:
                self._jobs.put((_STOP, next(self._age), None))
            for thread in threads:
                thread.join()
        if self._share_grams is not None and "" not in self._journal.solved:
            self._share_grams({})  # nothing to merge here: the others wait for this process all the same
        return outcomes, go_on and not todo

    # Scheduling: everything below until the jobs runs on the calling thread.

    def _admit(self, steps: list[TensorStep]) -> list[_Tensor]:
        """Start on a group; tensors of it that are skipped go their own way."""
        opened = [self._open(step) for step in steps]
        kept = [tensor for tensor in opened if not tensor.skipped]
        for tensors in [[tensor] for tensor in opened if tensor.skipped] + ([kept] if kept else []):
            if tensors[0].step.action == "copy":
                group = _Group("", tensors, self._wrote)
                known = self._journal.written.get(tensors[0].step.name, {}).get("inputs")
                self._start(
                    group, self._check_piece if known else self._copy_piece, self._checked if known else self._wrote
                )
                continue
            group = _Group(tensors[0].step.group, tensors, self._solve)
            nbytes = sum(tensor.step.nbytes for tensor in tensors) * len(self._plan.models)
            group.is_large = nbytes > self._budget
            _, recorded = self._journal.solved.get(group.name, (None, {}))
            if all(tensor.step.name in recorded for tensor in tensors):
                self._start(group, self._check_piece, self._checked)
            else:
                self._start(group, self._gram_piece, self._solve)
        return opened

    def _open(self, step: TensorStep) -> _Tensor:
        skipped = not self._observer.begin(step) and step.action == "merge"
        if skipped:
            step = self._plan.copied(step)
        inputs = self._plan.inputs(step)
        return _Tensor(step, inputs, list(pieces(step.n_blocks, step.block_len)), skipped)

    def _start(
        self, group: _Group, job: _Job, then: Callable[[_Group], None], only: list[_Tensor] | None = None
    ) -> None:
        """Queue one job per piece of the tensors not yet done, or of `only`; `then` follows when all have ended."""
        group.then = then
        tensors = [tensor for tensor in group.tensors if not tensor.done] if only is None else only
        work = [(job, group, tensor, index) for tensor in tensors for index in range(len(tensor.pieces))]
        group.remaining = len(work)
        with self._lock:
            self._queued += len(work)
        # What the first pass read may still be in the cache.
        urgency = _SOON if job == self._combine_piece else _LATER
        for item in work:
            self._jobs.put((urgency, next(self._age), item))
        if not work:
            then(group)

    def _handle(self, event: _Group | BaseException | None) -> None:
        if isinstance(event, BaseException):
            raise event
        if event is not None:
            event.then(event)

    def _solve(self, group: _Group) -> None:
        grams = {tensor.step.name: _sum_pieces(tensor) for tensor in group.tensors}
        rough = [t for t in group.tensors if not t.precise and _needs_precision(t, grams[t.step.name])]
        if rough:
            for tensor in rough:
                tensor.precise = True
            self._start(group, self._gram_piece, self._solve, rough)
            return
        found = {tensor.step.name: (grams[tensor.step.name], tensor.inputs_digest()) for tensor in group.tensors}
        if self._share_grams is not None:
            found = self._share_grams(found)
        names = sorted(found)
        gram = sum((found[name][0] for name in names[1:]), start=found[names[0]][0])
        step = group.tensors[0].step
        points = points_of(gram, self._plan.space, group.tensors[0].inputs.has_base)
        group.solution = solve(
            points,
            step.weights,
            self._plan.args.method,
            self._plan.span_options,
            tensor=step.name if len(found) == 1 else (group.name or "the whole model"),
            experts=[expert.spec for expert in self._plan.experts],
        )
        self._journal.record_solved(group.name, group.solution, {name: found[name][1] for name in names})
        self._start(group, self._combine_piece, self._wrote)

    def _wrote(self, group: _Group) -> None:
        for tensor in group.tensors:
            if not tensor.done:
                inputs = tensor.inputs_digest() if tensor.step.action == "copy" else None
                self._journal.record_written(tensor.step.name, tensor.output_digest(), inputs)
                # As a whole: faulting in a piece maps some pages around it, of pieces that were released before.
                tensor.inputs.release(Piece(0, tensor.step.numel, 0, tensor.step.n_blocks))
                tensor.done = True

    def _checked(self, group: _Group) -> None:
        """Keep what is still good, write again what is not, refuse if an input is not what it was."""
        recorded: dict[str, dict[str, str]] = {}
        if group.tensors[0].step.action == "merge":
            group.solution, recorded = self._journal.solved[group.name]
        for tensor in group.tensors:
            name = tensor.step.name
            written = self._journal.written.get(name, {})
            expected = recorded[name] if group.solution else written["inputs"]
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

    # Jobs: everything below runs on the engine's threads.

    def _work(self) -> None:
        while (item := self._jobs.get()[2]) is not None:
            job, group, tensor, index = item
            try:
                job(group, tensor, index)
                self._ended(group)
            except BaseException as error:  # handed to the thread that runs the engine, which raises it
                self._events.put(error)

    def _ended(self, group: _Group) -> None:
        with self._lock:
            self._queued -= 1
            group.remaining -= 1
            last, hungry = group.remaining == 0, self._queued < _AHEAD * self._workers
        if last and self._share_grams is not None:
            self._events.put(group)  # processes speak to each other on the calling thread
        elif last:
            group.then(group)
        if last or hungry:
            self._events.put(None)

    def _gram_piece(self, group: _Group, tensor: _Tensor, index: int) -> None:
        piece = tensor.pieces[index]
        gram, digests = tensor.inputs.gram(self._kernels, piece, precise=tensor.precise)
        first = index if tensor.is_cut else piece.first_block
        tensor.grams[first : first + piece.n_blocks] = gram
        tensor.input_digests[index] = digests
        if group.is_large:  # else its pages stay mapped until it is written, which is faster
            tensor.inputs.release(piece)

    def _combine_piece(self, group: _Group, tensor: _Tensor, index: int) -> None:
        assert group.solution is not None
        piece = tensor.pieces[index]
        out = self._buffer(tensor.step, piece)
        tensor.output_digests[index] = tensor.inputs.combine(
            self._kernels, piece, group.solution.coefficients, out, tensor.step.dtype
        )
        self._write(tensor, piece, out)
        if group.is_large:
            tensor.inputs.release(piece)

    def _copy_piece(self, group: _Group, tensor: _Tensor, index: int) -> None:
        step, piece = tensor.step, tensor.pieces[index]
        out = self._buffer(step, piece)
        data, tensor.output_digests[index] = tensor.inputs.copy(self._kernels, piece, out, step.dtype)
        tensor.input_digests[index] = tensor.inputs.digests(piece)
        self._write(tensor, piece, data)
        tensor.inputs.release(piece)

    def _check_piece(self, group: _Group, tensor: _Tensor, index: int) -> None:
        piece = tensor.pieces[index]
        tensor.input_digests[index] = tensor.inputs.digests(piece)
        if tensor.step.name in self._journal.written:
            start, stop = _byte_range(tensor.step, piece)
            tensor.output_digests[index] = digest(self._writer.read_back(tensor.step.name, start, stop))
        tensor.inputs.release(piece)

    def _write(self, tensor: _Tensor, piece: Piece, data: NDArray[np.uint8]) -> None:
        self._writer.write(tensor.step.name, _byte_range(tensor.step, piece)[0], data)

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


def _grouped(steps: Sequence[TensorStep]) -> list[list[TensorStep]]:
    """Gather the steps of each group; copies stand alone."""
    groups: dict[str, list[TensorStep]] = {}
    for step in steps:
        groups.setdefault(step.group if step.action == "merge" else f"copy {step.name}", []).append(step)
    return list(groups.values())


def _needs_precision(tensor: _Tensor, gram: NDArray[np.float64]) -> bool:
    tiny = _TINY_MEAN_SQUARE * max(1, tensor.step.block_len)
    return not tensor.inputs.factored and bool(np.any(gram[:, 0, 0] < tiny))


def _sum_pieces(tensor: _Tensor) -> NDArray[np.float64]:
    """Add up the Gram matrices of the parts of each block, always in the same order."""
    if not tensor.is_cut:
        return tensor.grams
    total = np.zeros((tensor.step.n_blocks, *tensor.grams.shape[1:]))
    for piece, gram in zip(tensor.pieces, tensor.grams):
        total[piece.first_block] += gram
    return total


def _byte_range(step: TensorStep, piece: Piece) -> tuple[int, int]:
    bits = DTYPE_BITS[step.dtype]
    return piece.start * bits // 8, piece.stop * bits // 8
