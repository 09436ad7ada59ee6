"""
Run a plan: Gram pass, coefficients, combine pass, piece by piece, on plain threads.

This is the only module that deals with threads, memory budgets and resume. Pieces of several tensors are processed at
the same time; the results never depend on which thread computed a piece, or when.
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

from hf_frmerge.errors import ArgumentError, NonFiniteError, ResumeError
from hf_frmerge.merging.engine.batches import in_batches
from hf_frmerge.merging.engine.outcomes import FactorDetails, StepObserver, StepOutcome
from hf_frmerge.merging.engine.rules import rule_for
from hf_frmerge.merging.engine.tensor_stack import TensorStack, stacked
from hf_frmerge.merging.engine.tensor_work import BatchWork, TensorWork
from hf_frmerge.merging.operands.open_inputs import open_inputs
from hf_frmerge.merging.planning.blocks import Piece, pieces_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hf_frmerge.kernels.interface import Kernels
    from hf_frmerge.merging.decisions import Decided
    from hf_frmerge.merging.engine.gather import Gather
    from hf_frmerge.merging.engine.journal import Journal, NoJournal
    from hf_frmerge.merging.engine.output import TensorOutput
    from hf_frmerge.merging.engine.rules import Rule
    from hf_frmerge.merging.planning.plan import MergePlan
    from hf_frmerge.merging.planning.tensor_step import TensorStep

logger = logging.getLogger(__name__)

_AHEAD = 4
"""Jobs to keep queued per worker: the calling thread may have to wait for the interpreter lock to queue more."""

_STOP, _SOON, _LATER = range(3)
"""Urgency of a job. Stopping comes before all queued jobs."""


_Job = Callable[[BatchWork, TensorWork, int], None]


class Engine:
    """
    Compute and write the tensors of a plan.

    Args:
        plan: Plan of the merge.
        kernels: Kernels of the Gram and the combine pass.
        output: Output that results are written to.
        journal: Record of finished work; results of an earlier run are checked and kept.
        observer: Notified of every tensor.
        gather: Exchange between processes that decide together (`block="model"`): returns what all of them pass. By
            default the process decides by itself.
        rule: Measures and decides; by default the rule of the plan's method.
    """

    def __init__(
        self,
        plan: MergePlan,
        kernels: Kernels,
        output: TensorOutput,
        journal: Journal | NoJournal,
        observer: StepObserver,
        gather: Gather | None = None,
        rule: Rule | None = None,
    ) -> None:
        self._plan = plan
        self._kernels = kernels
        self._output = output
        self._rule = rule if rule is not None else rule_for(plan, gather)
        self._decides_together = gather is not None
        self._journal = journal
        self._observer = observer
        self._workers = worker_count(plan)
        self._budget = plan.args.memory_budget_bytes
        # For the calling thread: batches to continue with, errors to raise, and None to wake it up.
        self._events: SimpleQueue[BatchWork | BaseException | None] = SimpleQueue()
        self._lock = threading.Lock()
        # Sorted by urgency, then by age.
        self._jobs: PriorityQueue[tuple[int, int, tuple[_Job, BatchWork, TensorWork, int] | None]] = PriorityQueue()
        self._age = count()
        self._queued = 0

    def run(self, steps: Sequence[TensorStep]) -> tuple[list[StepOutcome], bool]:
        """
        Run some steps of the plan to the end.

        Returns:
            Outcomes in the order of `steps`, and whether all steps were done (an observer may stop early).

        Raises:
            MergeError: If anything went wrong, after all threads have stopped; finished tensors stay in the journal.
        """
        todo = deque(self._batches(steps))
        # Tensors that were admitted, in order. They may finish in any order, but observers are notified in this one.
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
                    # An adapter is one batch, all of which is in the window: draining it would not be a stop.
                    if not go_on and self._plan.layout is None:
                        return outcomes, False
        finally:
            for _ in threads:
                self._jobs.put((_STOP, next(self._age), None))
            for thread in threads:
                thread.join()
        if self._decides_together and "" not in self._journal.decided:
            self._rule.join()  # this process had nothing to merge, but the others wait for its part of the exchange
        return outcomes, go_on and not todo

    # Scheduling. The calling thread admits batches and notifies observers. What follows a pass runs on the worker that
    # ended it: handing it to the calling thread would mean one more wait for the interpreter lock.

    def _batches(self, steps: Sequence[TensorStep]) -> list[list[TensorStep]]:
        """Group steps into batches; an adapter is one batch, since its file is laid out after all decisions."""
        if self._plan.layout is None:
            return [list(steps)] if steps else []
        return in_batches(steps, len(self._plan.models))

    def _admit(self, steps: list[TensorStep]) -> list[TensorWork]:
        """Start a batch; skipped tensors in it are copied, each as a batch of its own."""
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
        if self._rule.rounds == 0:  # nothing to measure: the decision is known at once
            self._take(batch, self._rule.decide(batch.tensors))
            begun = all(tensor.step.name in self._journal.written for tensor in batch.tensors)
            job, then = (self._check_piece, self._checked) if begun else (self._merge_piece, self._wrote)
            self._start(batch, job, then)
        elif all(tensor.step.name in self._decided_inputs(tensor) for tensor in batch.tensors):
            # Decided in an earlier run: check inputs and output by their digests instead of measuring again.
            self._take(batch, self._journal.decided)
            self._start(batch, self._check_piece, self._checked)
        else:
            layout = self._plan.layout
            if layout is not None and self._rule.is_blockwise and self._kernels.blocks_are_independent:
                batch.units = stacked(batch.tensors, layout)
            self._start(batch, self._measure_piece, self._decide)

    def _decided_inputs(self, tensor: TensorWork) -> dict[str, dict[str, str]]:
        """Return by tensor the digests of the inputs of the group's decision; empty if it is not decided yet."""
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
        # Factors of an adapter are read as a whole, so its modules are one piece each.
        whole = [Piece(0, step.numel, 0, step.n_blocks)]
        cut = whole if self._plan.layout is None else pieces_of(step)
        return TensorWork(step, open_inputs(self._plan, step), cut, skipped)

    def _start(
        self, batch: BatchWork, job: _Job, then: Callable[[BatchWork], None], only: list[TensorWork] | None = None
    ) -> None:
        """Queue a job for each piece of what is unfinished, or of `only`; call `then` when all have ended."""
        batch.then = then
        tensors = [unit for unit in batch.units if not unit.done] if only is None else only
        work = [(job, batch, tensor, index) for tensor in tensors for index in range(len(tensor.pieces))]
        batch.remaining = len(work)
        with self._lock:
            self._queued += len(work)
        # Jobs of the combine pass go first: what the Gram pass read may still be in the cache.
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
        """Raise if a file changed since it was opened: otherwise a mixture of two models could be recorded."""
        for checkpoint, file in batch.files:
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
        # Release whole tensors: faulting in one piece also maps pages around it, some of them of pieces that were
        # released before.
        for unit in batch.units:
            if not unit.done:
                unit.inputs.release(Piece(0, unit.step.numel, 0, unit.step.n_blocks))
        for tensor in batch.tensors:
            if not tensor.done:
                name = tensor.step.name
                inputs = None if name in self._decided_inputs(tensor) else tensor.inputs_digest()
                tensor.details = self._output.details(name)
                tensor.n_saturated = tensor.inputs.n_saturated
                self._journal.record_written(name, tensor.output_digest(), inputs, tensor.details, tensor.n_saturated)
                tensor.done = True

    def _checked(self, batch: BatchWork) -> None:
        """After a resume keep tensors whose output is intact and write the others again; raise if inputs changed."""
        for tensor in batch.tensors:
            name = tensor.step.name
            written = self._journal.written.get(name, {})
            expected = self._decided_inputs(tensor).get(name) or written["inputs"]
            for role, value in tensor.inputs_digest().items():
                if expected.get(role) != value:
                    raise ResumeError(
                        f"Tensor {name!r} of {tensor.inputs.labels[int(role)]} is not what it was when this merge "
                        "was interrupted. Restore the file, or pass --overwrite to start anew."
                    )
            tensor.done = written.get("output") == tensor.output_digest()
            details = written.get("details")
            tensor.details = FactorDetails(**details) if details is not None else None
            tensor.n_saturated = written.get("saturated", 0)
        job = self._copy_piece if batch.tensors[0].step.action == "copy" else self._merge_piece
        self._start(batch, job, self._wrote)

    def _outcome(self, tensor: TensorWork) -> StepOutcome:
        action: Literal["merge", "copy", "skip"] = "skip" if tensor.skipped else tensor.step.action
        return StepOutcome(
            tensor.step,
            action,
            tensor.decision,
            tensor.inputs_digest(),
            tensor.output_digest(),
            tensor.details,
            tensor.n_saturated,
        )

    # Jobs. Everything below runs on the workers.

    def _work(self) -> None:
        while (item := self._jobs.get()[2]) is not None:
            job, batch, tensor, index = item
            try:
                job(batch, tensor, index)
                self._ended(batch)
            except BaseException as error:  # passed to the calling thread, which raises it
                self._events.put(error)

    def _ended(self, batch: BatchWork) -> None:
        with self._lock:
            self._queued -= 1
            batch.remaining -= 1
            last, hungry = batch.remaining == 0, self._queued < _AHEAD * self._workers
        if last and self._decides_together:
            self._events.put(batch)  # only the calling thread may exchange with other processes
        elif last:
            batch.then(batch)
        if last or hungry:
            self._events.put(None)

    def _measure_piece(self, batch: BatchWork, tensor: TensorWork, index: int) -> None:
        if isinstance(tensor, TensorStack):
            self._measure_stack(batch, tensor)
            return
        self._rule.measure(self._kernels, tensor, index)
        # A batch that fits into memory keeps its pages mapped for the combine pass: mapping them again costs time.
        if batch.is_large:
            tensor.inputs.release(tensor.pieces[index])

    def _measure_stack(self, batch: BatchWork, stack: TensorStack) -> None:
        try:
            self._rule.measure(self._kernels, stack, 0)
        except NonFiniteError:
            for tensor in stack.tensors:  # one of them names itself
                self._measure_piece(batch, tensor, 0)
        else:
            stack.share_measurement()

    def _merge_piece(self, batch: BatchWork, tensor: TensorWork, index: int) -> None:
        if isinstance(tensor, TensorStack):
            self._merge_stack(batch, tensor)
            return
        piece = tensor.pieces[index]
        tensor.output_digests[index] = self._output.merge(self._kernels, tensor, piece)
        if not tensor.input_digests[index]:  # there was no measurement; digest now, while the pages are in memory
            tensor.input_digests[index] = tensor.inputs.digests(piece)
        if batch.is_large:
            tensor.inputs.release(piece)

    def _merge_stack(self, batch: BatchWork, stack: TensorStack) -> None:
        stack.decision = stack.join_decisions()
        try:
            digests = self._output.merge_stack(self._kernels, stack)
        except NonFiniteError:
            for tensor in stack.tensors:  # one of them names itself, or may saturate
                self._merge_piece(batch, tensor, 0)
        else:
            for tensor, written in zip(stack.tensors, digests):
                tensor.output_digests[0] = written

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
    Return the number of threads that the memory budget and the machine allow.

    Raises:
        ArgumentError: If the budget is too small for one thread.
    """
    budget = plan.args.memory_budget_bytes
    affordable = budget // plan.piece_memory
    if affordable < 1:
        needed = -(-plan.piece_memory // 2**20)
        raise ArgumentError(
            f"memory_budget is {plan.args.memory_budget}, but one worker needs {needed} MiB for {len(plan.experts)} "
            f"experts. Set memory_budget={needed}MiB or more."
        )
    wanted = plan.args.num_workers or min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1)
    return int(min(wanted, affordable))
