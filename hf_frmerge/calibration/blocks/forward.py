"""Run whole models over prompts, one block at a time, and measure how far their outputs are apart."""

# Shape suffixes: B = prompts of a batch, T = tokens, H = hidden size.

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_frmerge.calibration.blocks.blockwise_model import BlockwiseModel, Outputs
from hf_frmerge.calibration.blocks.outputs import outputs_of, squared_distance
from hf_frmerge.calibration.blocks.streams import Batch
from hf_frmerge.calibration.blocks.weights import WeightReader
from hf_frmerge.kernels.load import load_kernels

if TYPE_CHECKING:
    from hf_frmerge.merging.planning.plan import MergePlan


@dataclass(frozen=True)
class ForwardPass:
    """
    A model that has run over batches.

    Attributes:
        model: its modules.
        batches: what it ran over.
        outer: its weights outside the blocks, as what follows them computes with them.
        hidden: its hidden states `(B, T, H)` after the last block, by batch.
    """

    model: BlockwiseModel
    batches: Sequence[Batch]
    outer: dict[str, Tensor]
    hidden: Sequence[Tensor]

    def part(self, first: int, n_batches: int) -> ForwardPass:
        """Return what it gives for some of the batches."""
        places = slice(first, first + n_batches)
        return ForwardPass(self.model, self.batches[places], self.outer, self.hidden[places])

    def outputs(self) -> Iterator[Outputs]:
        """Yield the outputs prompt by prompt: the logits of a batch would be the largest thing in memory."""
        for batch, hidden_BTH in zip(self.batches, self.hidden):
            for row in range(len(hidden_BTH)):
                yield outputs_of(self.model, self.outer, hidden_BTH[row : row + 1], batch.prompt(row))


def run_forward(model: BlockwiseModel, read: Callable[[str], Tensor], batches: Sequence[Batch]) -> ForwardPass:
    """
    Run a model over batches. One of its blocks is in memory at a time.

    Args:
        model: Its modules.
        read: Returns the values of a parameter, float32.
        batches: Prompts; whose they are does not matter.
    """

    def weights(names: Sequence[str], prefix: str = "") -> dict[str, Tensor]:
        return model.computed({name: read(f"{prefix}{name}").to(model.device) for name in names})

    outer = weights(model.outer_parameters())
    first, *others = model.blocks
    block = weights(model.block_parameters(first), f"{first}.")
    begun = [model.begin(outer, block, batch.inputs) for batch in batches]
    calls = [calls for _, calls in begun]
    hidden = [model.run_block(first, block, hidden_BTH, own[0]) for (hidden_BTH, _), own in zip(begun, calls)]
    for index, name in enumerate(others, start=1):
        block = weights(model.block_parameters(name), f"{name}.")
        hidden = [model.run_block(name, block, hidden_BTH, own[index]) for hidden_BTH, own in zip(hidden, calls)]
    return ForwardPass(model, batches, model.behind_blocks(outer), hidden)


def squared_distances(one: ForwardPass, other: ForwardPass) -> Tensor:
    """Return those of all outputs of two models on the same batches, in rad²; see `squared_distance`."""
    return torch.cat([squared_distance(*pair) for pair in zip(one.outputs(), other.outputs())])


def merge_distances(
    plans: Mapping[str, MergePlan], model: BlockwiseModel, batches: Sequence[Batch]
) -> dict[str, tuple[float | None, ...]]:
    """
    Return by merge the mean squared distance to every expert on its prompts; `None` where it has none.

    Experts and merges run one after another; one block of one of them is in memory at a time.

    Args:
        plans: Plans of merges of the same experts into whole models, by name.
        model: Modules of the models.
        batches: Prompts to judge by.
    """
    first = next(iter(plans.values()))
    kernels = load_kernels(first.args.device)
    reader = WeightReader(first, kernels, model)
    own = [[batch for batch in batches if batch.expert == expert] for expert in range(len(first.experts))]
    experts = {
        index: run_forward(model, partial(reader.expert, index), prompts)
        for index, prompts in enumerate(own)
        if prompts
    }
    every = [batch for prompts in own for batch in prompts]
    found: dict[str, tuple[float | None, ...]] = {}
    for name, plan in plans.items():
        merged = run_forward(model, WeightReader(plan, kernels, model).start, every)
        place, row = 0, []
        for index, prompts in enumerate(own):
            part = merged.part(place, len(prompts))
            row.append(float(squared_distances(part, experts[index]).mean()) if prompts else None)
            place += len(prompts)
        found[name] = tuple(row)
    return found
