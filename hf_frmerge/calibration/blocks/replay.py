"""Run a block again and again while its last layers change, without computing anew what comes before them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor

from hf_frmerge.calibration.blocks.blockwise_model import other_forwards
from hf_frmerge.calibration.blocks.layers import names_of_step

if TYPE_CHECKING:
    from torch import nn

    from hf_frmerge.calibration.blocks.layers import BlockLayers, Step


class Replay:
    """
    Keeps what parts of a block give for a batch once their weights change no more.

    Layers are fitted in the order of the forward pass, so what enters a part whose layers are all fitted changes no
    more either. Attention is such a part while the layers behind it are fitted, and half of what is computed for them.

    Args:
        block: The block.
        layers: Its layers, in the order in which they are fitted. Each runs once, and so does the part it is in.
    """

    def __init__(self, block: nn.Module, layers: BlockLayers) -> None:
        self._block, self._steps = block, layers.steps
        self._known: dict[tuple[int, str], Any] = {}

    def fitted_before(self, step: Step) -> list[str]:
        """Return the children of the block that have linear layers, all fitted before a step; by name."""
        last: dict[str, int] = {}
        with_linear = set()
        for position, other in enumerate(self._steps):
            for name in names_of_step(other):
                child = name.partition(".")[0]
                last[child] = position
                if not isinstance(other, str):
                    with_linear.add(child)
        now = self._steps.index(step)
        return [child for child in with_linear if last[child] < now]

    @contextmanager
    def running(self, batch: int, step: Step) -> Iterator[None]:
        """While the block runs on a batch for a step, take what is known, and keep what changes no more."""
        with ExitStack() as stack:
            for child in self.fitted_before(step):
                stack.enter_context(self._replayed(batch, child))
            yield

    @contextmanager
    def _replayed(self, batch: int, name: str) -> Iterator[None]:
        module = self._block.get_submodule(name)
        compute = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            output = self._known.get((batch, name))
            if output is None:
                output = compute(*args, **kwargs)
                if _is_small(output, [*args, *kwargs.values()]):
                    self._known[batch, name] = output
            return output

        with other_forwards([module], [forward]):
            yield


def _is_small(output: Any, entering: Sequence[Any]) -> bool:
    """Whether a part gives no more than enters it: the weights of attention, or half an MLP, may be far larger."""
    given = [part for part in (output if isinstance(output, tuple) else [output]) if isinstance(part, Tensor)]
    first = next(part for part in entering if isinstance(part, Tensor))
    return len(given) == 1 and given[0].numel() <= first.numel()
