"""Average the weights of a block by their Fisher information: what an expert's predictions depend on counts most."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from hf_frmerge.fisher.average import fisher_average

if TYPE_CHECKING:
    from hf_frmerge.calibration.blocks.blockwise_model import Weights
    from hf_frmerge.calibration.blocks.layers import BlockLayers
    from hf_frmerge.calibration.fits.sweep_state import SweepState
    from hf_frmerge.fisher.files import DiagonalFile

logger = logging.getLogger(__name__)


class InformedFit:
    """
    What fits by Fisher information share: the experts have been run on the prompts for their gradients already.

    Args:
        sweep, index, start, experts: As for `BlockFit`.

    Attributes:
        weights: merged weights, float32.
        factors, coefficients: none: what is merged by information has no low rank, and is no sum of the experts.
    """

    def __init__(self, sweep: SweepState, index: int, start: dict[str, Tensor], experts: Sequence[Weights]) -> None:
        self._sweep, self._index, self._name = sweep, index, sweep.model.blocks[index]
        self._experts = experts
        self.weights = dict(start)
        self.factors: dict[str, tuple[Tensor, Tensor]] = {}
        self.coefficients: dict[str, Tensor] = {}

    def run_experts(self) -> None:
        """Run the experts' blocks on the prompts that judge the merge."""
        sweep = self._sweep
        for expert in sweep.own:
            computed = sweep.computed(self._experts[expert])
            for b, batch in enumerate(sweep.batches):
                if batch.expert == expert and batch.is_held_out:
                    calls = batch.calls[self._index]
                    sweep.expert[b] = sweep.model.run_block(self._name, computed, sweep.expert[b], calls)


class FisherFit(InformedFit):
    """
    Weights of one block, averaged by weight and Fisher information; those outside the blocks are averaged by weight.

    Args:
        sweep, index, layers, start, experts: As for `BlockFit`.
        files: Fisher information of every expert.
    """

    def __init__(
        self,
        sweep: SweepState,
        index: int,
        layers: BlockLayers,
        start: dict[str, Tensor],
        experts: Sequence[Weights],
        files: Sequence[DiagonalFile],
    ) -> None:
        super().__init__(sweep, index, start, experts)
        self._files = files

    def fit(self) -> None:
        """Average all weights of the block."""
        reader = self._sweep.reader
        at_floor = []
        for key, start in self.weights.items():
            parameter = f"{self._name}.{key}"
            if not reader.is_merged(parameter) or any(parameter not in file for file in self._files):
                continue  # of a buffer, as routers may have one, there is no information
            merged, share = fisher_average(
                [weights[key] for weights in self._experts],
                [file.read(parameter).to(start.device) for file in self._files],
                reader.weights(parameter),
            )
            self.weights[key] = reader.scaled(parameter, merged)
            at_floor.append(share)
        if at_floor:
            mean = 100 * sum(at_floor) / len(at_floor)
            logger.info("%s: on average %.1f %% of a tensor's Fisher information is at the floor.", self._name, mean)
