"""Carry out decisions of spectral methods, and say what to do where LAPACK cannot."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import numpy as np

from hf_frmerge.errors import MergeError, NonFiniteError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from hf_frmerge.geometry.lowrank import Factors
    from hf_frmerge.methods.spectral.decision import Spectral

T = TypeVar("T")


def merge_factors(tensor: str, decision: Spectral, factors: Sequence[Factors]) -> Factors:
    """
    Merge the low-rank deltas of a tensor as cores; return the factors of the merged delta before it is scaled.

    Raises:
        NonFiniteError: If a sum of the deltas may be beyond float32.
        MergeError: If the singular values of the cores cannot be computed.
    """
    try:
        return by_lapack(tensor, lambda: decision.merge_factors(factors))
    except OverflowError as error:
        raise NonFiniteError(
            f"Tensor {tensor!r}: the experts' deltas are so large that their sum may leave the range of float32, in "
            "which they are merged. Lower the lora_alpha of the largest in its adapter_config.json, or leave it out."
        ) from error


def by_lapack(tensor: str, compute: Callable[[], T]) -> T:
    """Return what `compute` does. Raises `MergeError` with the name of the tensor if LAPACK gives up."""
    try:
        return compute()
    except np.linalg.LinAlgError as error:
        raise MergeError(
            f"Tensor {tensor!r}: the singular values of the experts' deltas could not be computed ({error}). Use "
            "another method."
        ) from error
