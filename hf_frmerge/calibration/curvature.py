r"""
Ask before a merge whether its geometry can matter: how different are the curvatures of the experts' predictions?

Near expert i, predictions of a model with weights W differ from the expert's by a Kullback-Leibler divergence of
\(\frac12 (W - W_i) \cdot F_i (W - W_i)\), with F_i the expert's Fisher information. Were it the same for all experts,
their plain mean would cost least. How much less the best point costs than the plain mean is half of

\(\eta = c \cdot \bar F^{-1} c, \quad c = \sum_i w_i (F_i - \bar F)(W_i - \bar W), \quad \bar F = \sum_i w_i F_i\)

(EpiMer, arXiv 2605.26693). It is taken layer by layer, with the Kronecker factors of the information, between the
leading singular vectors of what the experts changed: elsewhere a few prompts say nothing of use.
"""

# Shape suffixes: I = inputs of a layer, O = outputs, K = directions of either.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_frmerge.calibration.baselines.mats import conjugate_gradients
from hf_frmerge.calibration.blocks.matrices import is_linear, layer_matrix
from hf_frmerge.calibration.blocks.weights import WeightReader
from hf_frmerge.calibration.fits.equations import kronecker_files
from hf_frmerge.calibration.inputs import HELD_OUT, is_silent, open_runnable, prompts_of, tokenizer_of
from hf_frmerge.calibration.prompts.read_prompts import split_prompts
from hf_frmerge.checkpoints.tensors.reader import some
from hf_frmerge.errors import ArgumentError
from hf_frmerge.kernels.load import load_kernels
from hf_frmerge.merging.engine.processes import Processes

if TYPE_CHECKING:
    from hf_frmerge.merging.planning.plan import MergePlan

DIRECTIONS = 32
"""Leading singular directions of what an expert changed, in each layer."""

_MAX_ITER = 1000


@dataclass(frozen=True)
class BlockCurvature:
    """
    Curvature of the experts' predictions in the linear layers of one block.

    Attributes:
        name: of the block.
        traces: of every expert's Fisher information: the sum over all weights of how much a prediction depends on it.
        cost: of the plain mean, in nats a prediction.
        eta: twice the part of it that the best point for these curvatures saves.
    """

    name: str
    traces: tuple[float, ...]
    cost: float
    eta: float


