"""Group tensors into batches that are decided together: for small tensors, the calls would cost more than the work."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hf_frmerge.merging.planning.tensor_step import TensorStep

# Upper limit of the bytes a batch reads, unless it is a single tensor. The Gram pass reads all of them before the
# combine pass reads them again. Four times as much was 2 % faster, but would keep more pages mapped.
BATCH_BYTES = 128 << 20
BATCH_TENSORS = 256
# What is solved together is held in arrays over all its blocks and pairs of experts.
BATCH_BLOCKS = 4096
# A tensor with more blocks than this (more than heads give) is enough work for a call by itself.
_MANY_BLOCKS = 256


def in_batches(steps: Sequence[TensorStep], n_models: int) -> list[list[TensorStep]]:
    """
    Group steps into batches: runs of tensors with equally many blocks, whole groups, and copies by themselves.

    A group of several tensors is a batch of its own, at the place of its first tensor. Batches only affect speed,
    never the result.
    """
    sizes = Counter(step.group for step in steps if step.action == "merge")
    batches: list[list[TensorStep]] = []
    groups: dict[str, list[TensorStep]] = {}
    nbytes, is_open = 0, False
    for step in steps:
        if step.action == "merge" and step.group in groups:
            groups[step.group].append(step)
            continue
        nbytes += step.nbytes * n_models
        size = len(batches[-1]) + 1 if is_open else 1
        fits = nbytes <= BATCH_BYTES and size <= BATCH_TENSORS and size * step.n_blocks <= BATCH_BLOCKS
        alone = step.action == "copy" or sizes[step.group] > 1 or step.n_blocks > _MANY_BLOCKS
        if is_open and fits and not alone and batches[-1][0].n_blocks == step.n_blocks:
            batches[-1].append(step)
            continue
        batches.append([step])
        nbytes, is_open = step.nbytes * n_models, not alone
        if step.action == "merge" and sizes[step.group] > 1:
            groups[step.group] = batches[-1]
    return batches
