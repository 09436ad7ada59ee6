"""Average the weights of a block by their Fisher information: what an expert's predictions depend on counts most."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from hf_frmerge.fisher.average import fisher_average

if TYPE_CHECKING:
    from hf_frmerge.calibration.fits.block_fit import SweepState
    from hf_frmerge.calibration.layers import BlockLayers
    from hf_frmerge.fisher.files import DiagonalFile

logger = logging.getLogger(__name__)


class FisherFit:
    """
    Weights of one block, averaged by weight and Fisher information; those outside the blocks are averaged by weight.

    Args:
        sweep, index, layers, start, experts: As for `BlockFit`.
        files: Fisher information of every expert.

    Attributes:
        weights: averaged weights, float32.
        factors, coefficients: none: what is averaged element by element has no low rank, and no coefficients.
    """

    def __init__(
        self,
        sweep: SweepState,
        index: int,
        layers: BlockLayers,
        start: dict[str, Tensor],
        experts: list[dict[str, Tensor]],
        files: Sequence[DiagonalFile],
    ) -> None:
        self._sweep, self._index, self._name = sweep, index, sweep.model.blocks[index]
        self._experts, self._files = experts, files
        self.weights = dict(start)
        self.factors: dict[str, tuple[Tensor, Tensor]] = {}
        self.coefficients: dict[str, Tensor] = {}

    def run_experts(self) -> None:
        """Run the experts' blocks on the prompts that judge the merge."""
        run_held_out(self._sweep, self._index, self._experts)

    def fit(self) -> None:
        """Average all weights of the block."""
        reader = self._sweep.reader
        at_floor = []
        for key, start in self.weights.items():
            parameter = f"{self._name}.{key}"
            if not reader.is_merged(parameter):
                continue
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


def run_held_out(sweep: SweepState, index: int, experts: Sequence[dict[str, Tensor]]) -> None:
    """Run the experts' blocks on the prompts that judge the merge: the others have been run for their gradients."""
    name = sweep.model.blocks[index]
    for expert, weights in enumerate(experts):
        computed = sweep.computed(weights)
        for b, batch in enumerate(sweep.batches):
            if batch.expert == expert and batch.is_held_out:
                sweep.expert[b] = sweep.model.run_block(name, computed, sweep.expert[b], batch.calls[index])
