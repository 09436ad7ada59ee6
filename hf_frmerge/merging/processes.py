"""The processes of one merge: alone by default, several under `accelerate launch` or `torchrun`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hf_frmerge.merging.plan import TensorStep


class Processes:
    """
    This process among those that work on one merge.

    A merge started without a launcher imports neither torch nor accelerate for this.
    """

    def __init__(self) -> None:
        self.rank = 0
        self.size = 1
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from accelerate import PartialState

            state = PartialState(cpu=True)
            self.rank, self.size = state.process_index, state.num_processes

    @property
    def is_main(self) -> bool:
        """Whether this process writes what there is one of: index, config, manifest, card."""
        return self.rank == 0

    def wait(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            from accelerate import PartialState

            PartialState().wait_for_everyone()

    def gather(self, items: list[Any]) -> list[Any]:
        """Return the items of all processes, in the order of the processes."""
        if self.size == 1:
            return items
        from accelerate.utils import gather_object

        return list(gather_object(items))

    def share(self, steps: Sequence[TensorStep], block: str) -> list[TensorStep]:
        """
        Return this process's part of the steps, about as many bytes as everyone's.

        Groups stay together, except the one group of `block="model"`: its Gram matrices are added up across processes.
        """
        total = sum(step.nbytes for step in steps) or 1
        mine, before = [], 0
        owner_of_group: dict[str, int] = {}
        for step in steps:
            owner = min(self.size - 1, (before + step.nbytes // 2) * self.size // total)
            before += step.nbytes
            if step.action == "merge" and block != "model":
                owner = owner_of_group.setdefault(step.group, owner)
            if owner == self.rank:
                mine.append(step)
        return mine
