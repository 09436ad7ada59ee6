"""Carry out decisions of spectral methods, and say what to do where LAPACK cannot."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import numpy as np

from hf_frmerge.errors import MergeError, NonFiniteError
from hf_frmerge.methods.spectral.decision import most_norms

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from hf_frmerge.geometry.lowrank import Factors
    from hf_frmerge.methods.spectral.decision import Spectral

T = TypeVar("T")


def merge_factors(tensor: str, decision: Spectral, factors: Sequence[Factors], labels: Mapping[int, str]) -> Factors:
    """
    Merge the low-rank deltas of a tensor as cores; return the factors of the merged delta before it is scaled.

    Args:
        tensor: Its name, for messages.
        decision: Of the method.
        factors: Of the delta of every expert.
        labels: Name of every expert, for messages.

    Raises:
        NonFiniteError: If a sum of the deltas may be beyond float32.
        MergeError: If the singular values of the cores cannot be computed.
    """
    try:
        return by_lapack(tensor, lambda: decision.merge_factors(factors))
    except OverflowError as error:
        largest = labels[int(np.argmax(most_norms(factors)))]
        raise NonFiniteError(
            f"Tensor {tensor!r}: the low-rank delta of {largest} is so large that a sum with it may leave the range "
            "of float32, in which deltas are merged. Lower its lora_alpha in adapter_config.json, or leave it out."
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
