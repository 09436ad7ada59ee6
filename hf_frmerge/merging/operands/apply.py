"""Apply decisions to the inputs of a tensor: sums, element by element, or as a whole matrix."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from hf_frmerge.checkpoints.tensors.floats import widen
from hf_frmerge.kernels.elementwise import Elementwise, RankedDropout, Run
from hf_frmerge.kernels.interface import Operand
from hf_frmerge.merging.operands.merge_by_lapack import by_lapack, merge_factors
from hf_frmerge.methods.spectral.decision import Spectral, fits_float32
from hf_frmerge.methods.spectral.inputs import Experts
from hf_frmerge.methods.table import METHODS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hf_frmerge.geometry.lowrank import Factors
    from hf_frmerge.kernels.interface import Kernels
    from hf_frmerge.merging.decisions import Decision
    from hf_frmerge.merging.operands.tensor_inputs import TensorInputs
    from hf_frmerge.merging.planning.blocks import Piece
    from hf_frmerge.methods.post_steps import SingularValueCalibration


def apply(
    inputs: TensorInputs, decision: Decision, kernels: Kernels, piece: Piece, out: NDArray[np.uint8], out_dtype: str
) -> str:
    """Apply a decision of any kind to a piece: write the merged elements into `out` and return their digest."""
    if inputs.post_step is not None:
        return _with_post_step(inputs, inputs.post_step, decision, kernels, piece, out, out_dtype)
    if isinstance(decision, Elementwise):
        return _merge_elements(inputs, kernels, piece, decision, out, out_dtype)
    if isinstance(decision, Spectral):
        return _merge_matrix(inputs, kernels, piece, decision, out, out_dtype)
    return inputs.combine(kernels, piece, decision.coefficients, out, out_dtype)


def _merge_elements(
    inputs: TensorInputs, kernels: Kernels, piece: Piece, decision: Elementwise, out: NDArray[np.uint8], out_dtype: str
) -> str:
    """
    Write the elements of a piece, each merged by itself, into `out`, each rounded once; return their digest.

    Raises:
        NonFiniteError: If an input, or an element of the result in `out_dtype`, is not finite.
    """
    row = inputs.row_len if isinstance(decision.keep, RankedDropout) else 1
    start, stop = piece.start // row * row, -(-piece.stop // row) * row
    operands, labels = inputs.delta_operands(start, stop)
    run, skip = Run(inputs.name, start, inputs.row_len), piece.start - start
    is_last = inputs.correction is None
    dtype = out_dtype if is_last else "F64"
    target = out if is_last else np.empty((piece.stop - piece.start) * 8, np.uint8)
    written, is_bounded = kernels.merge_elements(operands, decision, run, skip, target, dtype)
    if not is_bounded:
        inputs.check_finite(kernels, operands, labels)
    if is_last and written.is_finite:
        return written.digest
    if is_last:  # computed once more, for the message
        target = np.empty((piece.stop - piece.start) * 8, np.uint8)
        kernels.merge_elements(operands, decision, run, skip, target, "F64")
    merged, ones = Operand(target, "F64"), np.ones((piece.n_blocks, 1))
    return inputs.write_sum(kernels, [merged], ["the base and what is kept"], ones, piece, out, out_dtype)


def _merge_matrix(
    inputs: TensorInputs, kernels: Kernels, piece: Piece, decision: Spectral, out: NDArray[np.uint8], out_dtype: str
) -> str:
    """
    Write the whole tensor, merged as a matrix, into `out`, each element rounded once; return its digest.

    Raises:
        NonFiniteError: If an input, or an element of the result in `out_dtype`, is not finite.
        MergeError: If the singular values of the deltas cannot be computed.
    """
    factors = _factors_for(inputs, decision)
    if factors is not None:
        assert inputs.base is not None
        base, label = inputs.base.read(piece.start, piece.stop), inputs.labels[-1]
        left, right, _ = merge_factors(inputs.name, decision, factors, inputs.labels)
        merged = left.astype(np.float32) @ right.astype(np.float32)
    else:
        base, deltas, label = inputs.matrices(kernels, piece)
        origin = widen(base.data, base.dtype).astype(np.float32, copy=False).reshape(deltas.shape[1:])
        merged = by_lapack(inputs.name, lambda: decision.merge(Experts(deltas, origin)))
    return _write_delta(inputs, kernels, base, label, merged, decision.scale, piece, out, out_dtype)


def _with_post_step(
    inputs: TensorInputs,
    post_step: SingularValueCalibration,
    decision: Decision,
    kernels: Kernels,
    piece: Piece,
    out: NDArray[np.uint8],
    out_dtype: str,
) -> str:
    """Apply a decision to a whole matrix in float64, and the post-step to the delta that this gives."""
    plain = np.empty(8 * (piece.stop - piece.start), np.uint8)
    apply(replace(inputs, correction=None, post_step=None), decision, kernels, piece, plain, "F64")
    base, deltas, label = inputs.matrices(kernels, piece)
    merged = (plain.view(np.float64) - widen(base.data, base.dtype)).astype(np.float32).reshape(deltas.shape[1:])
    corrected = by_lapack(inputs.name, lambda: post_step.apply(merged, deltas))
    return _write_delta(inputs, kernels, base, label, corrected, 1.0, piece, out, out_dtype)


def _factors_for(inputs: TensorInputs, decision: Spectral) -> list[Factors] | None:
    """Return the factors of all experts if their deltas are merged as cores, `None` if as whole matrices."""
    method = METHODS[decision.rule]
    if method.cores is None or inputs.dense or not inputs.low_rank:
        return None
    factors = inputs.low_rank.all_factors(inputs.n_experts)
    is_small = sum(pair.A.shape[0] for pair in factors) < min(len(factors[0].B), inputs.cols)
    # Whoever forms the deltas finds out whose are too large.
    return factors if method.needs_factors or (is_small and fits_float32(factors)) else None


def _write_delta(
    inputs: TensorInputs,
    kernels: Kernels,
    base: Operand,
    label: str,
    merged: NDArray[np.float32],
    scale: float,
    piece: Piece,
    out: NDArray[np.uint8],
    out_dtype: str,
) -> str:
    added = Operand(np.ascontiguousarray(merged, np.float32).reshape(-1).view(np.uint8), "F32", is_delta=True)
    factors = np.tile([1.0, scale], (piece.n_blocks, 1))
    return inputs.write_sum(kernels, [base, added], [label, "the merged delta"], factors, piece, out, out_dtype)
