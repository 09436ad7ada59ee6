"""What is carried through the blocks while they are fitted, and the settings."""

# Shape suffixes: B = prompts of a batch, T = tokens, H = hidden size.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_frmerge.calibration.blocks.blockwise_model import BlockwiseModel, Weights
from hf_frmerge.calibration.blocks.streams import Batch
from hf_frmerge.calibration.blocks.weights import WeightReader
from hf_frmerge.calibration.fits.least_squares import FitOptions
from hf_frmerge.merging.engine.processes import Processes


@dataclass(frozen=True)
class SweepOptions:
    """
    Settings of a sweep.

    Attributes:
        fit: settings of every layer's fit; `residual` is for blocks that begin with a norm.
        post_norm_residual: `residual` for blocks that end with a norm, which bounds the drift of the stream.
        rank: rank of the low-rank form.
        fits_outer: whether the head of a language model, or what else lies behind the blocks, is fitted, too.
    """

    fit: FitOptions = field(default_factory=FitOptions)
    post_norm_residual: float = 1.0
    rank: int = 32
    fits_outer: bool = False


@dataclass
class SweepState:
    """
    What a sweep carries through the blocks.

    Attributes:
        model: the model's modules.
        reader: reads the weights of experts, base and start.
        batches: prompts of all experts.
        shares: weights of the experts, summing to 1.
        options: settings.
        is_full: whether all experts are full fine-tunes: then a fit starts from what their updates say.
        processes: processes that share the prompts: each has batches of its own, and what is summed over tokens or
            experts is added up over all of them.
        offers_table: whether coefficients of the experts are looked for, too.
        expert, merged: hidden states `(B, T, H)` of every batch, float32, after the blocks run so far.
        n_tokens: tokens of every expert that take part in the fit, in all processes.
        summed: experts of which this process adds what depends on their weights alone to sums over all experts.
        n_unreached: experts of mixtures that stayed as merged, as too few tokens were sent to them.
    """

    model: BlockwiseModel
    reader: WeightReader
    batches: Sequence[Batch]
    shares: list[float]
    options: SweepOptions
    is_full: bool
    processes: Processes
    offers_table: bool = False
    expert: list[Tensor] = field(default_factory=list)
    merged: list[Tensor] = field(default_factory=list)
    n_tokens: list[int] = field(default_factory=list)
    summed: list[int] = field(default_factory=list)
    n_unreached: int = 0

    @property
    def n_experts(self) -> int:
        """Number of experts."""
        return len(self.shares)

    @property
    def own(self) -> list[int]:
        """Experts of which this process has prompts: it holds the weights of these alone."""
        return sorted({batch.expert for batch in self.batches})

    @property
    def fitted(self) -> list[int]:
        """Batches that take part in the fit."""
        return [b for b, batch in enumerate(self.batches) if not batch.is_held_out]

    def run_block(self, index: int, weights: Weights, b: int, hidden_BTH: Tensor) -> Tensor:
        """Return the hidden states of a batch `(B, T, H)` after a block, float32."""
        return self.model.run_block(self.model.blocks[index], weights, hidden_BTH, self.batches[b].calls[index])

    def computed(self, weights: Weights) -> dict[str, Tensor]:
        """Return matrices in the dtype of the products: autocast would convert them for every batch."""
        return self.model.computed(weights)

    def origin(self, parameter: str, start: Tensor) -> Tensor:
        """Return what experts' updates are differences to: the base, or zeros if only experts have the tensor."""
        base = self.reader.base(parameter)
        return torch.zeros_like(start) if base is None else base.to(start.device)
