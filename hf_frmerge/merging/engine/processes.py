"""Processes of one merge: one by default, several under `accelerate launch` or `torchrun`."""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from hf_frmerge.errors import ArgumentError, MergeError

if TYPE_CHECKING:
    from torch import Tensor

    from hf_frmerge.merging.planning.plan import MergePlan
    from hf_frmerge.merging.planning.tensor_step import TensorStep


# How long a process may wait for a slower one. By default gloo gives up after half an hour.
_PATIENCE = timedelta(days=7)

_SLICE = 1 << 24
"""Elements that are added up at once: every process has those of all in memory."""


def _leave_group() -> None:
    import torch.distributed

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _world_size() -> int:
    """
    Return the number of processes that a launcher has started.

    Raises:
        ArgumentError: If `WORLD_SIZE` was set by something else: the process would wait for others for ever.
    """
    size = os.environ.get("WORLD_SIZE", "1")
    lacking = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if not size.isdecimal() or (int(size) > 1 and lacking):
        raise ArgumentError(
            f"WORLD_SIZE={size!r} is set in the environment, which a launcher does together with RANK, MASTER_ADDR "
            "and MASTER_PORT. Unset it, or start the merge with `torchrun` or `accelerate launch`."
        )
    return int(size)


class Processes:
    """
    Rank of this process among those of a merge, and the exchange between them.

    Without a launcher neither torch nor accelerate is imported.

    Args:
        alone: Whether this process merges by itself, whatever the others do: in the middle of a training run, say.
    """

    def __init__(self, *, alone: bool = False) -> None:
        self.rank = 0
        self.size = 1
        self._others_listen = True  # whether the other processes still take part in exchanges
        if _world_size() > 1 and not alone:
            from accelerate import PartialState

            state = PartialState(cpu=True, timeout=_PATIENCE)
            self.rank, self.size = state.process_index, state.num_processes
            # Threads of the process group that outlive the interpreter would abort the process at its end.
            atexit.register(_leave_group)

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files that exist once: index, config, manifest, card."""
        return self.rank == 0

    def wait(self) -> None:
        """Wait for all processes."""
        self.gather([])

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Let the main process go through what is within before the others do."""
        if not self.is_main:
            self.wait()
        yield
        if self.is_main:
            self.wait()

    def gather(self, items: list[Any]) -> list[Any]:
        """
        Return the items of all processes, in the order of the processes.

        Raises:
            MergeError: If another process failed, with its message.
        """
        return items if self.size == 1 else self._exchange(items)

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """
        Replace tensors by their sums over all processes, added in the order of the processes.

        So all processes have the same bits, and the same number of them makes them again.

        Raises:
            MergeError: If another process failed, with its message.
        """
        if self.size == 1:
            return
        self.wait()  # a process that failed takes part in this, and in nothing after it
        for tensor in tensors:
            flat = tensor.view(-1)
            for start in range(0, len(flat), _SLICE):
                part = flat[start : start + _SLICE]
                part.copy_(self._sum(part))

    def _sum(self, values: Tensor) -> Tensor:
        import torch

        own = values.cpu()
        parts = [torch.empty_like(own) for _ in range(self.size)]
        try:
            torch.distributed.all_gather(parts, own)
        except RuntimeError as error:
            self._others_listen = False
            raise _died(error) from error
        total, *others = parts
        for other in others:
            total += other
        return total

    @contextmanager
    def sharing_errors(self) -> Iterator[None]:
        """
        Raise an error of one process on all of them.

        A process that fails takes part once more in the next `gather` or `wait` of the others and passes its error
        instead of items. So none of them waits for it forever.
        """
        try:
            yield
        except Exception as error:
            if self.size > 1 and self._others_listen:
                self._exchange([], f"{error}" if isinstance(error, MergeError) else f"{type(error).__name__}: {error}")
            raise

    def _exchange(self, items: list[Any], failure: str | None = None) -> list[Any]:
        from accelerate.utils import gather_object

        self._others_listen = False  # until the exchange succeeds: after an error it must not be tried again
        try:
            parts = gather_object([(items, failure)])
        except RuntimeError as error:
            raise _died(error) from error
        failures = [(rank, text) for rank, (_, text) in enumerate(parts) if text is not None]
        if failures and failure is None:
            raise MergeError(f"Process {failures[0][0]} of {self.size} failed: {failures[0][1]}")
        self._others_listen = not failures
        return [item for part, _ in parts for item in part]

    def share(self, plan: MergePlan) -> list[TensorStep]:
        """
        Return this process's part of the steps, with about as many bytes as every other part.

        Groups stay together, except for `block="model"`, where the processes decide together. An adapter is left to
        the main process: it is one file and takes seconds.
        """
        if plan.layout is None:
            return plan.steps if self.is_main else []
        total = sum(step.nbytes for step in plan.steps) or 1
        mine, before = [], 0
        owner_of_group: dict[str, int] = {}
        for step in plan.steps:
            # A tensor belongs to the process whose share of the bytes its middle falls into.
            owner = min(self.size - 1, (before + step.nbytes // 2) * self.size // total)
            before += step.nbytes
            if step.action == "merge" and plan.args.block != "model":
                owner = owner_of_group.setdefault(step.group, owner)
            if owner == self.rank:
                mine.append(step)
        return mine


def _died(error: RuntimeError) -> MergeError:
    return MergeError(f"Another process of this merge died: {error}. Start the job again to resume.")


def check_same_commits(plan: MergePlan, processes: Processes) -> None:
    """
    Check that all processes found the same commits: a branch may have moved while they looked it up.

    Raises:
        MergeError: If they differ; the message names the model.
    """
    ours = [(model.spec, model.source.commit) for model in plan.models]
    for spec, commit in processes.gather(ours):
        if (spec, commit) not in ours:
            raise MergeError(
                f"{spec} was changed on the Hub while the processes of this merge looked it up (one found {commit}). "
                "Start it again, or name a commit, as in org/name@commit."
            )
