"""Deal prompts to processes by expert, as a process holds the weights of those experts alone whose prompts it has."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle

from hf_frmerge.calibration.blocks.streams import Batch
from hf_frmerge.errors import ArgumentError
from hf_frmerge.merging.engine.processes import Processes


def own_batches(batches: Sequence[Batch], processes: Processes) -> list[Batch]:
    """
    Return the batches of this process.

    They are all those of some experts, about as many tokens as fall to every other process. Where there are more
    processes than experts with prompts, several of them share the batches of one expert.

    Raises:
        ArgumentError: If there are fewer batches than processes.
    """
    if len(batches) < processes.size:
        raise ArgumentError(
            f"The prompts make {len(batches)} batches, which {processes.size} processes cannot share. Start "
            f"{len(batches)} processes or fewer, or lower calibration_batch_size."
        )
    of_experts: dict[int, list[Batch]] = {}
    for batch in batches:
        of_experts.setdefault(batch.expert, []).append(batch)
    ranks = _ranks(of_experts, processes.size)
    turns = {expert: cycle(own) for expert, own in ranks.items()}
    return [batch for batch in batches if next(turns[batch.expert]) == processes.rank]


def _ranks(of_experts: dict[int, list[Batch]], n_processes: int) -> dict[int, list[int]]:
    """Return the processes that share each expert's batches."""
    tokens = {expert: sum(batch.n_tokens for batch in own) for expert, own in of_experts.items()}
    ranks: dict[int, list[int]] = {expert: [] for expert in tokens}
    if len(tokens) >= n_processes:
        loads = [0] * n_processes
        for expert in sorted(tokens, key=lambda expert: -tokens[expert]):
            least = loads.index(min(loads))
            loads[least] += tokens[expert]
            ranks[expert].append(least)
    else:
        for rank in range(n_processes):  # to those that have no process yet, then to whose processes have most to do
            open_to_more = [expert for expert, own in of_experts.items() if len(ranks[expert]) < len(own)]
            chosen = max(open_to_more, key=lambda e: tokens[e] / len(ranks[e]) if ranks[e] else float("inf"))
            ranks[chosen].append(rank)
    return ranks
