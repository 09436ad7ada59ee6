"""Which tensors are solved together: many calls on few numbers cost more than the merge of a small tensor."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hf_frmerge.merging.planning.plan import TensorStep

# What a batch reads, at most, unless it is one tensor. The Gram pass reads all of it before the combine pass reads it
# again: four times as much was 2 % faster, and would keep more pages mapped.
BATCH_BYTES = 128 << 20
BATCH_TENSORS = 16
# With more blocks than heads, a tensor is enough work for a call.
_MANY_BLOCKS = 256


def in_batches(steps: Sequence[TensorStep], n_models: int) -> list[TensorStep]:
    """
    Name the batch of every tensor.

    Batches are runs of the plan with equally many blocks. They decide how fast it goes and no bit of a coefficient.
    """
    sizes = Counter(step.group for step in steps if step.action == "merge")
    found: list[TensorStep] = []
    batch, n_blocks, nbytes, count = "", 0, 0, 0
    for step in steps:
        alone = step.action == "copy" or sizes[step.group] > 1 or step.n_blocks > _MANY_BLOCKS
        nbytes, count = nbytes + step.nbytes * n_models, count + 1
        if alone or step.n_blocks != n_blocks or nbytes > BATCH_BYTES or count > BATCH_TENSORS:
            batch, n_blocks, nbytes, count = step.group, 0 if alone else step.n_blocks, step.nbytes * n_models, 1
        found.append(replace(step, batch=batch))
    return found
