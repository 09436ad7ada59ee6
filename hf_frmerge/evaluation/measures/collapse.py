"""
How varied a model's activations are, layer by layer: what shrinks when a merge collapses.

Convention (arXiv 2603.04972, Fig. 2; the definitions are those its public reproductions agree on): of the hidden
states `(B, T, d)` of a layer, all `B * T` tokens that are not padding count alike. Activation variance is the variance
of every feature over these tokens, divided by their number and not by one less, averaged over the features. Effective
rank is `exp(-sum p ln p)` with `p` the *eigenvalues* of the *centred* covariance over their sum (Roy and Vetterli
2007). The layers are those of transformers' `output_hidden_states`: in most models the last has gone through the final
norm. Blocks overlap by one token, which is counted in both.

The covariance of fewer tokens than features has fewer eigenvalues than the layer could show; ranks of models can then
be compared with each other, on the same tokens, but not taken by themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator

from hf_frmerge.evaluation.record import LayerActivations


@dataclass
class _Moments:
    """Of the tokens one layer has seen: number, sum, and scatter around their mean; float64."""

    count: int
    mean: torch.Tensor  # (d,)
    scatter: torch.Tensor  # (d, d): sum of (x - mean)(x - mean)^T

    def add(self, count: int, mean: torch.Tensor, scatter: torch.Tensor) -> None:
        """Join the moments of other tokens (Chan, Golub and LeVeque 1979)."""
        total = self.count + count
        apart = mean - self.mean
        self.scatter += scatter
        self.scatter.addr_(apart, apart, alpha=self.count * count / total)
        self.mean += apart * (count / total)
        self.count = total


class ActivationStatistics:
    """
    Covariance of every layer's activations, gathered batch by batch; no activation is kept.

    Each batch is centred on its own mean and multiplied out in float32; moments of batches are joined in float64. It
    takes `8 d**2` bytes a layer, where the activations lie.
    """

    def __init__(self) -> None:
        self._layers: list[_Moments] = []

    def update(self, hidden_states: Sequence[torch.Tensor], attention_mask: torch.Tensor) -> None:
        """
        Add a batch.

        Args:
            hidden_states (`Sequence[torch.Tensor]`): Of every layer, `(B, T, d)`, any floating dtype.
            attention_mask (`torch.Tensor`): `(B, T)`, 0 where there is padding, on whichever side.
        """
        mask = attention_mask.bool()
        is_full = bool(mask.all())
        for layer, states in enumerate(hidden_states):
            tokens = states.flatten(0, 1) if is_full else states[mask.to(states.device)]
            tokens = tokens.to("cpu" if tokens.device.type == "mps" else tokens.device, torch.float32)
            shift = tokens.mean(dim=0)
            centred = tokens - shift
            # The mean of what rounding the first mean to float32 left.
            rest = centred.mean(dim=0).double()
            scatter = (centred.T @ centred).double().addr_(rest, rest, alpha=-len(tokens))
            if layer == len(self._layers):
                self._layers.append(_Moments(0, torch.zeros_like(rest), torch.zeros_like(scatter)))
            self._layers[layer].add(len(tokens), shift.double() + rest, scatter)

    def reduce(self, accelerator: Accelerator) -> None:
        """Join the moments of all processes; each must call it, and has them all afterwards."""
        if accelerator.num_processes == 1:
            return
        shapes = [tuple(moments.mean.shape) for moments in self._layers]
        from accelerate.utils import gather_object

        # A process that had no batch has no layers: it learns their sizes from the others.
        shapes = max(gather_object([shapes]), key=len)
        for layer, shape in enumerate(shapes):
            if layer == len(self._layers):
                zeros = torch.zeros(shape, dtype=torch.float64)
                self._layers.append(_Moments(0, zeros, torch.zeros(*shape, *shape, dtype=torch.float64)))
            self._reduce_layer(self._layers[layer], accelerator)

    def _reduce_layer(self, mine: _Moments, accelerator: Accelerator) -> None:
        mean, scatter = mine.mean.to(accelerator.device), mine.scatter.to(accelerator.device)
        count = torch.tensor([float(mine.count)], dtype=torch.float64, device=accelerator.device)
        total = accelerator.reduce(torch.cat([count, mine.count * mean]), reduction="sum")
        joint = total[1:] / total[0]
        apart = mean - joint
        mine.scatter = accelerator.reduce(scatter.addr(apart, apart, alpha=mine.count), reduction="sum")
        mine.mean, mine.count = joint, int(total[0])

    @property
    def n_tokens(self) -> int:
        """Tokens seen, padding left out."""
        return max((moments.count for moments in self._layers), default=0)

    @property
    def n_features(self) -> int:
        """Width of the widest layer."""
        return max((len(moments.mean) for moments in self._layers), default=0)

    def results(self, model: str) -> list[LayerActivations]:
        """Return variance and effective rank of every layer."""
        rows = []
        for layer, moments in enumerate(self._layers):
            covariance = moments.scatter / moments.count
            variance = float(covariance.diagonal().mean())
            rows.append(LayerActivations(model, layer, variance, effective_rank(covariance)))
        return rows


def effective_rank(covariance: torch.Tensor) -> float:
    """
    Return `exp(-sum p ln p)`, `p` the eigenvalues over their sum (Roy and Vetterli 2007); 0 for a zero matrix.

    Args:
        covariance (`torch.Tensor`): Symmetric positive semidefinite, `(d, d)`, float64.
    """
    eigenvalues = torch.linalg.eigvalsh(covariance).clamp(min=0)
    total = eigenvalues.sum()
    if total == 0:
        return 0.0
    shares = eigenvalues / total
    return float(torch.exp(-torch.special.xlogy(shares, shares).sum()))
