"""Measure angles and norms of the experts, which tell whether the choice of a method can matter for them."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_frmerge.errors import ArgumentError
from hf_frmerge.geometry.portable import fold
from hf_frmerge.kernels.load import load_kernels
from hf_frmerge.merging.arguments.values import as_shares
from hf_frmerge.merging.engine.engine import worker_count
from hf_frmerge.merging.engine.solve import points_of, solve
from hf_frmerge.merging.operands.open_inputs import open_tensors
from hf_frmerge.merging.planning.blocks import pieces
from hf_frmerge.methods.span import SpanOptions

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hf_frmerge.kernels.interface import Kernels
    from hf_frmerge.merging.planning.plan import MergePlan
    from hf_frmerge.merging.planning.tensor_step import TensorStep


@dataclass(frozen=True)
class SpaceView:
    """
    Geometry of the experts of a tensor, or of the whole model, in one space.

    Attributes:
        norms: Frobenius norm of every expert's point.
        max_angle, mean_angle: over pairs of experts and blocks, in radians.
        karcher_nre_gap: angle between the Karcher mean and the norm-rescaled mean, in radians.
        linear_norm_ratio: norm of the plain mean over the mean norm of the experts.
    """

    norms: tuple[float, ...]
    max_angle: float
    mean_angle: float
    karcher_nre_gap: float
    linear_norm_ratio: float

    @property
    def mean_norm(self) -> float:
        """Mean norm of the experts, each counted once whatever its weight."""
        return sum(self.norms) / len(self.norms)


@dataclass(frozen=True)
class TensorView:
    """Geometry of one tensor in weight space and, if there is a base model, in delta space."""

    name: str
    shape: tuple[int, ...]
    weights: SpaceView
    deltas: SpaceView | None


@dataclass(frozen=True)
class Inspection:
    """
    Result of `inspect_experts`.

    Attributes:
        experts: experts as the user named them.
        tensors: every tensor that would be merged.
        total: the whole model as one point.
    """

    experts: list[str]
    tensors: list[TensorView]
    total: TensorView

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as JSON values."""
        return asdict(self)


def inspect_experts(plan: MergePlan, progress: Callable[[int], None] | None = None) -> Inspection:
    """
    Measure angles and norms of the experts of a plan; one pass over the weights, nothing is written.

    Args:
        plan: Plan of a merge. With a base model both spaces are measured, else weights only.
        progress: Called after every tensor, with its size in bytes.

    Raises:
        ArgumentError: If an expert is an adapter and there is no base model.
        NonFiniteError: If a tensor holds NaN or infinity.
    """
    adapter = next((expert for expert in plan.experts if expert.adapter), None)
    if adapter is not None and plan.base is None:
        raise ArgumentError(
            f"{adapter.spec!r} is an adapter: pass the model it was trained from as base_model, so that its deltas "
            "can be measured beside the weights they change."
        )
    if plan.base is not None:
        # A Gram matrix that includes the base serves both spaces. It does in delta space, and wherever there are
        # adapters.
        plan = replace(plan, space="weights" if any(expert.adapter for expert in plan.experts) else "deltas")
    kernels = load_kernels(plan.args.device)
    steps = [step for step in plan.steps if step.action == "merge"]
    views, total = [], None
    with ThreadPoolExecutor(worker_count(plan)) as pool:
        for step, gram in zip(steps, pool.map(lambda step: _gram(plan, kernels, step), steps)):
            views.append(_view(plan, step.name, step.shape, gram))
            # Inner products of blocks add up to those of the tensor, and these to those of the model.
            whole = fold(gram.copy())[None]
            total = whole if total is None else total + whole
            if progress is not None:
                progress(step.nbytes)
    size = sum(step.numel for step in steps)
    overall = _view(plan, "the whole model", (size,), total if total is not None else np.zeros((1, 1, 1)))
    return Inspection([expert.spec for expert in plan.experts], views, overall)


def _gram(plan: MergePlan, kernels: Kernels, step: TensorStep) -> NDArray[np.float64]:
    inputs = open_tensors(plan, step)
    size = inputs.n_experts + inputs.has_base
    total = np.zeros((step.n_blocks, size, size))
    for piece in pieces(step.n_blocks, step.block_len):
        total[piece.first_block : piece.first_block + piece.n_blocks] += inputs.gram(kernels, piece)[0]
        inputs.release(piece)
    return total


def _view(plan: MergePlan, name: str, shape: tuple[int, ...], gram: NDArray[np.float64]) -> TensorView:
    spaces = {
        space: _space_view(plan, name, points_of(gram, space, plan.base is not None))
        for space in (["weights", "deltas"] if plan.base is not None else ["weights"])
    }
    return TensorView(name, shape, spaces["weights"], spaces.get("deltas"))


def _space_view(plan: MergePlan, name: str, points: NDArray[np.float64]) -> SpaceView:
    options = SpanOptions(on_ambiguous="linear")
    experts = [expert.spec for expert in plan.experts]
    [solution] = solve(points[None], [as_shares(plan.weights)], "karcher", options, tensors=[name], experts=experts)
    geometry = solution.geometry
    assert geometry is not None
    return SpaceView(
        geometry.norms, geometry.max_angle, geometry.mean_angle, geometry.gap_to_nre, geometry.linear_norm_ratio
    )
