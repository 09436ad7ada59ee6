"""Inputs of one tensor: the base and the experts, as raw bytes or as low-rank factors."""

# Shape suffixes: B = blocks, K = operands (the base first where there is one), N = experts.

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
from xxhash import xxh3_128_hexdigest

from hf_frmerge.checkpoints.page_cache import MappedRange, prefetch, release
from hf_frmerge.checkpoints.tensors.floats import widen
from hf_frmerge.checkpoints.tensors.reader import FLOAT_DTYPES, some
from hf_frmerge.errors import NonFiniteError
from hf_frmerge.geometry.lowrank import Factors, base_gram, factor_gram
from hf_frmerge.geometry.portable import fold
from hf_frmerge.kernels.interface import Operand, digest, digests_of_parts
from hf_frmerge.kernels.product import product
from hf_frmerge.merging.operands.dense_tensors import DenseTensor, StoredTensor
from hf_frmerge.merging.operands.low_rank_deltas import LowRankDeltas
from hf_frmerge.merging.operands.overflow import (
    check_squares,
    delta_overflows,
    result_overflows,
    saturate,
    squares_leave_float64,
)
from hf_frmerge.merging.planning.blocks import Piece

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from hf_frmerge.checkpoints.tensors.reader import Checkpoint
    from hf_frmerge.kernels.interface import Kernels
    from hf_frmerge.methods.post_steps import SingularValueCalibration


SHORT = 1 << 14
"""Up to this many elements float64 products are used: they cost too little to be worth saving."""


def join_digests(digests: Sequence[str]) -> str:
    """Return the digest of a tensor, computed from those of its pieces, into which it is cut by its shape alone."""
    return digests[0] if len(digests) == 1 else xxh3_128_hexdigest("".join(digests).encode())


