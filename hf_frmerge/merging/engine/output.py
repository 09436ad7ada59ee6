"""What the engine writes to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from hf_frmerge.kernels.interface import Kernels
    from hf_frmerge.merging.engine.outcomes import FactorDetails
    from hf_frmerge.merging.engine.tensor_work import TensorWork
    from hf_frmerge.merging.planning.blocks import Piece


class Output(Protocol):
    """
    What the engine writes to. Methods that take a piece are called from any thread.

    Attributes:
        staging: folder of what is unfinished.
        notes: what should be said about the output, known when all is laid out.
    """

    staging: Path
    notes: list[str]

    def begin(self) -> bool:
        """Make the unfinished files, or go on with those of an earlier run; return whether any had to be made."""
        ...

    def lay_out(self, tensors: Sequence[TensorWork]) -> None:
        """Learn what was decided for a batch, before any of it is written or read back."""
        ...

    def merge(self, kernels: Kernels, tensor: TensorWork, piece: Piece) -> str:
        """Carry out the decision on a piece and write it; return the digest of what was written."""
        ...

    def copy(self, kernels: Kernels, tensor: TensorWork, piece: Piece) -> str:
        """Write a piece of the one tensor there is; return the digest of what was written."""
        ...

    def read_back(self, tensor: TensorWork, piece: Piece) -> str:
        """Return the digest of what lies in the unfinished output."""
        ...

    def details(self, tensor: str) -> FactorDetails | None:
        """Return how the factors of a written module came out; `None` where the decision says all."""
        ...

    def sync(self) -> None:
        """Force to disk what this process wrote."""
        ...

    def publish(self) -> dict[str, Path]:
        """Give the files their names; return all that are not shards, but for the config, by name."""
        ...

    def write_config(self) -> Path:
        """Write the config, without which no loader takes the folder for a model, beside what is unfinished."""
        ...

    def close(self) -> None:
        """Close the files; they stay for a resume."""
        ...
