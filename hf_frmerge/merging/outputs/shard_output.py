"""Output of merged tensors to the shards of a full model."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hf_frmerge.checkpoints.beside.donor import write_config
from hf_frmerge.checkpoints.beside.look_beside import copy_files, write_files
from hf_frmerge.checkpoints.tensors.shard_index import INDEX_FILE
from hf_frmerge.checkpoints.tensors.writer import CheckpointWriter, check_free_space
from hf_frmerge.kernels.interface import digest, digests_of_parts
from hf_frmerge.merging.operands.apply import apply
from hf_frmerge.merging.operands.tensor_inputs import TensorInputs
from hf_frmerge.merging.outputs.blas_threads import one_blas_thread
from hf_frmerge.merging.planning.blocks import PIECE_ELEMENTS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hf_frmerge.kernels.interface import Kernels
    from hf_frmerge.merging.engine.tensor_stack import TensorStack
    from hf_frmerge.merging.engine.tensor_work import TensorWork
    from hf_frmerge.merging.planning.blocks import Piece
    from hf_frmerge.merging.planning.plan import MergePlan


class ShardOutput:
    """Output of tensors to their places in the shards of a full model."""

    def __init__(self, plan: MergePlan) -> None:
        assert plan.layout is not None
        self._plan = plan
        self._writer = CheckpointWriter(plan.layout, plan.args.output_dir)
        self.staging = self._writer.staging
        self.notes: list[str] = []
        self._local = threading.local()
        self._resources = ExitStack()
        self._resources.enter_context(one_blas_thread(plan))

    def begin(self) -> bool:
        """Create the unfinished shards, or open those of an earlier run; return whether any was created."""
        if not self.staging.exists():  # files of an earlier run have their full size already
            check_free_space(self._writer.output_dir, self._writer.layout.file_bytes)
        return bool(self._writer.reopen())

    def lay_out(self, tensors: Sequence[TensorWork]) -> None:
        """Do nothing: the plan has the place of every tensor."""

    def merge(self, kernels: Kernels, tensor: TensorWork, piece: Piece) -> str:
        """Apply the decision to a piece and write the result; return its digest."""
        assert tensor.decision is not None and isinstance(tensor.inputs, TensorInputs)
        out = self._buffer(tensor, piece)
        written = apply(tensor.inputs, tensor.decision, kernels, piece, out, tensor.step.dtype)
        self._writer.write(tensor.step.name, tensor.byte_range(piece)[0], out)
        return written

    def merge_stack(self, kernels: Kernels, stack: TensorStack) -> list[str]:
        """Apply the decisions for a stack and write the results; return the digest of each."""
        assert stack.decision is not None and isinstance(stack.inputs, TensorInputs)
        piece = stack.pieces[0]
        out = self._buffer(stack, piece)
        apply(stack.inputs, stack.decision, kernels, piece, out, stack.step.dtype)
        self._writer.write_next([tensor.step.name for tensor in stack.tensors], out)
        return digests_of_parts(out, len(stack.tensors))

    def copy(self, kernels: Kernels, tensor: TensorWork, piece: Piece) -> str:
        """Write a piece of the only input; return its digest."""
        assert isinstance(tensor.inputs, TensorInputs)
        data, written = tensor.inputs.copy(kernels, piece, self._buffer(tensor, piece), tensor.step.dtype)
        self._writer.write(tensor.step.name, tensor.byte_range(piece)[0], data)
        return written

    def read_back(self, tensor: TensorWork, piece: Piece) -> str:
        """Return the digest of a piece in the unfinished shard."""
        return digest(self._writer.read_back(tensor.step.name, *tensor.byte_range(piece)))

    def details(self, tensor: str) -> None:
        """Return None: the decision is all there is to record."""

    def sync(self) -> None:
        """Sync this process's shards to disk."""
        self._writer.sync()

    def publish(self) -> dict[str, Path]:
        """Copy the files that the model takes from its donor, and rename the shards into place."""
        folder = self._writer.output_dir
        names = copy_files(self._plan.carried, folder) + write_files(self._plan.generated, folder)
        self._writer.publish()
        names += [INDEX_FILE] if self._writer.layout.index_json() is not None else []
        return {name: folder / name for name in names}

    def write_config(self) -> Path:
        """Write `config.json` into the staging folder."""
        plan = self._plan
        return write_config(plan.donor.source, self.staging, dtype=plan.args.dtype, changes=plan.config_changes)

    def close(self) -> None:
        """Close the shards."""
        self._resources.close()
        self._writer.close()

    def _buffer(self, tensor: TensorWork, piece: Piece) -> NDArray[np.uint8]:
        """Return this thread's output buffer, cut to the piece; it is reused, since fresh memory is slow to touch."""
        start, stop = tensor.byte_range(piece)
        held: NDArray[np.uint8] | None = self._local.__dict__.get("buffer")
        if held is None or held.size < stop - start:
            held = self._local.buffer = np.empty(max(stop - start, PIECE_ELEMENTS * 4), np.uint8)
        return held[: stop - start]
