"""What the engine reads for one tensor: the base and the experts, as raw bytes or as low-rank factors."""

# Shape suffixes: B = blocks, K = operands (the base first where there is one), N = experts.

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
from xxhash import xxh3_128_hexdigest

from hf_frmerge.checkpoints.page_cache import MappedRange, prefetch, release
from hf_frmerge.checkpoints.tensors.floats import widen
from hf_frmerge.checkpoints.tensors.reader import DTYPE_BITS, FLOAT_DTYPES, some
from hf_frmerge.errors import NonFiniteError
from hf_frmerge.geometry.lowrank import Factors, base_gram, factor_gram
from hf_frmerge.geometry.portable import fold
from hf_frmerge.kernels.interface import Operand, digest
from hf_frmerge.kernels.product import product
from hf_frmerge.merging.decisions import Trimming
from hf_frmerge.merging.operands.overflow import (
    LEAST_SQUARES,
    delta_overflows,
    result_overflows,
    squares_leave_float64,
)
from hf_frmerge.methods.sparse import ties

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from hf_frmerge.checkpoints.adapters.factors import DoraWeight, LowRankDelta
    from hf_frmerge.checkpoints.page_cache import Mapping as FileMapping
    from hf_frmerge.checkpoints.tensors.reader import Checkpoint, TensorInfo
    from hf_frmerge.kernels.interface import Kernels
    from hf_frmerge.merging.decisions import Decision
    from hf_frmerge.merging.planning.blocks import Piece


_SHORT = 1 << 14
"""Elements up to which float64 products cost nothing worth saving."""

_DELTA_ELEMENTS = 1 << 15
"""Elements of a piece that are held as float64 deltas at a time; with fewer it is the calls that take the time."""


def join_digests(digests: Sequence[str]) -> str:
    """Return the digest of a tensor: of the digests of its pieces, which are fixed by its shape."""
    return digests[0] if len(digests) == 1 else xxh3_128_hexdigest("".join(digests).encode())


