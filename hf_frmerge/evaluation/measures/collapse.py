"""
Measure the variance and effective rank of activations, layer by layer: both shrink when a merge collapses.

Convention (arXiv 2603.04972, Fig. 2; its public reproductions agree on the definitions): all tokens of the hidden
states `(B, T, d)` of a layer that are not padding have equal weight. Activation variance is the population variance of
each feature over these tokens (divided by their number, not by one less), averaged over the features. Effective rank
is `exp(-sum p ln p)` with `p` the *eigenvalues* of the *centred* covariance over their sum (Roy and Vetterli 2007).
The layers are those of transformers' `output_hidden_states`: in most models the last has passed the final norm. Blocks
overlap by one token, which is counted in both.

With fewer tokens than features the covariance is rank-deficient. Effective ranks of models on the same tokens can then
be compared with each other, but have no meaning by themselves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator

from hf_frmerge.evaluation.record import LayerActivations


@dataclass
class _Moments:
    """Running moments of one layer: number of tokens, mean, and scatter about the mean; float64."""

    count: int
    mean: torch.Tensor  # (d,)
    scatter: torch.Tensor  # (d, d): sum of (x - mean)(x - mean)^T

    def add(self, count: int, mean: torch.Tensor, scatter: torch.Tensor) -> None:
        """Add the moments of further tokens (Chan, Golub and LeVeque 1979); sums of squares would cancel."""
        total = self.count + count
        difference = mean - self.mean
        self.scatter += scatter
        self.scatter.addr_(difference, difference, alpha=self.count * count / total)
        self.mean += difference * (count / total)
        self.count = total


class ActivationStatistics:
    """
    Accumulate the covariance of every layer's activations batch by batch, without keeping activations.

    Each batch is centred on its own mean and multiplied in float32; moments of batches are joined in float64. Takes
    `8 d**2` bytes a layer on the device of the activations.
    """

    def __init__(self) -> None:
        self._layers: list[_Moments] = []

    def update(self, hidden_states: Sequence[torch.Tensor], attention_mask: torch.Tensor | None) -> None:
        """
        Add the activations of a batch.

        Args:
            hidden_states (`Sequence[torch.Tensor]`): Activations of every layer, `(B, T, d)`, or `(B, d, H, W)` where
                a layer is a map of places in an image; any floating dtype.
            attention_mask (`torch.Tensor`, *optional*): `(B, T)`, 0 for padding, on either side; without it, nothing
                is padding.
        """
        mask = None if attention_mask is None or bool(attention_mask.all()) else attention_mask.bool()
        for layer, states in enumerate(hidden_states):
            places = states.movedim(1, -1) if states.dim() == 4 else states
            tokens = places.flatten(0, -2) if mask is None else places[mask.to(places.device)]
            # MPS has no float64.
            tokens = tokens.to("cpu" if tokens.device.type == "mps" else tokens.device, torch.float32)
            shift = tokens.mean(dim=0)
            centred = tokens - shift
            # Correct for the rounding of `shift` to float32, which inflates the scatter of features with large means.
            rest = centred.mean(dim=0).double()
            scatter = (centred.T @ centred).double().addr_(rest, rest, alpha=-len(tokens))
            if layer == len(self._layers):
                self._layers.append(_Moments(0, torch.zeros_like(rest), torch.zeros_like(scatter)))
            self._layers[layer].add(len(tokens), shift.double() + rest, scatter)

    def reduce(self, accelerator: Accelerator) -> None:
        """Join the moments of all processes; every process must call it, and then has the joint moments."""
        if accelerator.num_processes == 1:
            return
        shapes = [tuple(moments.mean.shape) for moments in self._layers]
        from accelerate.utils import gather_object

        # A process without a batch has no layers yet, but must take part in the reduction, with zeros of this size.
        shapes = max(gather_object([shapes]), key=len)
        for layer, shape in enumerate(shapes):
            if layer == len(self._layers):
                zeros = torch.zeros(shape, dtype=torch.float64)
                self._layers.append(_Moments(0, zeros, torch.zeros(*shape, *shape, dtype=torch.float64)))
            self._reduce_layer(self._layers[layer], accelerator)

    def _reduce_layer(self, local: _Moments, accelerator: Accelerator) -> None:
        """Join one layer: first the joint mean, then the scatters shifted to it."""
        mean, scatter = local.mean.to(accelerator.device), local.scatter.to(accelerator.device)
        count = torch.tensor([float(local.count)], dtype=torch.float64, device=accelerator.device)
        total = accelerator.reduce(torch.cat([count, local.count * mean]), reduction="sum")
        joint = total[1:] / total[0]
        difference = mean - joint
        local.scatter = accelerator.reduce(scatter.addr(difference, difference, alpha=local.count), reduction="sum")
        local.mean, local.count = joint, int(total[0])

    @property
    def n_tokens(self) -> int:
        """Number of tokens seen, without padding."""
        return max((moments.count for moments in self._layers), default=0)

    @property
    def n_features(self) -> int:
        """Width of the widest layer."""
        return max((len(moments.mean) for moments in self._layers), default=0)

    def results(self, model: str) -> list[LayerActivations]:
        """Return activation variance and effective rank of every layer; `model` is the name put in the rows."""
        rows = []
        for layer, moments in enumerate(self._layers):
            covariance = moments.scatter / moments.count
            variance = float(covariance.diagonal().mean())
            rows.append(LayerActivations(model, layer, variance, effective_rank(covariance)))
        return rows


def effective_rank(covariance: torch.Tensor) -> float:
    """
    Compute `exp(-sum p ln p)`, `p` the eigenvalues over their sum (Roy and Vetterli 2007); 0 for a zero matrix, NaN
    for one that is not finite, as of a model that overflows.

    Args:
        covariance (`torch.Tensor`): Symmetric positive semidefinite, `(d, d)`, float64.
    """
    if not covariance.isfinite().all():
        return math.nan
    # Rounding makes zero eigenvalues slightly negative; xlogy below takes 0 ln 0 as 0.
    eigenvalues = torch.linalg.eigvalsh(covariance).clamp(min=0)
    total = eigenvalues.sum()
    if total == 0:
        return 0.0
    shares = eigenvalues / total
    return float(torch.exp(-torch.special.xlogy(shares, shares).sum()))
