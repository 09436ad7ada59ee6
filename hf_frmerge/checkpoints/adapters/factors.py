"""
Low-rank delta of one weight, and the effective weight of a DoRA module.

For every adapted module PEFT stores a factor `down` (`lora_A`, `(r, n_in)`) and a factor `up` (`lora_B`,
`(n_out, r)`). The delta of the weight is `scale * up @ down`. It is transposed if the checkpoint stores the weight as
`(n_in, n_out)`, as GPT-2's `Conv1D` and embeddings do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_128

from hf_frmerge.checkpoints.tensors.floats import widen
from hf_frmerge.checkpoints.tensors.reader import Checkpoint, TensorInfo
from hf_frmerge.errors import CheckpointError, NonFiniteError
from hf_frmerge.geometry.lowrank import Factors
from hf_frmerge.geometry.sphere import norms
from hf_frmerge.kernels.product import product


@dataclass(frozen=True)
class LowRankDelta:
    """
    Delta of one weight as two factors, which are read on demand.

    Attributes:
        checkpoint: the adapter's tensors.
        module: path of the module in the base model, such as `"model.layers.0.self_attn.q_proj"`.
        target: tensor of the base checkpoint that the delta belongs to; `module + ".weight"` until it is matched.
        kind: `"linear"` (also GPT-2's `Conv1D`), `"embedding"` or `"conv"`.
        rank: number of columns of `up` and rows of `down`.
        scale: `alpha / r`, or `alpha / sqrt(r)` for rsLoRA.
        shape: shape of the delta as the base checkpoint stores it.
        transposed: whether that shape is the one of `(up @ down).T`.
        down, up: location of the factors.
        magnitude: DoRA's norm of every output row; a module that has it has no low-rank delta.
    """

    checkpoint: Checkpoint
    module: str
    target: str
    kind: Literal["linear", "embedding", "conv"]
    rank: int
    scale: float
    shape: tuple[int, ...]
    transposed: bool
    down: TensorInfo
    up: TensorInfo
    magnitude: TensorInfo | None = None

    @property
    def is_dora(self) -> bool:
        """Whether this is a DoRA module, whose effective weight is not the base plus a low-rank delta."""
        return self.magnitude is not None

    @property
    def stored(self) -> tuple[TensorInfo, ...]:
        """The tensors that it is made of."""
        return tuple(part for part in (self.down, self.up, self.magnitude) if part is not None)

    @property
    def files(self) -> set[tuple[Checkpoint, str]]:
        """The files its factors are read from."""
        return {(self.checkpoint, self.down.file), (self.checkpoint, self.up.file)}

    def read(self) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
        """
        Read the factors in PEFT's layout, without the scale.

        Returns:
            `tuple`: `up` `(n_out, r)` and `down` `(r, n_in)`, float32 (float64 if stored as such). The kernel of a
            convolution is flattened into `n_in`.

        Raises:
            CheckpointError: If the module is a DoRA module, which has no low-rank delta.
            NonFiniteError: If a factor holds NaN or infinity.
        """
        self.check_low_rank()
        return self._read_pair()

    def read_digested(self) -> tuple[NDArray[np.floating], NDArray[np.floating], str]:
        """Return what `read` and `digest` return, reading the stored bytes once."""
        self.check_low_rank()
        hashed = self._hash()
        return *self._read_pair(hashed), hashed.hexdigest()

    def digest(self) -> str:
        """Return the XXH3-128 digest of the scale and the stored bytes of `down` and `up`."""
        hashed = self._hash()
        for info in (self.down, self.up):
            hashed.update(self.checkpoint.read(info.name).data)
            self.checkpoint.release(info.name)
        return hashed.hexdigest()

    def check_low_rank(self) -> None:
        """Raise `CheckpointError` if this is a DoRA module, which has no low-rank delta."""
        if self.is_dora:
            raise CheckpointError(
                f"Adapter {self.checkpoint.source.spec!r}, module {self.module!r}: use_dora is set. A DoRA update is "
                'not low-rank, so it cannot be merged as factors; use adapter_output="merged", which merges the '
                "effective weights."
            )

    def factors(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """
        Read the factors in the layout of the base checkpoint, with the scale multiplied into the left one.

        Returns:
            `tuple`: `left` `(rows, r)` and `right` `(r, cols)`, float32, contiguous. Rows `[a, b)` of the delta
            (flattened to `(shape[0], -1)`) are `left[a:b] @ right`.

        Raises:
            CheckpointError: If the module is a DoRA module, which has no low-rank delta.
            NonFiniteError: If a factor holds NaN or infinity, or does not fit into float32.
        """
        return self._lay_out(*self.read())

    def oriented(self) -> Factors:
        """
        Read the factors in the layout of the base checkpoint, with the scale beside them.

        Raises what `read` raises.
        """
        return Factors(*self._orient(*self.read()), self.scale)

    def read_magnitude(self) -> NDArray[np.floating]:
        """Read DoRA's norm of every output row, `(rows,)`."""
        if self.magnitude is None:
            raise ValueError(f"Module {self.module!r} has no magnitude: it is not a DoRA module.")
        return self._read(self.magnitude).reshape(-1)

    def dora_weight(self) -> DoraWeight:
        """Read factors and magnitudes, from which the effective weight of a DoRA module is computed row by row."""
        return DoraWeight(*self._lay_out(*self._read_pair()), self.read_magnitude())

    def _read_pair(self, hashed: xxh3_128 | None = None) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
        down, up = self._read(self.down, hashed), self._read(self.up, hashed)
        return up.reshape(-1, self.rank), down.reshape(self.rank, -1)

    def _lay_out(
        self, up: NDArray[np.floating], down: NDArray[np.floating]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        left, right = self._orient(up, down)
        scaled = left * np.float64(self.scale)  # in float64, so that a scale such as 1/3 is not rounded beforehand
        with np.errstate(over="ignore"):
            single = scaled.astype(np.float32, order="C"), np.ascontiguousarray(right, dtype=np.float32)
        if not all(np.isfinite(factor).all() for factor in single):
            raise NonFiniteError(
                f"Adapter {self.checkpoint.source.spec!r}: the factors of {self.module!r}, with their scale "
                f"{self.scale:.4g}, leave the range of float32, in which they are multiplied. Lower its lora_alpha in "
                "adapter_config.json, or leave this adapter out."
            )
        return single

    def _orient(
        self, up: NDArray[np.floating], down: NDArray[np.floating]
    ) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
        return (down.T, up.T) if self.transposed else (up, down)

    def _hash(self) -> xxh3_128:
        return xxh3_128(repr(self.scale).encode())

    def _read(self, info: TensorInfo, hashed: xxh3_128 | None = None) -> NDArray[np.floating]:
        data = self.checkpoint.read(info.name)
        if hashed is not None:
            hashed.update(data.data)
        values = widen(data, info.dtype)
        # Merged into an adapter all modules are one batch, so pages kept until its end would be the whole files.
        self.checkpoint.release(info.name)
        if not np.isfinite(values).all():
            raise NonFiniteError(
                f"Adapter {self.checkpoint.source.spec!r}: tensor {info.name!r} holds "
                f"{np.count_nonzero(~np.isfinite(values))} NaN or infinite values of {info.numel}. Leave this adapter "
                "out, or repair it."
            )
        return values


@dataclass(frozen=True)
class DoraWeight:
    """
    Effective weight of a DoRA module (arXiv 2402.09353, eq. 5): `magnitude * (W0 + delta) / ‖W0 + delta‖` by rows.

    Attributes:
        left: `(rows, r)`, float32, scale included.
        right: `(r, cols)`, float32.
        magnitude: `(rows,)`.
    """

    left: NDArray[np.float32]
    right: NDArray[np.float32]
    magnitude: NDArray[np.floating]

    def rows(self, base_rows: NDArray[np.floating], start: int) -> NDArray[np.float32]:
        """
        Compute the effective weight of the rows from `start` on.

        Args:
            base_rows (`numpy.ndarray`):
                Whole rows of the base weight, `(n, cols)`.
            start (`int`):
                Index of the first of them.

        Returns:
            `numpy.ndarray`: `(n, cols)`, float32. A row that is zero has no direction and stays zero.
        """
        stop = start + len(base_rows)
        rows = base_rows + product(self.left[start:stop], self.right)
        lengths = norms(rows.astype(np.float64))
        magnitudes = self.magnitude[start:stop].astype(np.float64)
        factor = np.divide(magnitudes, lengths, out=np.zeros_like(lengths), where=lengths > 0)
        return (rows * factor[:, None]).astype(np.float32)
