"""From a model's logits to what is kept of them, a few rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

# Logits taken at a time: on a CPU they stay in its second-level cache, on a GPU they fill it.
_CHUNK_ELEMENTS = {"cpu": 1 << 19}
_CHUNK_ELEMENTS_ELSEWHERE = 1 << 25


@dataclass(frozen=True)
class Predictions:
    """
    Next-token distributions of a few consecutive tokens of one block.

    Attributes:
        start: row of the first within its block.
        logits: `(n, V)`, float32.
        exponentials: `exp(logits - their maximum)`, `(n, V)`, float32.
        log_normaliser: `log sum exp(logits)`, `(n, 1)`, float64; good to 1e-7, the rounding of a float32 sum.
        first: first guesses, `(n,)`, int64.
        targets: the tokens that follow in the text, `(n,)`, int64.
        log_prob: their log-probabilities, `(n,)`, float64.
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
        """Return log-probabilities of the tokens `ids`, `(n, k)`, or of all, `(n, V)`; float64."""
        logits = self.logits
        if ids is not None:
            logits = logits.gather(1, torch.from_numpy(ids.astype(np.int64)).to(logits.device))
        return (logits.double() - self.log_normaliser).cpu().numpy()


def predictions(logits: torch.Tensor, targets: torch.Tensor) -> Iterator[Predictions]:
    """
    Normalise logits in chunks: whatever the vocabulary, only a few MB of float32 exist beside the model's own logits.

    Args:
        logits (`torch.Tensor`): `(n, V)`, any floating dtype.
        targets (`torch.Tensor`): `(n,)`, int64.

    Yields:
        `Predictions`: of consecutive rows.
    """
    if logits.device.type == "mps":  # knows no float64
        logits, targets = logits.cpu(), targets.cpu()
    elements = _CHUNK_ELEMENTS.get(logits.device.type, _CHUNK_ELEMENTS_ELSEWHERE)
    n_rows = max(elements // logits.shape[-1], 1)
    for start in range(0, len(logits), n_rows):
        rows = logits[start : start + n_rows].float()
        row_targets = targets[start : start + n_rows, None]
        highest = rows.amax(dim=-1, keepdim=True)
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
    # On a CPU numpy's is twenty times as fast as torch's: it would cost more than the softmax.
    return rows.numpy().argmax(axis=-1) if rows.device.type == "cpu" else rows.argmax(dim=-1).cpu().numpy()