@dataclass(frozen=True)
class Curvature:
    """
    Curvature of the experts' predictions.

    Attributes:
        blocks: block by block, in the order of the forward pass.
        n_predictions: of every expert, over which it is a mean.
        labels: what the Fisher information is about; see `hf_frmerge.fisher.scores`.
    """

    blocks: tuple[BlockCurvature, ...]
    n_predictions: tuple[int, ...]
    labels: str

    @property
    def cost(self) -> float:
        """Cost of the plain mean over all blocks, in nats a prediction."""
        return sum(block.cost for block in self.blocks)

    @property
    def eta(self) -> float:
        """EpiMer's eta over all blocks."""
        return sum(block.eta for block in self.blocks)

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as JSON values."""
        return {**asdict(self), "cost": self.cost, "eta": self.eta}


def measure_curvature(plan: MergePlan, calibration: Any, processing_class: Any = None) -> Curvature:
    """
    Measure the curvatures of the experts' predictions on prompts; nothing is written but the cache.

    The prompts are those that `--method mats` with the same options would fit to, so that it finds them in the cache.

    Args:
        plan, calibration, processing_class: As for `prepare`.

    Raises:
        ArgumentError: As `prepare` does, or if an expert has no prompts.
        NonFiniteError: If an input or a gradient is not finite.
    """
    whole, model = open_runnable(plan)
    prompts = prompts_of(plan, model, calibration, tokenizer_of(plan, whole, processing_class))(Processes(alone=True))
    known = {own.expert for own in prompts}
    without = [expert.spec for place, expert in enumerate(plan.experts) if place not in known]
    if without:
        raise ArgumentError(
            f"The curvatures of all experts are compared, and {some(without)} has no prompts. Pass some for it too, "
            "or one file for all experts."
        )
    fitted, _ = split_prompts(prompts, HELD_OUT, plan.args.seed)
    files = kronecker_files(plan, model, fitted, is_silent(plan))
    reader = WeightReader(whole, load_kernels(plan.args.device), model)
    blocks = []
    for block in model.blocks:
        module, cost, eta, traces = model.block(block), 0.0, 0.0, [0.0] * len(files)
        for name, layer in module.named_modules():
            weight = f"{block}.{name}.weight"
            if not is_linear(layer) or not all(f"{block}.{name}" in file.record.owner for file in files):
                continue
            factors = [file.read(f"{block}.{name}") for file in files]
            traces = [total + float(a.trace() * g.trace()) for total, (a, g) in zip(traces, factors)]
            if reader.is_merged(weight):
                read = [reader.base(weight), *(reader.expert(index, weight) for index in range(len(files)))]
                matrix = layer_matrix(module, name)
                base, *experts = [None if one is None else matrix.read({matrix.weight: one}) for one in read]
                shares = reader.weights(weight)
                of_layer = layer_curvature([one for one in experts if one is not None], base, factors, shares)
                cost, eta = cost + of_layer[0], eta + of_layer[1]
        blocks.append(BlockCurvature(block, tuple(traces), cost, eta))
    return Curvature(tuple(blocks), tuple(file.record.n_predictions for file in files), plan.args.fisher_labels)


def layer_curvature(
    experts: Sequence[Tensor],
    base: Tensor | None,
    factors: Sequence[tuple[Tensor, Tensor]],
    shares: Sequence[float],
    n_directions: int = DIRECTIONS,
) -> tuple[float, float]:
    """
    Return what the plain mean of a layer costs, in nats a prediction, and eta.

    Args:
        experts: Weight `(O, I)` of the layer in every expert.
        base: That of the base; without one the experts are compared with their mean.
        factors: A `(I, I)` and G `(O, O)` of every expert.
        shares: Weights of the experts, summing to 1.
        n_directions: Leading singular vectors of an expert's change between which the layer is looked at, on either
            side; together those of all experts.
    """
    mean_OI = torch.stack([share * one.double() for share, one in zip(shares, experts)]).sum(0)
    changes = [one.double() - (mean_OI if base is None else base.double()) for one in experts]
    with torch.random.fork_rng():  # it starts from random directions, a few more than are kept
        torch.manual_seed(0)
        singular = [torch.svd_lowrank(one, min(n_directions + 16, *one.shape), niter=4) for one in changes]
    left_OK = _span([(left[:, :n_directions], values[:n_directions]) for left, values, _ in singular])
    right_IK = _span([(right[:, :n_directions], values[:n_directions]) for _, values, right in singular])
    if not left_OK.shape[1]:
        return 0.0, 0.0
    points = [left_OK.T @ (one.double() - mean_OI) @ right_IK for one in experts]
    terms = [(right_IK.T @ a.double() @ right_IK, left_OK.T @ g.double() @ left_OK) for a, g in factors]

    def pulled(displaced: Sequence[Tensor]) -> Tensor:
        return torch.stack([share * (g @ one @ a) for share, (a, g), one in zip(shares, terms, displaced)]).sum(0)

    cost = 0.5 * sum(share * float((one * (g @ one @ a)).sum()) for share, (a, g), one in zip(shares, terms, points))
    # Around the mean the displacements add up to nothing, so that c is what the experts' own curvatures pull.
    c_KK = pulled(points)
    solved_KK = conjugate_gradients(lambda step: pulled([step] * len(points)), c_KK, _MAX_ITER)
    return cost, float((c_KK * solved_KK).sum())


def _span(vectors: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Return an orthonormal basis of what singular vectors span, without those whose value is a rounding error."""
    largest = max(float(values.max()) for _, values in vectors)
    kept = [columns[:, values > 1e-5 * largest] for columns, values in vectors]
    basis, sizes, _ = torch.linalg.svd(torch.cat(kept, dim=1), full_matrices=False)
    return basis[:, sizes > 1e-6]
