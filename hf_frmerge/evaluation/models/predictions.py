"""Normalise a model's logits to next-token distributions, a few rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

# Logits in a chunk: 2 MiB of float32 stay in a CPU's second-level cache; a GPU needs large chunks to be busy.
_CHUNK_ELEMENTS = {"cpu": 1 << 19}
_CHUNK_ELEMENTS_ELSEWHERE = 1 << 25


@dataclass(frozen=True)
class Predictions:
    """
    Next-token distributions of a few consecutive tokens of one block.

    Attributes:
        start: row of the first prediction within its block.
        logits: `(n, V)`, float32.
        exponentials: `exp(logits - their maximum)`, `(n, V)`, float32.
        log_normaliser: `log sum exp(logits)`, `(n, 1)`, float64; good to 1e-7, the rounding of a float32 sum.
        first: likeliest tokens, `(n,)`, int64.
        targets: tokens that follow in the text, `(n,)`, int64.
        log_prob: log-probabilities of `targets`, `(n,)`, float64.
    """

    start: int
    logits: torch.Tensor
    exponentials: torch.Tensor
    log_normaliser: torch.Tensor
    first: NDArray[np.int64]
    targets: NDArray[np.int64]
    log_prob: NDArray[np.float64]

    def __len__(self) -> int:
        """Return the number of predictions."""
        return len(self.targets)

    def log_probs(self, ids: NDArray[np.integer] | None = None) -> NDArray[np.float64]:
        """Return the log-probabilities of the tokens `ids`, `(n, k)`, or of all tokens, `(n, V)`; float64."""
        logits = self.logits
        if ids is not None:
            logits = logits.gather(1, torch.from_numpy(ids.astype(np.int64)).to(logits.device))
        return (logits.double() - self.log_normaliser).cpu().numpy()


def predictions(logits: torch.Tensor, targets: torch.Tensor) -> Iterator[Predictions]:
    """
    Normalise logits in chunks, so that the float32 copies take a few MB on a CPU for any vocabulary.

    Args:
        logits (`torch.Tensor`): `(n, V)`, any floating dtype.
        targets (`torch.Tensor`): `(n,)`, int64.

    Yields:
        `Predictions`: distributions of consecutive rows.
    """
    if logits.device.type == "mps":  # MPS has no float64
        logits, targets = logits.cpu(), targets.cpu()
    elements = _CHUNK_ELEMENTS.get(logits.device.type, _CHUNK_ELEMENTS_ELSEWHERE)
    n_rows = max(elements // logits.shape[-1], 1)
    for start in range(0, len(logits), n_rows):
        rows = logits[start : start + n_rows].float()
        row_targets = targets[start : start + n_rows, None]
        highest = rows.amax(dim=-1, keepdim=True)
        # The maximum is subtracted before exp, which overflows float32 above 88.
        exponentials = (rows - highest).exp_()
        log_normaliser = highest.double() + exponentials.sum(dim=-1, keepdim=True).double().log()
        yield Predictions(
            start,
            rows,
            exponentials,
            log_normaliser,
            _argmax(rows),
            row_targets[:, 0].cpu().numpy(),
            (rows.gather(1, row_targets).double() - log_normaliser)[:, 0].cpu().numpy(),
        )


def _argmax(rows: torch.Tensor) -> NDArray[np.int64]:
    """Return the index of the largest logit of every row."""
    # On a CPU numpy's argmax is 20 times as fast as torch's, which takes longer than the softmax.
    return rows.numpy().argmax(axis=-1) if rows.device.type == "cpu" else rows.argmax(dim=-1).cpu().numpy()
