"""The tokens that the experts of a mixture see, in a merge and in the models it is made of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from hf_frmerge.calibration.blocks.blockwise_model import BlockwiseModel, Weights
    from hf_frmerge.calibration.blocks.matrices import StoredMatrix


@dataclass(frozen=True)
class Routed:
    """
    Tokens that enter a mixture, and where the merge sends them.

    Attributes:
        merged_TH, expert_TH: what enters in the merge, and in the model whose prompt it is, in the dtype of products.
        places_TK: the experts of the mixture that a token is sent to.
        shares_TK: what is multiplied with their outputs, float32.
    """

    merged_TH: Tensor
    expert_TH: Tensor
    places_TK: Tensor
    shares_TK: Tensor

    def at(self, place: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return what enters one expert of the mixture, in the merge and in the model, and its shares `(n, 1)`."""
        rows, columns = (self.places_TK == place).nonzero(as_tuple=True)
        return self.merged_TH[rows], self.expert_TH[rows], self.shares_TK[rows, columns][:, None]


@dataclass
class Routes:
    """
    The tokens of all models that are merged.

    Attributes:
        by_expert: model that is merged -> its tokens, batch by batch.
    """

    by_expert: dict[int, list[Routed]] = field(default_factory=dict)

    def add(self, expert: int, routed: Routed) -> None:
        """Add a batch."""
        self.by_expert.setdefault(expert, []).append(routed)

    def counts(self, n_places: int) -> Tensor:
        """Return how many tokens are sent to each expert of the mixture, float64."""
        counts = torch.zeros(n_places, dtype=torch.float64)
        for batches in self.by_expert.values():
            for routed in batches:
                counts += torch.bincount(routed.places_TK.flatten().cpu(), minlength=n_places)[:n_places]
        return counts

    def at(self, expert: int, place: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return what enters one expert of the mixture from the prompts of a model, as `Routed.at`."""
        parts = zip(*(routed.at(place) for routed in self.by_expert[expert]))
        merged_TH, expert_TH, shares_T = (torch.cat(part) for part in parts)
        return merged_TH, expert_TH, shares_T


@contextmanager
def listening(module: nn.Module) -> Iterator[list[Sequence[Any]]]:
    """Collect the arguments that a module is called with: of a mixture, tokens, where they go, and their shares."""
    called: list[Sequence[Any]] = []

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        called.append([*args, *kwargs.values()])

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield called
    finally:
        handle.remove()


def gated(
    model: BlockwiseModel, mixture: nn.Module, x_TH: Tensor, weights: Weights, gate_up: Sequence[StoredMatrix]
) -> Tensor:
    """Return what enters the last layer of an expert of a mixture, `(T, I)`, as its class computes it."""
    has_bias = all(matrix.bias in weights for matrix in gate_up)
    both = torch.cat([matrix.read(weights, with_bias=has_bias) for matrix in gate_up])
    both_OH, bias_O = (both[:, :-1], both[:, -1].to(model.dtype)) if has_bias else (both, None)
    apply_gate: Any = mixture._apply_gate
    found: Tensor = apply_gate(nn.functional.linear(x_TH.to(model.dtype), both_OH.to(model.dtype), bias_O))
    return found
