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
from itertools import count
from queue import PriorityQueue, SimpleQueue
from typing import TYPE_CHECKING, Literal

import numpy as np

from hf_frmerge.errors import ArgumentError, ResumeError
from hf_frmerge.kernels import digest
from hf_frmerge.merging.engine.inputs import Piece
from hf_frmerge.merging.engine.outcomes import StepObserver, StepOutcome
from hf_frmerge.merging.engine.solve import points_of, solve
from hf_frmerge.merging.engine.tensor_work import BatchWork, TensorGram, TensorWork, sum_grams
from hf_frmerge.merging.planning.blocks import PIECE_ELEMENTS, pieces

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from hf_frmerge.checkpoints.tensors.writer import CheckpointWriter
    from hf_frmerge.kernels import Kernels
    from hf_frmerge.merging.engine.journal import Journal
    from hf_frmerge.merging.planning.plan import MergePlan, TensorStep

logger = logging.getLogger(__name__)

_AHEAD = 4
"""Jobs a worker finds queued, at least: the calling thread needs the interpreter lock to queue more."""

_STOP, _SOON, _LATER = range(3)
"""Urgency of a job; to stop comes before everything that is queued."""


_Job = Callable[[BatchWork, TensorWork, int], None]


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
            `{tensor: its Gram matrix}`. Every process calls it once. By default there is one process.
    """

    def __init__(
        self,
        plan: MergePlan,
        kernels: Kernels,
        writer: CheckpointWriter,
        journal: Journal,
        observer: StepObserver,
        share_grams: Callable[[dict[str, TensorGram]], dict[str, TensorGram]] | None = None,
    ) -> None:
        self._plan = plan
        self._kernels = kernels
        self._writer = writer
        self._journal = journal
        self._observer = observer
        self._share_grams = share_grams
        self._workers = worker_count(plan)
        self._budget = plan.args.memory_budget_bytes
        # Batches to go on with on the calling thread, errors, and None to have it look again.
        self._events: SimpleQueue[BatchWork | BaseException | None] = SimpleQueue()
        self._lock = threading.Lock()
        # By urgency, then by age.
        self._jobs: PriorityQueue[tuple[int, int, tuple[_Job, BatchWork, TensorWork, int] | None]] = PriorityQueue()
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
        todo = deque(_in_batches(steps))
        window: deque[TensorWork] = deque()
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

    # Scheduling. Batches are admitted and observers told on the calling thread; what follows a pass runs on the thread
    # that ended it.

    def _admit(self, steps: list[TensorStep]) -> list[TensorWork]:
        """Start on a batch; tensors of it that are skipped go their own way."""
        opened = [self._open(step) for step in steps]
        kept = [tensor for tensor in opened if not tensor.skipped]
        for tensors in [[tensor] for tensor in opened if tensor.skipped] + ([kept] if kept else []):
            if tensors[0].step.action == "copy":
                known = self._journal.written.get(tensors[0].step.name, {}).get("inputs")
                job, then = (self._check_piece, self._checked) if known else (self._copy_piece, self._wrote)
                self._start(BatchWork(tensors), job, then)
                continue
            nbytes = sum(tensor.step.nbytes for tensor in tensors) * len(self._plan.models)
            batch = BatchWork(tensors, is_large=nbytes > self._budget)
            if all(tensor.step.name in self._recorded(tensor) for tensor in tensors):
                self._start(batch, self._check_piece, self._checked)
            else:
                self._start(batch, self._gram_piece, self._solve)
        return opened

    def _recorded(self, tensor: TensorWork) -> dict[str, dict[str, str]]:
        """Digests of the inputs its sphere was solved from, if it was."""
        return self._journal.solved[tensor.step.group][1] if tensor.step.group in self._journal.solved else {}

    def _open(self, step: TensorStep) -> TensorWork:
        skipped = not self._observer.begin(step) and step.action == "merge"
        if skipped:
            step = self._plan.copied(step)
        inputs = self._plan.inputs(step)
        return TensorWork(step, inputs, list(pieces(step.n_blocks, step.block_len)), skipped)

    def _start(
        self, batch: BatchWork, job: _Job, then: Callable[[BatchWork], None], only: list[TensorWork] | None = None
    ) -> None:
        """Queue one job per piece of the tensors not yet done, or of `only`; `then` follows when all have ended."""
        batch.then = then
        tensors = [tensor for tensor in batch.tensors if not tensor.done] if only is None else only
        work = [(job, batch, tensor, index) for tensor in tensors for index in range(len(tensor.pieces))]
        batch.remaining = len(work)
        with self._lock:
            self._queued += len(work)
        # What the first pass read may still be in the cache.
        urgency = _SOON if job == self._combine_piece else _LATER
        for item in work:
            self._jobs.put((urgency, next(self._age), item))
        if not work:
            then(batch)

    def _handle(self, event: BatchWork | BaseException | None) -> None:
        if isinstance(event, BaseException):
            raise event
        if event is not None:
            event.then(event)

    def _check_files(self, batch: BatchWork) -> None:
        """Refuse files that changed since they were opened: nothing that may come of two models is recorded."""
        files = {file for tensor in batch.tensors for file in tensor.inputs.files}
        for checkpoint, file in files:
            checkpoint.check_unchanged([file])

    def _solve(self, batch: BatchWork) -> None:
        self._check_files(batch)
        spheres = batch.spheres()
        rough = [t for t in batch.tensors if t.needs_precision(spheres[t.step.group][t.step.name].gram)]
        if rough:
            for tensor in rough:
                tensor.precise = True
            self._start(batch, self._gram_piece, self._solve, rough)
            return
        if self._share_grams is not None:
            spheres = {group: self._share_grams(found) for group, found in spheres.items()}
        weights = {tensor.step.group: tensor.step.weights for tensor in batch.tensors}
        grams = np.stack([sum_grams(found) for found in spheres.values()])
        solutions = solve(
            points_of(grams, self._plan.space, batch.tensors[0].inputs.has_base),
            [weights[group] for group in spheres],
            self._plan.args.method,
            self._plan.span_options,
            tensors=[
                next(iter(found)) if len(found) == 1 else group or "the whole model"
                for group, found in spheres.items()
            ],
            experts=[expert.spec for expert in self._plan.experts],
        )
        self._journal.record_solved(
            {
                group: (solution, {name: found[name].inputs for name in sorted(found)})
                for (group, found), solution in zip(spheres.items(), solutions)
            }
        )
        self._set_solutions(batch)
        self._start(batch, self._combine_piece, self._wrote)

    def _set_solutions(self, batch: BatchWork) -> None:
        for tensor in batch.tensors:
            if tensor.step.action == "merge":
                tensor.solution = self._journal.solved[tensor.step.group][0]

    def _wrote(self, batch: BatchWork) -> None:
        self._check_files(batch)
        for tensor in batch.tensors:
            if not tensor.done:
                inputs = tensor.inputs_digest() if tensor.step.action == "copy" else None
                self._journal.record_written(tensor.step.name, tensor.output_digest(), inputs)
                # As a whole: faulting in a piece maps some pages around it, of pieces that were released before.
                tensor.inputs.release(Piece(0, tensor.step.numel, 0, tensor.step.n_blocks))
                tensor.done = True

    def _checked(self, batch: BatchWork) -> None:
        """Keep what is still good, write again what is not, refuse if an input is not what it was."""
        self._set_solutions(batch)
        for tensor in batch.tensors:
            name = tensor.step.name
            written = self._journal.written.get(name, {})
            expected = self._recorded(tensor)[name] if tensor.solution else written["inputs"]
            found = tensor.inputs_digest()
            for owner, value in found.items():
                if expected.get(owner) != value:
                    raise ResumeError(
                        f"Tensor {name!r} of {tensor.inputs.labels[int(owner)]} is not what it was when this merge "
                        "was interrupted. Restore the file, or pass --overwrite to start anew."
                    )
            tensor.done = written.get("output") == tensor.output_digest()
        job = self._copy_piece if batch.tensors[0].solution is None else self._combine_piece
        self._start(batch, job, self._wrote)

    def _outcome(self, tensor: TensorWork) -> StepOutcome:
        action: Literal["merge", "copy", "skip"] = "skip" if tensor.skipped else tensor.step.action
        return StepOutcome(tensor.step, action, tensor.solution, tensor.inputs_digest(), tensor.output_digest())

    # Jobs: everything below runs on the engine's threads.

    def _work(self) -> None:
        while (item := self._jobs.get()[2]) is not None:
            job, batch, tensor, index = item
            try:
                job(batch, tensor, index)
                self._ended(batch)
            except BaseException as error:  # handed to the thread that runs the engine, which raises it
                self._events.put(error)

    def _ended(self, batch: BatchWork) -> None:
        with self._lock:
            self._queued -= 1
            batch.remaining -= 1
            last, hungry = batch.remaining == 0, self._queued < _AHEAD * self._workers
        if last and self._share_grams is not None:
            self._events.put(batch)  # processes speak to each other on the calling thread
        elif last:
            batch.then(batch)
        if last or hungry:
            self._events.put(None)

    def _gram_piece(self, batch: BatchWork, tensor: TensorWork, index: int) -> None:
        piece = tensor.pieces[index]
        gram, digests = tensor.inputs.gram(self._kernels, piece, precise=tensor.precise)
        first = index if tensor.is_cut else piece.first_block
        tensor.grams[first : first + piece.n_blocks] = gram
        tensor.input_digests[index] = digests
        if batch.is_large:  # else its pages stay mapped until it is written, which is faster
            tensor.inputs.release(piece)

    def _combine_piece(self, batch: BatchWork, tensor: TensorWork, index: int) -> None:
        assert tensor.solution is not None
        piece = tensor.pieces[index]
        out = self._buffer(tensor, piece)
        tensor.output_digests[index] = tensor.inputs.combine(
            self._kernels, piece, tensor.solution.coefficients, out, tensor.step.dtype
        )
        self._write(tensor, piece, out)
        if batch.is_large:
            tensor.inputs.release(piece)

    def _copy_piece(self, batch: BatchWork, tensor: TensorWork, index: int) -> None:
        step, piece = tensor.step, tensor.pieces[index]
        out = self._buffer(tensor, piece)
        data, tensor.output_digests[index] = tensor.inputs.copy(self._kernels, piece, out, step.dtype)
        tensor.input_digests[index] = tensor.inputs.digests(piece)
        self._write(tensor, piece, data)
        tensor.inputs.release(piece)

    def _check_piece(self, batch: BatchWork, tensor: TensorWork, index: int) -> None:
        piece = tensor.pieces[index]
        tensor.input_digests[index] = tensor.inputs.digests(piece)
        if tensor.step.name in self._journal.written:
            start, stop = tensor.byte_range(piece)
            tensor.output_digests[index] = digest(self._writer.read_back(tensor.step.name, start, stop))
        tensor.inputs.release(piece)

    def _write(self, tensor: TensorWork, piece: Piece, data: NDArray[np.uint8]) -> None:
        self._writer.write(tensor.step.name, tensor.byte_range(piece)[0], data)

    def _buffer(self, tensor: TensorWork, piece: Piece) -> NDArray[np.uint8]:
        """Return this thread's output buffer, cut to the piece. Fresh memory is slow, so it is kept."""
        start, stop = tensor.byte_range(piece)
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


def _in_batches(steps: Sequence[TensorStep]) -> list[list[TensorStep]]:
    """Gather the steps of each batch; copies stand alone."""
    batches: dict[str, list[TensorStep]] = {}
    for step in steps:
        batches.setdefault(step.batch if step.action == "merge" else f"copy {step.name}", []).append(step)
    return list(batches.values())
