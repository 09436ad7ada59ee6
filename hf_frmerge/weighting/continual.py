"""Merge one more expert into a model that is a merge already, whose record says of how many."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from threadpoolctl import threadpool_limits

from hf_frmerge.checkpoints.folders import open_folder
from hf_frmerge.errors import ArgumentError, CheckpointError
from hf_frmerge.geometry.core_space import core_space
from hf_frmerge.geometry.gram import delta_gram
from hf_frmerge.geometry.portable import fold
from hf_frmerge.kernels.load import load_kernels
from hf_frmerge.merging.arguments.merging_arguments import MergingArguments
from hf_frmerge.merging.arguments.result_options import is_about_the_result
from hf_frmerge.merging.engine.engine import worker_count
from hf_frmerge.merging.operands.factor_inputs import FactorInputs
from hf_frmerge.merging.operands.open_inputs import open_inputs
from hf_frmerge.merging.planning.blocks import Piece, pieces_of
from hf_frmerge.merging.record.find_models import find_models, record_folder
from hf_frmerge.merging.record.manifest import MANIFEST_FILE, read_manifest
from hf_frmerge.methods.spectral.continual import without_disturbance
from hf_frmerge.methods.table import METHODS

if TYPE_CHECKING:
    from hf_frmerge.merging.planning.plan import MergePlan
    from hf_frmerge.merging.planning.tensor_step import TensorStep

logger = logging.getLogger(__name__)

# Said of the experts of one merge, so that the next, of others, cannot take them over.
_OF_ITS_EXPERTS = ("coefficients", "take", "weight_rules")

WITHOUT_PROMPTS: dict[str, Any] = {
    option.name: option.default
    for option in fields(MergingArguments)
    if option.name == "fisher" or option.name.startswith("refine_")
}
"""What a merge that was made with prompts leaves to a next one that has none."""


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


def say_left_out(merged: str, asked: Mapping[str, Any]) -> None:
    """Say that a merge was made with prompts, and that the next one has none, nor what was asked for with them."""
    # The others say how a refinement goes.
    asking = [name for name in ("fisher", "refine_steps") if asked[name] != WITHOUT_PROMPTS[name]]
    left_out = [f"{name}={asked[name]!r}" for name in asking]
    logger.warning(
        "%r was made with prompts, and there are none for the merge that goes on with it: it is made without%s. Pass "
        "some to keep to what its experts compute: --calibration (calibration_dataset).",
        merged, "".join(f", and without {option}" for option in left_out),
    )  # fmt: skip


def next_merge(
    merged: str,
    changes: dict[str, Any],
    base_model: str | None = None,
    token: str | None = None,
    *,
    has_prompts: bool = False,
) -> tuple[MergingArguments, str | None]:
    """
    Return the arguments and the base model of the merge that adds an expert to a merged model: those of its record.

    Args:
        merged: Folder or Hub id of a merge.
        changes: Arguments that are not taken from the record, such as `output_dir`.
        base_model: Where the base is now; by default where the record has it.
        token: Access token for the Hub.
        has_prompts: Whether there are prompts for it; otherwise what the record did with some is left out, and said.

    Raises:
        CheckpointError: If there is no record, or its base model is not known on this machine.
        ArgumentError: If the record has options that are about its own experts.
    """
    folder = record_folder(merged, token)
    manifest = read_manifest(folder)
    recorded = {name: value for name, value in manifest.arguments.items() if is_about_the_result(name)}
    for name in _OF_ITS_EXPERTS:
        if recorded.get(name):
            raise ArgumentError(
                f"{merged!r} was merged with {name}, which is about its own experts and cannot be kept for others. "
                f"Merge the two with the options you want: frmerge merge {merged} EXPERT --weights continual."
            )
    if not has_prompts:
        if manifest.calibration is not None:
            say_left_out(merged, {**WITHOUT_PROMPTS, **recorded})
        recorded |= WITHOUT_PROMPTS
    # Both are found anew by every merge that goes on with another.
    recorded.pop("merged_before", None)
    if METHODS[manifest.method].is_continual:
        del recorded["scale"]
    # Only the base is looked for: the experts are in the merge, wherever they are now.
    chosen = [*[merged] * len(manifest.experts), base_model]
    base_model = find_models(folder, manifest, chosen, option="--base-model").base_model or base_model
    if base_model is not None and Path(base_model).is_absolute() and not Path(base_model).exists():
        raise CheckpointError(
            f"The base model of {merged!r} is no longer in {base_model}. Say where it is with --base-model."
        )
    return MergingArguments(**{**recorded, **changes}), base_model


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
    inputs, kernels = open_inputs(plan, step), load_kernels(plan.args.device)
    pieces = [Piece(0, step.numel, 0, 1)] if plan.layout is None else pieces_of(step)
    total = np.zeros((1, 2 + inputs.has_base, 2 + inputs.has_base))
    for piece in pieces:
        total[0] += fold(inputs.gram(kernels, piece)[0].copy())
        inputs.release(piece)
    (merged, between), (_, new) = (delta_gram(total) if inputs.has_base else total)[0].tolist()
    summed = growth**2 * merged + 2 * growth * between + new
    if step.is_matrix:
        [piece] = pieces
        if isinstance(inputs, FactorInputs):  # cores have the norms of the deltas
            before_mn, new_mn = core_space(inputs.row.factors()).cores.astype(np.float32)
        else:
            _, (before_mn, new_mn), _ = inputs.matrices(kernels, piece)
        kept_mn = without_disturbance(before_mn, new_mn, plan.spectral_options.density)
        summed = float(np.sum(np.square(growth * before_mn + kept_mn, dtype=np.float64)))
        inputs.release(piece)
    return np.array([merged, new, summed])
