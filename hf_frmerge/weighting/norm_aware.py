"""Weights by the size of what the experts learned (NAN, arXiv 2505.16148)."""

# Shape suffixes: N = experts.

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from hf_frmerge.errors import ArgumentError
from hf_frmerge.geometry.portable import fold
from hf_frmerge.kernels.load import load_kernels
from hf_frmerge.merging.engine.engine import worker_count
from hf_frmerge.merging.operands.open_inputs import open_inputs
from hf_frmerge.merging.planning.blocks import Piece, pieces

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from hf_frmerge.merging.planning.plan import MergePlan
    from hf_frmerge.merging.planning.tensor_step import TensorStep


def norm_aware_weights(norms: Sequence[float]) -> list[float]:
    r"""
    Return \(w_i = |\tau_i|^{-1} / \sum_j |\tau_j|^{-1}\) (NAN, arXiv 2505.16148).

    A least-squares merge weighs experts by how much data they saw; more data give parameters of less variance, of
    which the norm is a measure. The paper leaves open whether the norm is that of the weights or of what was learned,
    and of the model or of a layer. Here it is that of the deltas, over all tensors that are merged: norms of the
    weights of one family agree to 1e-4 and would weigh all alike. The sum of the coefficients, also left open, is the
    method's and its `scale`'s. An expert that learned nothing has no share; if none did, all weigh alike.

    Args:
        norms: Norm of every expert's delta.
    """
    smallest = min((norm for norm in norms if norm > 0), default=0.0)
    shares = [smallest / norm if norm > 0 else 0.0 for norm in norms] if smallest else [1.0] * len(norms)
    total = math.fsum(shares)
    return [share / total for share in shares]


def delta_norms(plan: MergePlan) -> list[float]:
    """
    Measure the norm of every expert's delta over the tensors that are merged, in one pass; of adapters from factors.

    Raises:
        ArgumentError: If there is no base model and the experts are not adapters.
        NonFiniteError: If a tensor holds NaN or infinity.
    """
    if plan.base is None and any(expert.checkpoint for expert in plan.experts):
        raise ArgumentError(
            "weights='nan' go by the size of what the experts learned on top of a base model: pass base_model "
            "(--base-model), or give the weights as numbers."
        )
    plan = replace(plan, space="deltas")  # then the base is the first operand of every Gram matrix
    steps = [step for step in plan.steps if step.action == "merge"]
    with ThreadPoolExecutor(worker_count(plan)) as pool:
        squares = list(pool.map(lambda step: _squares(plan, step), steps))
    return np.sqrt(fold(np.stack(squares))).tolist() if squares else [0.0] * len(plan.experts)


def _squares(plan: MergePlan, step: TensorStep) -> NDArray[np.float64]:
    """Return the squared norms of the deltas of one tensor, `(N,)`."""
    inputs, kernels = open_inputs(plan, step), load_kernels(plan.args.device)
    whole = [Piece(0, step.numel, 0, step.n_blocks)]
    total_N = np.zeros(len(plan.experts))
    for piece in whole if plan.layout is None else pieces(step.n_blocks, step.block_len):
        gram_BKK, _ = inputs.gram(kernels, piece)
        total_N += fold(np.diagonal(gram_BKK, axis1=1, axis2=2).copy())[-len(plan.experts) :]
        inputs.release(piece)
    return total_N
