"""Read the weights of the experts, the base and the data-free merge, by the names of a model's parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from hf_frmerge.checkpoints.names.model_names import names_of
from hf_frmerge.checkpoints.page_cache import release
from hf_frmerge.checkpoints.tensors.floats import widen
from hf_frmerge.checkpoints.tensors.reader import some
from hf_frmerge.errors import ArgumentError
from hf_frmerge.kernels.product import product
from hf_frmerge.merging.arguments.values import as_shares
from hf_frmerge.merging.decisions import Solution
from hf_frmerge.merging.engine.rules import rule_for
from hf_frmerge.merging.engine.tensor_work import TensorWork
from hf_frmerge.merging.operands.apply import apply
from hf_frmerge.merging.operands.dense_tensors import StoredTensor
from hf_frmerge.merging.operands.open_inputs import open_tensors
from hf_frmerge.merging.planning.blocks import Piece, pieces_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hf_frmerge.calibration.blocks.blockwise_model import BlockwiseModel
    from hf_frmerge.kernels.interface import Kernels
    from hf_frmerge.merging.decisions import Decision
    from hf_frmerge.merging.operands.dense_tensors import DenseTensor
    from hf_frmerge.merging.planning.plan import MergePlan
    from hf_frmerge.merging.planning.tensor_step import TensorStep

_TORCH_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float32}


class UnreadWeights(Mapping[str, Tensor]):
    """
    Weights that are read whenever they are asked for, and not kept.

    Args:
        names: Their names.
        read: Reads one of them.
    """

    def __init__(self, names: Sequence[str], read: Callable[[str], Tensor]) -> None:
        self._names, self._read = names, read

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def tensors_by_parameter(plan: MergePlan, model: BlockwiseModel) -> dict[str, str]:
    """
    Return the tensor of every parameter of a model: parameter -> name in the plan.

    Raises:
        ArgumentError: If a parameter has no tensor, or several tensors are decided together.
    """
    table, stored = names_of(model.model), [step.name for step in plan.steps]

    def in_memory(names: Iterable[str]) -> dict[str, str]:
        return table.canonical(names) if table is not None else {name: name for name in names}

    by_parameter = {name: tensor for tensor, name in in_memory(stored).items()}
    missing = [name for name in model.parameters() if name not in by_parameter]
    left_out = sorted(set(missing) & set(in_memory(plan.left_out).values()))
    if left_out:
        raise ArgumentError(
            f"A calibrated merge runs the merged model, and without {some(left_out)} (leave_out) it is not whole. "
            "Merge without calibration, or leave nothing out that the model computes with."
        )
    if missing:
        raise ArgumentError(
            f"The model has parameters {some(missing)} that are no tensors of these checkpoints under that name, "
            "so it cannot be calibrated. Load the experts with transformers: if it reports none of these as "
            "missing, save them, and they have its names."
        )
    groups = [step.group for step in plan.steps if step.action == "merge"]
    if len(set(groups)) < len(groups):
        raise ArgumentError(
            f"block={plan.args.block!r} decides several tensors together; a calibrated merge starts from tensors "
            "that are merged one by one. Use block='tensor', 'row' or 'head'."
        )
    return {name: by_parameter[name] for name in model.parameters()}


class WeightReader:
    """
    Weights of one plan by the names of the model's parameters, float32.

    Args:
        plan: Plan of the merge; the data-free merge it describes is the start.
        kernels: Kernels of that merge.
        model: The model in memory, for the names of its parameters; it needs no weights.

    Attributes:
        tensors: parameter -> its tensor.

    Raises:
        ArgumentError: If a parameter has no tensor, or several tensors are decided together.
    """

    def __init__(self, plan: MergePlan, kernels: Kernels, model: BlockwiseModel) -> None:
        self._plan, self._kernels = plan, kernels
        self._rule = rule_for(plan)
        steps = {step.name: step for step in plan.steps}
        self.tensors = tensors_by_parameter(plan, model)
        self._steps = {name: steps[tensor] for name, tensor in self.tensors.items()}

    def is_merged(self, parameter: str) -> bool:
        """Whether the tensor is merged, and not copied from one model."""
        return self._steps[parameter].action == "merge"

    def weights(self, parameter: str) -> tuple[float, ...]:
        """Return the experts' shares in a merged tensor, which sum to 1."""
        return tuple(as_shares(self._steps[parameter].weights))

    def scaled(self, parameter: str, merged: Tensor) -> Tensor:
        """Return the base and the scale of the plan times what a merged tensor has on top of it."""
        scale = self._plan.args.scale * self._steps[parameter].scale
        if scale == 1.0:
            return merged
        base = self.base(parameter)
        assert base is not None  # a scale needs deltas, and these a base
        base = base.to(merged.device)
        return base + scale * (merged - base)

    def torch_dtype(self, parameter: str) -> torch.dtype:
        """Return the dtype in which a correction of the merged tensor is stored."""
        return _TORCH_DTYPES[self._steps[parameter].dtype]

    def expert(self, index: int, parameter: str) -> Tensor:
        """Return an expert's values of a parameter: the base's where an adapter does not change it."""
        step = self._steps[parameter]
        inputs = open_tensors(self._plan, step)
        if step.action == "copy":
            return _tensor(_read(inputs.dense[0], step), step)
        if index in inputs.dense:
            return _tensor(_read(inputs.dense[index], step), step)
        assert inputs.base is not None
        values = _read(inputs.base, step)
        if index in inputs.low_rank:
            left, right = inputs.low_rank[index].factors()
            values = values + product(left, right).reshape(-1)
        return _tensor(values, step)

    def factors(self, index: int, parameter: str) -> tuple[Tensor, Tensor] | None:
        """
        Return factors `(rows, k)` and `(k, columns)` of what an adapter adds to a merged parameter, float32.

        Returns:
            `None` for a full model; of an adapter that leaves the parameter alone, factors with k = 0.
        """
        step = self._steps[parameter]
        inputs = open_tensors(self._plan, step)
        if index in inputs.dense:
            return None
        if index not in inputs.low_rank:
            return torch.zeros(step.numel // step.cols, 0), torch.zeros(0, step.cols)
        left, right = inputs.low_rank[index].factors()
        return torch.from_numpy(left), torch.from_numpy(right)

    def base(self, parameter: str) -> Tensor | None:
        """Return the base model's values; `None` if the merge has no base."""
        step = self._steps[parameter]
        base = self._plan.base
        if base is None or base.checkpoint is None or step.name not in base.checkpoint.tensors:
            return None
        return _tensor(_read(StoredTensor(base.checkpoint, base.checkpoint.tensors[step.name]), step), step)

    def operands(self, parameter: str) -> tuple[list[Tensor], bool]:
        """
        Return what the Gram matrix of a merged tensor is of, and whether the base is the first of it.

        That is the base, or the first expert where the merge needs no base, and the differences of the experts, or the
        other ones, to it; float64, `(numel,)`. Deltas of adapters are products of their factors, without the rounding
        of a sum with the base.
        """
        step = self._steps[parameter]
        inputs = open_tensors(self._plan, step)
        first = _read(inputs.base if inputs.base is not None else inputs.dense[0], step).astype(np.float64)
        found = [first]
        for index in range(0 if inputs.has_base else 1, inputs.n_experts):
            if index in inputs.dense:
                found.append(np.subtract(_read(inputs.dense[index], step), first, dtype=np.float64))
            elif index in inputs.low_rank:
                left, right = inputs.low_rank[index].factors()
                found.append(product(left, right).reshape(-1).astype(np.float64))
            else:
                found.append(np.zeros_like(first))
        return [torch.from_numpy(values) for values in found], inputs.has_base

    def step(self, parameter: str) -> TensorStep:
        """Return what is planned for a parameter's tensor."""
        return self._steps[parameter]

    def start(self, parameter: str) -> Tensor:
        """Return the merge without data, as the engine computes it."""
        step = self._steps[parameter]
        if step.action == "copy":
            return self.expert(0, parameter)
        step = replace(step, dtype="F32")
        work = TensorWork(step, inputs := open_tensors(self._plan, step), pieces_of(step))
        decision = self._decide(work)
        out = np.empty(step.numel * 4, np.uint8)
        for piece in work.pieces:
            apply(inputs, decision, self._kernels, piece, out[piece.start * 4 : piece.stop * 4], "F32")
        inputs.release(Piece(0, step.numel, 0, step.n_blocks))
        return _tensor(out.view(np.float32), step)

    def coefficient_table(self, changes: Mapping[str, Tensor]) -> dict[str, NDArray[np.float64]]:
        """Return tensor -> its coefficients, with what a fit adds to those of parameters; see `coefficients`."""
        return {self.tensors[name]: self.coefficients(name, change_RN) for name, change_RN in changes.items()}

    def coefficients(self, parameter: str, change_RN: Tensor) -> NDArray[np.float64]:
        """
        Return the coefficients of a merged tensor, `(blocks, N)`, with what a fit adds to them.

        Args:
            parameter: Of a merge of deltas whose method gives coefficients.
            change_RN: What is added to those of equal runs of the tensor's rows.
        """
        step = self._steps[parameter]
        work = TensorWork(step, open_tensors(self._plan, step), pieces_of(step))
        decision, change = self._decide(work), change_RN.cpu().numpy()
        work.inputs.release(Piece(0, step.numel, 0, step.n_blocks))
        assert isinstance(decision, Solution)
        n_rows = max(len(decision.coefficients), len(change))
        start, change = (np.repeat(each, n_rows // len(each), axis=0) for each in (decision.coefficients, change))
        return start + change

    def _decide(self, work: TensorWork) -> Decision:
        rounds = [work] if self._rule.rounds else []
        while rounds:
            for index in range(len(work.pieces)):
                self._rule.measure(self._kernels, work, index)
            rounds = self._rule.unfinished([work])
        return self._rule.decide([work])[work.step.group].decision


def _read(tensor: DenseTensor, step: TensorStep) -> NDArray[np.float32]:
    """Copy a tensor, and unmap its pages: of all blocks together they are the whole model."""
    operand = tensor.read(0, step.numel)
    values = widen(operand.data, operand.dtype).astype(np.float32, copy=False)  # widen copies
    release([mapped] if (mapped := tensor.mapped(0, step.numel)) is not None else [])
    return values


def _tensor(values: NDArray[np.float32], step: TensorStep) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).reshape(step.shape)