@dataclass(frozen=True)
class TensorInputs:
    """
    Base and experts of one tensor.

    Attributes:
        name: tensor name, for messages.
        cols: elements of a row; low-rank deltas are computed by whole rows.
        base: the base model's tensor; needed in delta space, and if any expert is an adapter.
        dense: expert index -> its full tensor.
        low_rank: expert index -> its low-rank delta. An expert in neither map equals the base in this tensor.
        labels: name of the base (index -1) and of every expert, for messages.
        space: `"weights"` or `"deltas"`: what the points are, which decides the coefficient of the base.
        correction: what calibration adds to the merged tensor, whatever the method.
        factored: whether the Gram matrix is computed from the factors without forming dense deltas: if all experts are
            low-rank and the tensor is one block.
        post_step: what is done to the merged tensor, a whole matrix, before the correction.
        row_len: elements that are ranked among each other: a row of a matrix, or a whole vector.
        saturates: whether values beyond the output's dtype become its largest number, instead of an error.
        saturated: how many did, by the first element of a piece; filled in as pieces are merged.
    """

    name: str
    cols: int
    n_experts: int
    base: DenseTensor | None
    dense: Mapping[int, DenseTensor]
    low_rank: LowRankDeltas
    labels: Mapping[int, str]
    space: str = "weights"
    factored: bool = False
    row_len: int = 1
    correction: DenseTensor | None = None
    post_step: SingularValueCalibration | None = None
    saturates: bool = False
    saturated: dict[int, int] = field(default_factory=dict, compare=False)

    @property
    def n_saturated(self) -> int:
        """How many values were beyond the output's dtype and became its largest number."""
        return sum(self.saturated.values())

    @property
    def has_base(self) -> bool:
        """Whether the first operand of a Gram matrix is the base."""
        return self.base is not None

    def gram(
        self, kernels: Kernels, piece: Piece, *, precise: bool = False
    ) -> tuple[NDArray[np.float64], dict[int, str]]:
        """
        Return the difference Gram matrices `(B, K, K)` of a piece, and a digest of every stored operand.

        Rows of experts that equal the base are zero. Raises `NonFiniteError` with the name of the expert if it holds
        NaN or infinity, or if squares leave the range of float64.

        Args:
            precise: Whether to multiply in float64; set if the squares of a tensor are tiny.
        """
        if self.factored:
            assert self.base is not None
            self.check_finite(kernels, [self.base.read(piece.start, piece.stop)], [self.labels[-1]])
            whole = self._factored_gram() if piece.start == 0 else np.zeros(1)
            return whole, self.digests(piece)
        prefetch(self._mapped(piece.start, piece.stop))
        operands, owners = self._gram_operands(piece)
        # Float32 products of 16-bit floats are exact, those of float32 values are not. And over a short tensor
        # rounding errors do not average out.
        is_tiny = precise
        precise = precise or piece.stop - piece.start <= SHORT or any(o.dtype == "F32" for o in operands)
        compact, read = kernels.gram_and_digests(operands, piece.n_blocks, piece.block_len, precise=precise)
        digests = {owner: value or self.low_rank.factors(owner).digest for owner, value in zip(owners, read)}
        if not np.isfinite(compact).all():
            self.check_finite(kernels, operands, [self.labels[owner] for owner in owners])
            if not precise:  # the inputs are finite, so float32 products have overflown
                return self.gram(kernels, piece, precise=True)
            largest = int(np.argmax(np.isnan(compact) | np.isinf(compact))) % len(owners)
            raise squares_leave_float64(self.name, self.labels[owners[largest]])
        if is_tiny and any(operand.dtype == "F64" for operand in operands):
            check_squares(self.name, compact, operands, [self.labels[owner] for owner in owners])
        # Experts that equal the base have no operand; their rows and columns stay zero.
        rows = [owner + self.has_base for owner in owners]
        size = self.n_experts + self.has_base
        gram = np.zeros((piece.n_blocks, size, size))
        gram[:, np.array(rows)[:, None], rows] = compact
        return gram, digests

    def combine(
        self,
        kernels: Kernels,
        piece: Piece,
        coefficients_BN: NDArray[np.float64],
        out: NDArray[np.uint8],
        out_dtype: str,
    ) -> str:
        """
        Write the merged elements of a piece into `out`, each rounded once from float64, and return their digest.

        Args:
            coefficients_BN: float64, on the experts' points; a row for every block of the tensor, or one row for all.

        Raises:
            NonFiniteError: If an element is not finite in `out_dtype`; the message names the cause.
        """
        prefetch(self._mapped(piece.start, piece.stop))
        if len(coefficients_BN) > 1:
            coefficients_BN = coefficients_BN[piece.first_block : piece.first_block + piece.n_blocks]
        operands: list[Operand] = []
        labels: list[str] = []
        columns: list[NDArray[np.float64]] = []
        dense = sorted(self.dense)
        if self.base is not None:
            # A dense expert i contributes c_i x_i = c_i base + c_i delta_i, a low-rank one only c_i delta_i. The
            # result must hold the base once (in delta space) or sum_i c_i times (in weight space), so the base gets
            # that number minus the share that dense experts bring along.
            share = fold(coefficients_BN[:, dense].T)
            total = 1.0 if self.space == "deltas" else fold(coefficients_BN.T.copy())
            operands.append(self.base.read(piece.start, piece.stop))
            labels.append(self.labels[-1])
            columns.append(total - share)
        for index in dense:
            operands.append(self.dense[index].read(piece.start, piece.stop))
            labels.append(self.labels[index])
            columns.append(coefficients_BN[:, index])
        if self.low_rank:
            operands.append(self.low_rank.weighted_sum(piece, coefficients_BN))
            labels.append(some(self.labels[index] for index in sorted(self.low_rank)))
            columns.append(np.ones(piece.n_blocks))
        return self.write_sum(kernels, operands, labels, np.stack(columns, axis=1), piece, out, out_dtype)

    def delta_operands(self, start: int, stop: int) -> tuple[list[Operand], list[str]]:
        """Return elements `[start, stop)` of the base and of every expert, and their names for messages."""
        prefetch(self._mapped(start, stop))
        operands, owners = self._gram_operands(Piece(start, stop, 0, 1))
        by_owner = dict(zip(owners, operands))
        zeros = None
        for index in range(self.n_experts):
            if index not in by_owner:  # it equals the base
                zeros = zeros or Operand(np.zeros(4 * (stop - start), np.uint8), "F32", is_delta=True)
                by_owner[index] = zeros
        order = range(-1, self.n_experts)
        return [by_owner[owner] for owner in order], [self.labels[owner] for owner in order]

    def matrices(self, kernels: Kernels, piece: Piece) -> tuple[Operand, NDArray[np.float32], str]:
        """Return the base, the deltas as float32 matrices, and the base's name."""
        operands, labels = self.delta_operands(piece.start, piece.stop)
        base, *others = (widen(operand.data, operand.dtype) for operand in operands)
        deltas = np.empty((self.n_experts, piece.stop // self.cols, self.cols), np.float32)
        for delta, operand, values in zip(deltas, operands[1:], others):
            delta.reshape(-1)[:] = values if operand.is_delta else values - base
        if not np.isfinite(deltas).all():
            self.check_finite(kernels, operands, labels)
        return operands[0], deltas, labels[0]

    def copy(
        self, kernels: Kernels, piece: Piece, out: NDArray[np.uint8], out_dtype: str
    ) -> tuple[NDArray[np.uint8], str]:
        """
        Return a piece of the only input in the output's dtype (as stored, or converted into `out`), and its digest.

        Raises `NonFiniteError` for NaN and infinity, as `gram` and `combine` do.
        """
        operand = self.dense[0].read(piece.start, piece.stop)
        if operand.dtype in FLOAT_DTYPES:
            self.check_finite(kernels, [operand], [self.labels[0]])
        if operand.dtype == out_dtype:
            return operand.data, digest(operand.data)
        return out, self.write_sum(
            kernels, [operand], [self.labels[0]], np.ones((piece.n_blocks, 1)), piece, out, out_dtype
        )

    @property
    def files(self) -> set[tuple[Checkpoint, str]]:
        """The files it is read from."""
        stored = (tensor.files for tensor in self._stored())
        added = self.correction.files if self.correction is not None else set()
        return added.union(*stored, *(delta.files for delta in self.low_rank.values()))

    def release(self, piece: Piece) -> None:
        """Unmap the pages of a piece."""
        release(self._mapped(piece.start, piece.stop))

    def digests(self, piece: Piece) -> dict[int, str]:
        """Return the digests that `gram` returns, without computing anything else."""
        stored = {
            role: digest(tensor.read(piece.start, piece.stop).data) for role, tensor in self._stored_by_role().items()
        }
        return stored | {index: self.low_rank.factors(index).digest for index in self.low_rank}

    def digests_of_blocks(self, piece: Piece) -> dict[int, list[str]]:
        """Return by role the digest of every block of a piece; only for inputs that are all stored."""
        return {
            role: digests_of_parts(tensor.read(piece.start, piece.stop).data, piece.n_blocks)
            for role, tensor in self._stored_by_role().items()
        }

    def follow(self, others: TensorInputs) -> bool:
        """Whether all inputs of both tensors are stored, and each of these begins where the other tensor's ends."""
        if any(inputs.low_rank or inputs.correction or inputs.post_step for inputs in (self, others)):
            return False
        return self.dense.keys() == others.dense.keys() and all(
            isinstance(mine, StoredTensor) and isinstance(its, StoredTensor) and mine.follows(its)
            for mine, its in zip(self._stored(), others._stored())
        )

    def with_next(self, n: int) -> TensorInputs:
        """Return the inputs of `n` tensors of its size as those of one: its own, and those that `follow` them."""
        base, dense = self.base, {index: _stored_one(tensor).with_next(n) for index, tensor in self.dense.items()}
        # Which of them left the dtype is found by looking at each.
        return replace(self, base=base and _stored_one(base).with_next(n), dense=dense, saturates=False)

    def write_sum(
        self,
        kernels: Kernels,
        operands: list[Operand],
        labels: list[str],
        coefficients_BK: NDArray[np.float64],
        piece: Piece,
        out: NDArray[np.uint8],
        out_dtype: str,
    ) -> str:
        """
        Write a sum of operands, and of the correction, into `out`; return the digest of the result.

        Args:
            labels: Name of every operand, for messages.
            coefficients_BK: Factors of the operands, a row for every block of the piece.

        Raises:
            NonFiniteError: If an element is not finite in `out_dtype`; the message names the cause.
        """
        if self.correction is not None:
            operands, labels = (
                [*operands, self.correction.read(piece.start, piece.stop)],
                [*labels, "the calibration's correction"],
            )
            coefficients_BK = np.append(coefficients_BK, np.ones((len(coefficients_BK), 1)), axis=1)
        table = np.ascontiguousarray(coefficients_BK)
        combined = kernels.combine(operands, table, out, out_dtype, piece.n_blocks, piece.block_len)
        if not combined.is_finite:
            self.check_finite(kernels, operands, labels)  # an input may be the cause; its message is the better one
            within = saturate(kernels, operands, table, out, out_dtype, piece.block_len) if self.saturates else None
            if within is not None:
                combined, self.saturated[piece.start] = within
                return combined.digest
            raise result_overflows(kernels, self.name, operands, labels, table, out_dtype)
        return combined.digest

    def _factored_gram(self) -> NDArray[np.float64]:
        """Return the difference Gram `(1, K, K)` of the tensor; in delta space the base's row and column stay 0."""
        owners = sorted(self.low_rank)
        factors = [Factors(*self.low_rank.factors(index)[:2]) for index in owners]
        gram = np.zeros((1, self.n_experts + 1, self.n_experts + 1))
        inner = np.array([index + 1 for index in owners])
        if self.space == "deltas":
            gram[0, inner[:, None], inner] = factor_gram(factors, product)
        else:
            rows = np.concatenate([[0], inner])
            gram[0, rows[:, None], rows] = base_gram(self._base_rows(), factors, product)
        return gram

    def _base_rows(self) -> Iterator[NDArray[np.float64]]:
        """Yield the base in chunks of whole rows, as float64."""
        assert self.base is not None
        n_rows = len(self.low_rank.factors(min(self.low_rank)).left)
        step = max(1, SHORT * 16 // self.cols)
        for row in range(0, n_rows, step):
            start, stop = row * self.cols, min(row + step, n_rows) * self.cols
            operand = self.base.read(start, stop)
            yield widen(operand.data, operand.dtype).reshape(-1, self.cols).astype(np.float64)
            release(self._mapped(start, stop))

    def _mapped(self, start: int, stop: int) -> list[MappedRange]:
        tensors = [*self._stored(), *([self.correction] if self.correction is not None else [])]
        return [part for tensor in tensors if (part := tensor.mapped(start, stop)) is not None]

    def _stored(self) -> list[DenseTensor]:
        return list(self._stored_by_role().values())

    def _stored_by_role(self) -> dict[int, DenseTensor]:
        base = {-1: self.base} if self.base is not None else {}
        return base | {index: self.dense[index] for index in sorted(self.dense)}

    def _gram_operands(self, piece: Piece) -> tuple[list[Operand], list[int]]:
        operands, owners = [], []
        if self.base is not None:
            operands.append(self.base.read(piece.start, piece.stop))
            owners.append(-1)
        for index in range(self.n_experts):
            if index in self.dense:
                operands.append(self.dense[index].read(piece.start, piece.stop))
            elif index in self.low_rank:
                operands.append(self.low_rank.delta(index, piece))
            else:
                continue
            owners.append(index)
        return operands, owners

    def check_finite(self, kernels: Kernels, operands: list[Operand], labels: list[str]) -> None:
        """Raise `NonFiniteError` with the name of the first operand that holds NaN or infinity, if any does."""
        for label, operand in zip(labels, operands):
            count = kernels.count_nonfinite(operand)
            if count and operand.is_delta:  # its factors are finite, so their product has overflown
                raise delta_overflows(self.name, label)
            if count:
                raise NonFiniteError(
                    f"Expected finite numbers, found {count:,} NaN or infinite values in tensor {self.name!r} of "
                    f"{label}. A merge would spread them; repair or leave out that model."
                )


def _stored_one(tensor: DenseTensor) -> StoredTensor:
    assert isinstance(tensor, StoredTensor)
    return tensor
