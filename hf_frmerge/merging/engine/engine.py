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

from hf_frmerge.errors import ArgumentError, ResumeError
from hf_frmerge.merging.engine.batches import in_batches
from hf_frmerge.merging.engine.outcomes import FactorDetails, StepObserver, StepOutcome
from hf_frmerge.merging.engine.rules import rule_for
from hf_frmerge.merging.engine.tensor_work import BatchWork, TensorWork
from hf_frmerge.merging.operands.open_inputs import open_inputs
from hf_frmerge.merging.planning.blocks import Piece, pieces

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hf_frmerge.kernels.interface import Kernels
    from hf_frmerge.merging.decisions import Decided
    from hf_frmerge.merging.engine.journal import Journal
    from hf_frmerge.merging.engine.output import Output
    from hf_frmerge.merging.engine.rules import Gather
    from hf_frmerge.merging.planning.plan import MergePlan
    from hf_frmerge.merging.planning.tensor_step import TensorStep

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
        output: Where results go.
        journal: Record of finished work; what it holds is checked and kept.
        observer: Told about every tensor.
        gather: With several processes and `block="model"`, which decide together, returns what each of them passes.
            By default a process decides alone.
    """

    def __init__(
        self,
        plan: MergePlan,
        kernels: Kernels,
        output: Output,
        journal: Journal,
        observer: StepObserver,
        gather: Gather | None = None,
    ) -> None:
        self._plan = plan
        self._kernels = kernels
        self._output = output
        self._rule = rule_for(plan, gather)
        self._decides_together = gather is not None
        self._journal = journal
        self._observer = observer
        self._workers = worker_count(plan)
        self._budget = plan.args.memory_budget_bytes
        # Batches to go on with on the calling thread, errors, and None to have it look again.
        self._events: SimpleQueue[BatchWork | BaseException | None] = SimpleQueue()
        self._lock = threading.Lock()
        # By urgency, then by age.
        self._jobs: PriorityQueue[tuple[int, int, tuple[_Job, BatchWork, TensorWork, int] | None]] = PriorityQueue()
        self._age = count()
        self._queued = 0

    def run(self, steps: Sequence[TensorStep]) -> tuple[list[StepOutcome], bool]:
        """
        Run some steps of the plan to the end.

        Returns:
            Outcomes in the order of `steps`, and whether all of them were done (an observer may stop early).

        Raises:
            MergeError: Whatever went wrong, after all threads have stopped; finished tensors stay in the journal.
        """
        todo = deque(self._batches(steps))
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
                    if not go_on and self._plan.layout is None:
                        return outcomes, False  # all of an adapter is under way: to finish that is no stop
        finally:
            for _ in threads:
                self._jobs.put((_STOP, next(self._age), None))
            for thread in threads:
                thread.join()
        if self._decides_together and "" not in self._journal.decided:
            self._rule.join()  # nothing to merge here: the others wait for this process all the same
        return outcomes, go_on and not todo

    # Scheduling. Batches are admitted and observers told on the calling thread; what follows a pass runs on the thread
    # that ended it.

    def _batches(self, steps: Sequence[TensorStep]) -> list[list[TensorStep]]:
        """Gather steps into batches. The file of an adapter is laid out when all modules are decided: one batch."""
        if self._plan.layout is None:
            return [list(steps)] if steps else []
        return in_batches(steps, len(self._plan.models))

    def _admit(self, steps: list[TensorStep]) -> list[TensorWork]:
        """Start on a batch; tensors of it that are skipped go their own way."""
        opened = [self._open(step) for step in steps]
        for tensor in opened:
            if tensor.step.action == "copy":
                known = self._journal.written.get(tensor.step.name)
                job, then = (self._copy_piece, self._wrote) if known is None else (self._check_piece, self._checked)
                self._start(BatchWork([tensor]), job, then)
        merged = [tensor for tensor in opened if tensor.step.action == "merge"]
        if merged:
            nbytes = sum(tensor.step.nbytes for tensor in merged) * len(self._plan.models)
            self._admit_merged(BatchWork(merged, is_large=nbytes > self._budget))
        return opened

    def _admit_merged(self, batch: BatchWork) -> None:
        if self._rule.rounds == 0:
            self._take(batch, self._rule.decide(batch.tensors))
            begun = all(tensor.step.name in self._journal.written for tensor in batch.tensors)
            job, then = (self._check_piece, self._checked) if begun else (self._merge_piece, self._wrote)
            self._start(batch, job, then)
        elif all(tensor.step.name in self._decided_inputs(tensor) for tensor in batch.tensors):
            self._take(batch, self._journal.decided)
            self._start(batch, self._check_piece, self._checked)
        else:
            self._start(batch, self._measure_piece, self._decide)

    def _decided_inputs(self, tensor: TensorWork) -> dict[str, dict[str, str]]:
        """Digests of the inputs its group was decided from, by tensor, if it was."""
        decided = self._journal.decided.get(tensor.step.group)
        return decided.inputs if decided is not None else {}

    def _take(self, batch: BatchWork, decided: dict[str, Decided]) -> None:
        for tensor in batch.tensors:
            tensor.decision = decided[tensor.step.group].decision
        self._output.lay_out(batch.tensors)

    def _open(self, step: TensorStep) -> TensorWork:
        skipped = not self._observer.begin(step) and step.action == "merge"
        if skipped and self._plan.layout is None:
            raise ArgumentError(f"{step.name!r} cannot be skipped in an adapter. Use adapter_output='merged'.")
        if skipped:
            step = self._plan.copied(step)
        # Factors are read whole.
        whole = [Piece(0, step.numel, 0, step.n_blocks)]
        cut = whole if self._plan.layout is None else list(pieces(step.n_blocks, step.block_len))
        return TensorWork(step, open_inputs(self._plan, step), cut, skipped)

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
        urgency = _SOON if job == self._merge_piece else _LATER
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

    def _decide(self, batch: BatchWork) -> None:
        self._check_files(batch)
        again = self._rule.unfinished(batch.tensors)
        if again:
            self._start(batch, self._measure_piece, self._decide, again)
            return
        decided = self._rule.decide(batch.tensors)
        self._journal.record_decided(decided)
        self._take(batch, decided)
        self._start(batch, self._merge_piece, self._wrote)

    def _wrote(self, batch: BatchWork) -> None:
        self._check_files(batch)
        for tensor in batch.tensors:
            if not tensor.done:
                name = tensor.step.name
                inputs = None if tensor.step.name in self._decided_inputs(tensor) else tensor.inputs_digest()
                tensor.details = self._output.details(name)
                self._journal.record_written(name, tensor.output_digest(), inputs, tensor.details)
                # As a whole: faulting in a piece maps some pages around it, of pieces that were released before.
                tensor.inputs.release(Piece(0, tensor.step.numel, 0, tensor.step.n_blocks))
                tensor.done = True

    def _checked(self, batch: BatchWork) -> None:
        """Keep what is still good, write again what is not, refuse if an input is not what it was."""
        for tensor in batch.tensors:
            name = tensor.step.name
            written = self._journal.written.get(name, {})
            expected = self._decided_inputs(tensor).get(name) or written["inputs"]
            for owner, value in tensor.inputs_digest().items():
                if expected.get(owner) != value:
                    raise ResumeError(
                        f"Tensor {name!r} of {tensor.inputs.labels[int(owner)]} is not what it was when this merge "
                        "was interrupted. Restore the file, or pass --overwrite to start anew."
                    )
            tensor.done = written.get("output") == tensor.output_digest()
            details = written.get("details")
            tensor.details = FactorDetails(**details) if details is not None else None
        job = self._copy_piece if batch.tensors[0].step.action == "copy" else self._merge_piece
        self._start(batch, job, self._wrote)

    def _outcome(self, tensor: TensorWork) -> StepOutcome:
        action: Literal["merge", "copy", "skip"] = "skip" if tensor.skipped else tensor.step.action
        return StepOutcome(
            tensor.step, action, tensor.decision, tensor.inputs_digest(), tensor.output_digest(), tensor.details
        )

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
        if last and self._decides_together:
            self._events.put(batch)  # processes speak to each other on the calling thread
        elif last:
            batch.then(batch)
        if last or hungry:
            self._events.put(None)

    def _measure_piece(self, batch: BatchWork, tensor: TensorWork, index: int) -> None:
        self._rule.measure(self._kernels, tensor, index)
        if batch.is_large:  # else its pages stay mapped until it is written, which is faster
            tensor.inputs.release(tensor.pieces[index])

    def _merge_piece(self, batch: BatchWork, tensor: TensorWork, index: int) -> None:
        piece = tensor.pieces[index]
        tensor.output_digests[index] = self._output.merge(self._kernels, tensor, piece)
        if not tensor.input_digests[index]:  # nothing was measured: now its pages are in memory
            tensor.input_digests[index] = tensor.inputs.digests(piece)
        if batch.is_large:
            tensor.inputs.release(piece)

    def _copy_piece(self, batch: BatchWork, tensor: TensorWork, index: int) -> None:
        piece = tensor.pieces[index]
        tensor.output_digests[index] = self._output.copy(self._kernels, tensor, piece)
        tensor.input_digests[index] = tensor.inputs.digests(piece)
        tensor.inputs.release(piece)

    def _check_piece(self, batch: BatchWork, tensor: TensorWork, index: int) -> None:
        piece = tensor.pieces[index]
        tensor.input_digests[index] = tensor.inputs.digests(piece)
        if tensor.step.name in self._journal.written:
            tensor.output_digests[index] = self._output.read_back(tensor, piece)
        tensor.inputs.release(piece)


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