class DenseTensor(Protocol):
    """A tensor whose elements can be read in pieces: stored in a file, or computed from one row by row."""

    def read(self, start: int, stop: int) -> Operand:
        """Return elements `[start, stop)` in row-major order."""
        ...

    def mapped(self, start: int, stop: int) -> MappedRange | None:
        """Return what `read` reads of a mapped file, if that is all it needs."""
        ...

    @property
    def files(self) -> set[tuple[Checkpoint, str]]:
        """The files it is read from."""
        ...


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as it lies in a checkpoint."""

    checkpoint: Checkpoint
    info: TensorInfo

    def read(self, start: int, stop: int) -> Operand:
        """Return elements `[start, stop)`: a view of the page cache for local files, fetched bytes otherwise."""
        part = self.mapped(start, stop)
        data = part.mapping.held(part.start, part.stop) if part else None
        if data is None:
            data = self.checkpoint.read(self.info.name, start * self._itemsize, stop * self._itemsize)
        return Operand(data, self.info.dtype)

    def mapped(self, start: int, stop: int) -> MappedRange | None:
        """Return where elements `[start, stop)` lie in a mapped file, if they do."""
        if self._mapping is None:
            return None
        offset, size = self.info.offset, self._itemsize
        return MappedRange(self._mapping, offset + start * size, offset + stop * size)

    @property
    def files(self) -> set[tuple[Checkpoint, str]]:
        """The files it is read from."""
        return {(self.checkpoint, self.info.file)}

    @cached_property
    def _itemsize(self) -> int:
        return DTYPE_BITS[self.info.dtype] // 8

    @cached_property
    def _mapping(self) -> FileMapping | None:
        return self.checkpoint.mapping(self.info.name)


@dataclass(frozen=True)
class DoraTensor:
    """The effective weight of a DoRA module, computed row by row from the base; float32."""

    base: StoredTensor
    delta: LowRankDelta
    cols: int

    def read(self, start: int, stop: int) -> Operand:
        """Return elements `[start, stop)`."""
        first, last = start // self.cols, -(-stop // self.cols)
        stored = self.base.read(first * self.cols, last * self.cols)
        rows = self._weight.rows(widen(stored.data, stored.dtype).reshape(-1, self.cols), first)
        flat = rows.reshape(-1)[start - first * self.cols : stop - first * self.cols]
        return Operand(np.ascontiguousarray(flat).view(np.uint8), "F32")

    def mapped(self, start: int, stop: int) -> MappedRange | None:
        """Return what elements `[start, stop)` of the base are read from: whole rows."""
        return self.base.mapped(start // self.cols * self.cols, -(-stop // self.cols) * self.cols)

    @property
    def files(self) -> set[tuple[Checkpoint, str]]:
        """The files it is read from."""
        return self.base.files | self.delta.files

    @cached_property
    def _weight(self) -> DoraWeight:
        return self.delta.dora_weight()


class _Factors(NamedTuple):
    left: NDArray[np.float32]
    right: NDArray[np.float32]
    digest: str


@dataclass(frozen=True)
class TensorInputs:
    """
    The base and the experts of one tensor.

    Attributes:
        name: tensor name, for messages.
        cols: elements of a row, which is the unit of low-rank deltas.
        base: the base model's tensor; needed in delta space and wherever an expert is an adapter.
        dense: expert index -> its full tensor.
        low_rank: expert index -> its low-rank delta. An expert in neither map equals the base here.
        labels: a name for the base (index -1) and every expert, for messages.
        space: `"weights"` or `"deltas"`: where the points lie, which decides how much of the base a merge takes.
        factored: whether the Gram matrix of the tensor comes from the factors, with no dense delta ever formed: all
            experts are low-rank and the tensor is one block.
    """

    name: str
    cols: int
    n_experts: int
    base: DenseTensor | None
    dense: Mapping[int, DenseTensor]
    low_rank: Mapping[int, LowRankDelta]
    labels: Mapping[int, str]
    space: str = "weights"
    factored: bool = False
    _factors: dict[int, _Factors] = field(default_factory=dict, repr=False)

    @property
    def has_base(self) -> bool:
        """Whether the first operand of a Gram matrix is the base."""
        return self.base is not None

    def gram(
        self, kernels: Kernels, piece: Piece, *, precise: bool = False
    ) -> tuple[NDArray[np.float64], dict[int, str]]:
        """
        Return the difference Gram matrices `(B, K, K)` of a piece, and a digest of every stored operand.

        Rows of experts that equal the base are zero. Raises `NonFiniteError` naming the expert when NaN or infinity
        was read, or if squares leave the range of float64.

        Args:
            precise: Whether to multiply in float64, which is asked for where the squares of a tensor are tiny.
        """
        if self.factored:
            assert self.base is not None
            self._check_finite(kernels, [self.base.read(piece.start, piece.stop)], [self.labels[-1]])
            whole = self._factored_gram() if piece.start == 0 else np.zeros(1)
            return whole, self.digests(piece)
        prefetch(self._mapped(piece.start, piece.stop))
        operands, owners = self._gram_operands(piece)
        # Products of 16-bit floats are exact in float32, those of float32 are not; and on short tensors rounding has
        # no chance to average out.
        is_tiny = precise
        precise = precise or piece.stop - piece.start <= _SHORT or any(o.dtype == "F32" for o in operands)
        compact, found = kernels.gram_and_digests(operands, piece.n_blocks, piece.block_len, precise=precise)
        digests = {owner: value or self._factor(owner).digest for owner, value in zip(owners, found)}
        if not np.isfinite(compact).all():
            self._check_finite(kernels, operands, [self.labels[owner] for owner in owners])
            if not precise:  # finite inputs whose float32 products overflow
                return self.gram(kernels, piece, precise=True)
            largest = int(np.argmax(np.isnan(compact) | np.isinf(compact))) % len(owners)
            raise squares_leave_float64(self.name, self.labels[owners[largest]])
        if is_tiny and any(operand.dtype == "F64" for operand in operands):
            self._check_squares(compact, operands, owners)
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
            coefficients_BN: float64, on the experts' points, for all blocks of the tensor, or one row for them all.

        Raises:
            NonFiniteError: If an element is not finite in `out_dtype`; the message names what makes it so.
        """
        prefetch(self._mapped(piece.start, piece.stop))
        if len(coefficients_BN) > 1:
            coefficients_BN = coefficients_BN[piece.first_block : piece.first_block + piece.n_blocks]
        operands: list[Operand] = []
        labels: list[str] = []
        columns: list[NDArray[np.float64]] = []
        dense = sorted(self.dense)
        if self.base is not None:
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
            operands.append(self._low_rank_sum(piece, coefficients_BN))
            labels.append(some(self.labels[index] for index in sorted(self.low_rank)))
            columns.append(np.ones(piece.n_blocks))
        return self._combine(kernels, operands, labels, np.stack(columns, axis=1), piece, out, out_dtype)

    def apply(self, decision: Decision, kernels: Kernels, piece: Piece, out: NDArray[np.uint8], out_dtype: str) -> str:
        """Write the merged elements of a piece into `out`, each rounded once from float64, and return their digest."""
        if isinstance(decision, Trimming):
            return self.trim(kernels, piece, decision, out, out_dtype)
        return self.combine(kernels, piece, decision.coefficients, out, out_dtype)

    def deltas(self, kernels: Kernels, piece: Piece) -> Iterator[tuple[NDArray[np.float64], NDArray[np.float64]]]:
        """
        Yield the base `(D,)` and the experts' differences to it `(N, D)`, float64, some elements of a piece at a time.

        Raises `NonFiniteError` naming the expert when NaN or infinity was read.
        """
        assert self.base is not None
        prefetch(self._mapped(piece.start, piece.stop))
        operands, owners = self._gram_operands(piece)
        for start in range(0, piece.stop - piece.start, _DELTA_ELEMENTS):
            base_D, *others = (_widened(operand, start, start + _DELTA_ELEMENTS) for operand in operands)
            deltas_ND = np.zeros((self.n_experts, len(base_D)))
            for owner, operand, values_D in zip(owners[1:], operands[1:], others):
                deltas_ND[owner] = values_D if operand.is_delta else values_D - base_D
            if not np.isfinite(deltas_ND).all():
                self._check_finite(kernels, operands, [self.labels[owner] for owner in owners])
            yield base_D, deltas_ND

    def trim(self, kernels: Kernels, piece: Piece, trimming: Trimming, out: NDArray[np.uint8], out_dtype: str) -> str:
        """Write the elements of a piece, merged by TIES, into `out`, each rounded once; return their digest."""
        thresholds = np.array(trimming.thresholds, dtype=np.float32).view(np.uint32)
        weights = np.array(trimming.weights)
        merged = np.concatenate(
            [base + trimming.scale * ties(deltas, thresholds, weights) for base, deltas in self.deltas(kernels, piece)]
        )
        operand, ones = Operand(merged.view(np.uint8), "F64"), np.ones((piece.n_blocks, 1))
        return self._combine(kernels, [operand], ["the sum of base and trimmed deltas"], ones, piece, out, out_dtype)

    def copy(
        self, kernels: Kernels, piece: Piece, out: NDArray[np.uint8], out_dtype: str
    ) -> tuple[NDArray[np.uint8], str]:
        """
        Return a piece of the one tensor there is, in the output's dtype: as stored, or converted into `out`; and its
        digest.

        Raises `NonFiniteError` for NaN and infinity, as `gram` and `combine` do.
        """
        operand = self.dense[0].read(piece.start, piece.stop)
        if operand.dtype in FLOAT_DTYPES:
            self._check_finite(kernels, [operand], [self.labels[0]])
        if operand.dtype == out_dtype:
            return operand.data, digest(operand.data)
        return out, self._combine(
            kernels, [operand], [self.labels[0]], np.ones((piece.n_blocks, 1)), piece, out, out_dtype
        )

    @property
    def files(self) -> set[tuple[Checkpoint, str]]:
        """The files it is read from."""
        stored = (tensor.files for tensor in self._stored())
        return set().union(*stored, *(delta.files for delta in self.low_rank.values()))

    def release(self, piece: Piece) -> None:
        """Let go of the pages of a piece."""
        release(self._mapped(piece.start, piece.stop))

    def digests(self, piece: Piece) -> dict[int, str]:
        """Return the digests that `gram` would, without computing anything else."""
        owners = ([-1] if self.has_base else []) + sorted(self.dense)
        found = {
            owner: digest(tensor.read(piece.start, piece.stop).data) for owner, tensor in zip(owners, self._stored())
        }
        return found | {index: self._factor(index).digest for index in self.low_rank}

    def _combine(
        self,
        kernels: Kernels,
        operands: list[Operand],
        labels: list[str],
        coefficients_BK: NDArray[np.float64],
        piece: Piece,
        out: NDArray[np.uint8],
        out_dtype: str,
    ) -> str:
        table = np.ascontiguousarray(coefficients_BK)
        found = kernels.combine(operands, table, out, out_dtype, piece.n_blocks, piece.block_len)
        if not found.is_finite:
            self._check_finite(kernels, operands, labels)
            raise result_overflows(kernels, self.name, operands, labels, table, out_dtype)
        return found.digest

    def _factored_gram(self) -> NDArray[np.float64]:
        """Difference Gram `(1, K, K)` of the whole tensor; in delta space the base's own part is not needed, and 0."""
        owners = sorted(self.low_rank)
        factors = [Factors(self._factor(index).left, self._factor(index).right) for index in owners]
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
        n_rows = len(next(iter(self._factors.values())).left)
        step = max(1, _SHORT * 16 // self.cols)
        for row in range(0, n_rows, step):
            start, stop = row * self.cols, min(row + step, n_rows) * self.cols
            operand = self.base.read(start, stop)
            yield widen(operand.data, operand.dtype).reshape(-1, self.cols).astype(np.float64)
            release(self._mapped(start, stop))

    def _mapped(self, start: int, stop: int) -> list[MappedRange]:
        return [part for tensor in self._stored() if (part := tensor.mapped(start, stop)) is not None]

    def _stored(self) -> list[DenseTensor]:
        return ([self.base] if self.base is not None else []) + [self.dense[i] for i in sorted(self.dense)]

    def _gram_operands(self, piece: Piece) -> tuple[list[Operand], list[int]]:
        operands, owners = [], []
        if self.base is not None:
            operands.append(self.base.read(piece.start, piece.stop))
            owners.append(-1)
        for index in range(self.n_experts):
            if index in self.dense:
                operands.append(self.dense[index].read(piece.start, piece.stop))
            elif index in self.low_rank:
                left, right, _ = self._factor(index)
                rows = slice(piece.start // self.cols, -(-piece.stop // self.cols))
                operands.append(self._delta_operand(product(left[rows], right), piece))
            else:
                continue
            owners.append(index)
        return operands, owners

    def _low_rank_sum(self, piece: Piece, coefficients_BN: NDArray[np.float64]) -> Operand:
        """Sum of the low-rank deltas, each with its coefficient, as one product of stacked factors."""
        first_row = piece.start // self.cols
        rows = np.arange(first_row, -(-piece.stop // self.cols))
        rows_per_block = max(1, piece.block_len // self.cols)
        block_of_row = np.minimum((rows - first_row) // rows_per_block, piece.n_blocks - 1)
        scaled, rights = [], []
        for index in sorted(self.low_rank):
            left, right, _ = self._factor(index)
            scaled.append(left[rows] * coefficients_BN[block_of_row, index, None].astype(np.float32))
            rights.append(right)
        return self._delta_operand(product(np.concatenate(scaled, axis=1), np.concatenate(rights, axis=0)), piece)

    def _delta_operand(self, rows: NDArray[np.float32], piece: Piece) -> Operand:
        offset = piece.start % self.cols
        flat = np.ascontiguousarray(rows, dtype=np.float32).reshape(-1)[offset : offset + piece.stop - piece.start]
        return Operand(np.ascontiguousarray(flat).view(np.uint8), "F32", is_delta=True)

    def _factor(self, index: int) -> _Factors:
        if index not in self._factors:
            left, right = self.low_rank[index].factors()
            self._factors[index] = _Factors(left, right, xxh3_128_hexdigest(left.tobytes() + right.tobytes()))
        return self._factors[index]

    def _check_finite(self, kernels: Kernels, operands: list[Operand], labels: list[str]) -> None:
        for label, operand in zip(labels, operands):
            count = kernels.count_nonfinite(operand)
            if count and operand.is_delta:  # its factors are finite
                raise delta_overflows(self.name, label)
            if count:
                raise NonFiniteError(
                    f"Expected finite numbers, found {count:,} NaN or infinite values in tensor {self.name!r} of "
                    f"{label}. A merge would spread them; repair or leave out that model."
                )

    def _check_squares(self, gram_BKK: NDArray[np.float64], operands: list[Operand], owners: list[int]) -> None:
        """Refuse blocks that only seem to be zero. (Values of other dtypes than float64 cannot be so small.)"""
        vanishing_B = np.trace(gram_BKK, axis1=1, axis2=2) < LEAST_SQUARES
        for owner, operand in zip(owners, operands):
            values = widen(operand.data, operand.dtype).reshape(len(gram_BKK), -1)
            if values[vanishing_B].any():
                raise squares_leave_float64(self.name, self.labels[owner])


def _widened(operand: Operand, start: int, stop: int) -> NDArray[np.float64]:
    """Elements `[start, stop)` of an operand as float64."""
    size = DTYPE_BITS[operand.dtype] // 8
    return widen(operand.data[start * size : stop * size], operand.dtype).astype(np.float64)
