"""Interfaces of an output: to the engine, which writes pieces, and to a merge, which makes a folder of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from hf_frmerge.kernels.interface import Kernels
    from hf_frmerge.merging.engine.outcomes import FactorDetails
    from hf_frmerge.merging.engine.tensor_stack import TensorStack
    from hf_frmerge.merging.engine.tensor_work import TensorWork
    from hf_frmerge.merging.planning.blocks import Piece


class TensorOutput(Protocol):
    """Where merged pieces go: what the engine asks of an output. Methods of a piece are called from any thread."""

    def lay_out(self, tensors: Sequence[TensorWork]) -> None:
        """Take the decisions for a batch, before any of it is written or read back."""
        ...

    def merge(self, kernels: Kernels, tensor: TensorWork, piece: Piece) -> str:
        """Apply the decision to a piece and write the result; return its digest."""
        ...

    def merge_stack(self, kernels: Kernels, stack: TensorStack) -> list[str]:
        """Do what `merge` does for all tensors of a stack; return the digest of each."""
        ...

    def copy(self, kernels: Kernels, tensor: TensorWork, piece: Piece) -> str:
        """Write a piece of the only input; return its digest."""
        ...

    def read_back(self, tensor: TensorWork, piece: Piece) -> str:
        """Return the digest of a piece that was written."""
        ...

    def details(self, tensor: str) -> FactorDetails | None:
        """Return how the factors of a written module came out; `None` where the decision says all."""
        ...


class Output(TensorOutput, Protocol):
    """
    Output to files in a folder.

    Attributes:
        staging: folder of the unfinished files.
        notes: notes for the user about the output, complete after `lay_out`.
    """

    staging: Path
    notes: list[str]

    def begin(self) -> bool:
        """Create the unfinished files, or open those of an earlier run; return whether any was created."""
        ...

    def sync(self) -> None:
        """Sync to disk what this process wrote."""
        ...

    def publish(self) -> dict[str, Path]:
        """Rename the files into place; return the paths of those that are neither shards nor the config, by name."""
        ...

    def write_config(self) -> Path:
        """Write the config into the staging folder; renaming it is the last step of a merge."""
        ...

    def close(self) -> None:
        """Close the files; they stay for a resume."""
        ...
