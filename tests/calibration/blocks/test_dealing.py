"""Prompts dealt to processes: whole experts where there are enough of them, about as many tokens to each."""

from __future__ import annotations

from itertools import chain

import pytest
import torch

from hf_frmerge.calibration.blocks.dealing import own_batches
from hf_frmerge.calibration.blocks.streams import Batch
from hf_frmerge.errors import ArgumentError
from hf_frmerge.merging.engine.processes import Processes


def batches(*n_tokens: tuple[int, ...]) -> list[Batch]:
    """Batches of experts, given by their numbers of tokens; the last of each expert judges the fit."""
    made = [
        Batch(expert, {"input_ids": torch.zeros(1, n, dtype=torch.long)}, place == len(own) - 1)
        for expert, own in enumerate(n_tokens)
        for place, n in enumerate(own)
    ]
    return sorted(made, key=lambda batch: batch.is_held_out)  # as they come, all of the fit first


def dealt(made: list[Batch], n_processes: int) -> list[list[Batch]]:
    """What every process has; together it is everything, once, and in the order it was in."""
    found, place = [], {id(batch): number for number, batch in enumerate(made)}
    for rank in range(n_processes):
        processes = Processes(alone=True)
        processes.rank, processes.size = rank, n_processes
        found.append(own_batches(made, processes))
    places = [[place[id(batch)] for batch in own] for own in found]
    assert sorted(chain(*places)) == [*range(len(made))] and all(own == sorted(own) for own in places)
    return found


def experts_of(found: list[list[Batch]]) -> list[set[int]]:
    return [{batch.expert for batch in own} for own in found]


def test_processes_have_whole_experts_and_about_as_many_tokens() -> None:
    found = dealt(batches((60, 40), (30, 20), (20, 10), (10, 10)), 2)  # 100, 50, 30 and 20 tokens
    assert experts_of(found) == [{0}, {1, 2, 3}]
    assert experts_of(dealt(batches((8, 8), (8, 8), (8, 8), (8, 8)), 2)) == [{0, 2}, {1, 3}]
    assert experts_of(dealt(batches((9, 1), (8, 1), (7, 1)), 3)) == [{0}, {1}, {2}]
    assert experts_of(dealt(batches((9, 1), (8, 1)), 1)) == [{0, 1}]


def test_processes_beyond_the_experts_share_the_prompts_of_those_with_most() -> None:
    found = dealt(batches((8, 8, 8, 8), (8, 8)), 3)
    assert experts_of(found) == [{0}, {1}, {0}]
    assert [sum(batch.n_tokens for batch in own) for own in found] == [16, 16, 16]
    # An expert has no more processes than batches.
    assert experts_of(dealt(batches((8, 8, 8), (900,)), 4)) == [{0}, {1}, {0}, {0}]


def test_fewer_batches_than_processes_are_refused() -> None:
    made = batches((8, 8))
    with pytest.raises(ArgumentError, match=r"make 2 batches, which 3 processes cannot share\. Start 2 processes"):
        dealt(made, 3)
    assert experts_of(dealt(made, 2)) == [{0}, {0}]
