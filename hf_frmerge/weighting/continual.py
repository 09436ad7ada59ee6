"""Merge one more expert into a model that is a merge already, whose record says of how many."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from threadpoolctl import threadpool_limits

from hf_frmerge.checkpoints.folders import open_folder
from hf_frmerge.errors import ArgumentError
from hf_frmerge.geometry.gram import delta_gram
from hf_frmerge.geometry.portable import fold
from hf_frmerge.kernels.load import load_kernels
from hf_frmerge.merging.engine.engine import worker_count
from hf_frmerge.merging.operands.open_inputs import open_tensors
from hf_frmerge.merging.planning.blocks import pieces_of
from hf_frmerge.merging.record.find_models import record_folder
from hf_frmerge.merging.record.manifest import MANIFEST_FILE, read_manifest
from hf_frmerge.methods.spectral.continual import without_disturbance
from hf_frmerge.methods.table import METHODS

if TYPE_CHECKING:
    from hf_frmerge.merging.planning.plan import MergePlan
    from hf_frmerge.merging.planning.tensor_step import TensorStep


@dataclass(frozen=True)
class Before:
    """
    What the record of a merge says to the next one.

    Attributes:
        n_experts: how many experts it is made of; 1 for a model that is no merge.
        growth: OPCM's lambda: by how much what was added up exceeds the size it was brought back to.
        method: what merged it; `None` for a model that is no merge.
    """

    n_experts: int = 1
    growth: float = 1.0
    method: str | None = None


def read_before(model: str, token: str | None = None) -> Before:
    """
    Read the record of a merged model, if it has one; a local folder or a Hub id.

    Raises:
        CheckpointError: If there is no such model, or its record is damaged.
    """
    folder = record_folder(model, token)
    if not open_folder(folder).exists(MANIFEST_FILE):
        return Before()
    manifest = read_manifest(folder)
    n_experts = manifest.arguments.get("merged_before", 1) + len(manifest.experts) - 1
    if not METHODS[manifest.method].is_continual:
        return Before(n_experts, 1.0, manifest.method)
    before, new = manifest.weights
    return Before(n_experts, _growth(before / new, manifest.arguments["scale"]), manifest.method)


def continual_weights(before: Before, n_experts: int) -> list[float]:
    """Return the weights of a merge of `before.n_experts` experts and of `n_experts - 1` new ones, all alike."""
    return [float(before.n_experts), *[1.0] * (n_experts - 1)]


def opcm_numbers(plan: MergePlan, before: Before) -> tuple[list[float], float]:
    r"""
    Measure a merge and a new expert; return weights and scale with which `opcm` merges them.

    OPCM adds up \(D' = \lambda_{t-1} D + \tilde\tau\) and brings it back to the mean norm of all deltas so far,
    \(\bar n_t = ((t-1)\, \bar n_{t-1} + |\tau|) / t\), over the whole model; then \(\lambda_t = |D'| / \bar
    n_t\) (arXiv 2501.09522). The norm of D is \(\bar n_{t-1}\), since the last merge was brought back to it. With
    weights \(\lambda_{t-1}\) and 1, divided by their sum, the scale is \((\lambda_{t-1} + 1) / 2\lambda_t\).

    Args:
        plan: Plan of the merge of the two, with any weights.
        before: What the record of the first says.

    Raises:
        ArgumentError: If the first is a merge by another method, whose sum is not known.
    """
    spec = plan.experts[0].spec
    if before.method is not None and not METHODS[before.method].is_continual:
        raise ArgumentError(
            f"{spec!r} was merged by method={before.method!r}, which does not say how large the sum of its experts "
            f"was; method={plan.args.method!r} goes on with its own merges only. Begin with two experts, or use "
            "weights='continual' with another method."
        )
    steps = [step for step in plan.steps if step.action == "merge"]
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(worker_count(plan)) as pool:
        rows = list(pool.map(lambda step: _squares(plan, step, before.growth), steps))
    merged, new, summed = np.sqrt(fold(np.stack(rows))).tolist()
    mean = (before.n_experts * merged + new) / (before.n_experts + 1)
    if not summed or not math.isfinite(summed):
        raise ArgumentError(f"{spec!r} and {plan.experts[1].spec!r} are the base model: there is nothing to merge.")
    return [before.growth, 1.0], (before.growth + 1) / 2 * mean / summed


def _growth(ratio: float, scale: float) -> float:
    """Return lambda from the ratio of the weights, which is the lambda before, and the scale."""
    return (ratio + 1) / (2 * scale)


def _squares(plan: MergePlan, step: TensorStep, growth: float) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Return the squared norms of a tensor's merged delta, new delta, and their sum before it is brought back."""
    inputs, kernels = open_tensors(plan, step), load_kernels(plan.args.device)
    total = np.zeros((3, 3))
    for piece in pieces_of(step):
        total += fold(inputs.gram(kernels, piece)[0].copy())
        inputs.release(piece)
    (merged, between), (_, new) = delta_gram(total[None])[0].tolist()
    summed = growth**2 * merged + 2 * growth * between + new
    if step.is_matrix:
        [piece] = pieces_of(step)
        _, (before_mn, new_mn), _ = inputs.matrices(kernels, piece)
        kept_mn = without_disturbance(before_mn, new_mn, plan.spectral_options.density)
        summed = float(np.sum(np.square(growth * before_mn + kept_mn, dtype=np.float64)))
        inputs.release(piece)
    return np.array([merged, new, summed])
