"""Prompts in batches, and the hidden states of the models that run over them."""

# Shape suffixes: B = prompts of a batch, T = tokens, H = hidden size.

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hf_frmerge.calibration.blocks.blockwise_model import Call


@dataclass
class Batch:
    """
    Prompts of one expert that run together.

    Attributes:
        expert: index of the expert.
        inputs: `input_ids` and, where prompts differ in length, `attention_mask`.
        is_held_out: whether the prompts judge the fit instead of taking part in it.
        calls: the other arguments of every block; the same for all models.
    """

    expert: int
    inputs: dict[str, Tensor]
    is_held_out: bool
    calls: list[Call] = field(default_factory=list)

    @property
    def mask_BT(self) -> Tensor | None:
        """Which places hold tokens; `None` if all do."""
        mask = self.inputs.get("attention_mask")
        return None if mask is None else mask.bool()

    @property
    def n_tokens(self) -> int:
        """Number of tokens, without padding."""
        mask = self.mask_BT
        return self.inputs["input_ids"].numel() if mask is None else int(mask.sum())

    def prompt(self, row: int) -> dict[str, Tensor]:
        """Return the inputs of one prompt, as a batch of its own."""
        return {name: values[row : row + 1] for name, values in self.inputs.items()}

    def tokens(self, values_BTH: Tensor) -> Tensor:
        """Return the values of the tokens alone, `(tokens, H)`, without padding; `(B * T, H)` is taken as well."""
        flat, mask = values_BTH.reshape(-1, values_BTH.shape[-1]), self.mask_BT
        return flat if mask is None else flat[mask.reshape(-1)]


def in_batches(
    prompts: Sequence[NDArray[np.int64]], expert: int, size: int, pad: int, *, is_held_out: bool, device: torch.device
) -> Iterator[Batch]:
    """
    Yield prompts in batches, the longest first, so that few places are padding.

    Args:
        prompts: Token ids of every prompt.
        expert: Index of the expert they belong to.
        size: Prompts in a batch of the longest; of shorter ones as many more as have no more tokens.
        pad: Token id for the places after a prompt's end; masked.
        is_held_out: Stored in the batches.
        device: Where the batches go.
    """
    ordered = sorted(prompts, key=len, reverse=True)  # stable, so that the order of equals is the user's
    start, most = 0, size * len(ordered[0]) if ordered else 0
    while start < len(ordered):
        longest = len(ordered[start])
        part = [ids for ids in ordered[start : start + most // longest] if 2 * len(ids) > longest]
        start += len(part)
        ids = torch.full((len(part), len(part[0])), pad)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(part):
            ids[row, : len(prompt)] = torch.from_numpy(prompt)
            mask[row, : len(prompt)] = 1
        inputs = {"input_ids": ids.to(device)}
        if len(part[-1]) < len(part[0]):
            inputs["attention_mask"] = mask.to(device)
        yield Batch(expert, inputs, is_held_out)
