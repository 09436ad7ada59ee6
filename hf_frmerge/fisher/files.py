"""Keep the Fisher information of models in files, so that it is estimated once."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm.auto import tqdm

from hf_frmerge.checkpoints.disk import make_folder, write_file
from hf_frmerge.errors import MergeError
from hf_frmerge.evaluation.models.identity import key_of, model_identity, tokens_identity
from hf_frmerge.evaluation.models.loading import ModelLoader
from hf_frmerge.evaluation.suite.suite import default_cache_dir
from hf_frmerge.fisher.diagonal import diagonal_fisher
from hf_frmerge.fisher.kronecker import kronecker_factors

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from hf_frmerge.checkpoints.names.model_names import StackedRows
    from hf_frmerge.checkpoints.source import Source

FORMAT = 2
"""Version of the files, part of every key; raise it when the same inputs would give another estimate."""

ESTIMATORS = {
    "sampled": "sampled labels",
    "exact": "all labels (exact)",
    "empirical": "labels of the text (empirical)",
}


@dataclass(frozen=True)
class FisherRecord:
    """
    How the Fisher information in a file was estimated; kept in the file's header.

    Attributes:
        model: identity of the model.
        kind: `"diagonal"` or `"kfac"`.
        estimator: one of `ESTIMATORS`.
        n_prompts, n_predictions: over which it is a mean.
        seed: of the labels.
        norm: Euclidean norm of all that the file is about: of the diagonal, or of the Kronecker products.
        owner: of Kronecker factors, layer -> the layer under whose name the factor of its inputs is stored.
    """

    model: list[str]
    kind: str
    estimator: str
    n_prompts: int
    n_predictions: int
    seed: int
    norm: float
    owner: dict[str, str]


@dataclass(frozen=True)
class EstimateOptions:
    """
    How Fisher information is estimated.

    Attributes:
        labels: `"sampled"`, `"exact"` or `"empirical"`; see `scores`.
        seed: of what is drawn.
        device: where the model runs.
        is_silent: whether no progress is shown; `None` shows it on a terminal.
    """

    labels: str
    seed: int
    device: str = "cpu"
    is_silent: bool | None = None


@dataclass(frozen=True)
class DiagonalFile:
    """
    Diagonal Fisher information of a model, in a safetensors file.

    Attributes:
        rows: what checkpoints store as matrices and models have in one tensor: matrix -> where it is.
    """

    path: Path
    record: FisherRecord
    rows: Mapping[str, StackedRows] = field(default_factory=dict)

    def __contains__(self, parameter: str) -> bool:
        """Whether there is information of a parameter."""
        with safe_open(self.path, "pt") as stored:
            name = self.rows[parameter].stack if parameter in self.rows else parameter
            return name in stored.keys()  # noqa: SIM118  # it is no mapping

    def read(self, parameter: str) -> Tensor:
        """
        Return the information of a parameter, float32, divided by the norm over all parameters.

        Experts have different scales of information: one that is unsure of everything would else count most.
        """
        if (rows := self.rows.get(parameter)) is None:
            values = _read(self.path, parameter)
        else:
            with safe_open(self.path, "pt") as stored:
                one = stored.get_slice(rows.stack)[rows.place : rows.place + 1]
            values = one[0, rows.first : rows.first + rows.n_rows].clone()
        return values.float() / (self.record.norm or 1.0)


@dataclass(frozen=True)
class KroneckerFile:
    """Kronecker factors of a model's Fisher information, in a safetensors file: their upper triangles."""

    path: Path
    record: FisherRecord

    def read(self, layer: str) -> tuple[Tensor, Tensor]:
        """Return A `(I, I)` and G `(O, O)` of a linear layer, float32; the information of its weight is G (x) A."""
        names = (f"{self.record.owner[layer]}.inputs", f"{layer}.outputs")
        of_inputs, of_outputs = (_symmetric(_read(self.path, name)) for name in names)
        return of_inputs, of_outputs

    def read_relative(self, layer: str) -> tuple[Tensor, Tensor]:
        """Return A and G, the latter divided by the norm over all layers: see `DiagonalFile.read`."""
        of_inputs, of_outputs = self.read(layer)
        return of_inputs, of_outputs / (self.record.norm or 1.0)


def estimate_diagonal(
    expert: Source,
    base: Source | None,
    prompts: Sequence[NDArray[np.int64]],
    parameters: Collection[str],
    options: EstimateOptions,
) -> DiagonalFile:
    """
    Estimate the diagonal Fisher information of an expert on its prompts, or find it in the user's cache.

    It is estimated in float32 and stored in bfloat16, which changes it by 0.4 % at most: its own error is far larger.

    Args:
        expert: Resolved checkpoint on this machine: a whole model, or an adapter, which is merged into its base.
        base: Base of adapters.
        prompts: Token ids `(T,)` of every prompt.
        parameters: Names of the parameters it is needed for.
        options: How it is estimated.

    Raises:
        ArgumentError, NonFiniteError: As `diagonal_fisher` does, with the name of the expert.
        MergeError: If the cache cannot be written.
    """

    def estimate(model: torch.nn.Module, shown: Iterable[NDArray[np.int64]]) -> _Estimate:
        found, n_predictions = diagonal_fisher(model, shown, parameters, labels=options.labels, seed=options.seed)
        stored = {name: values.to("cpu", torch.bfloat16).contiguous() for name, values in found.items()}
        norm = math.sqrt(sum(float(values.double().square().sum()) for values in stored.values()))
        return _Estimate(stored, norm, n_predictions, {})

    return DiagonalFile(*_estimated("diagonal", expert, base, prompts, parameters, options, estimate))


def estimate_kronecker(
    expert: Source,
    base: Source | None,
    prompts: Sequence[NDArray[np.int64]],
    layers: Collection[str],
    options: EstimateOptions,
) -> KroneckerFile:
    """
    Estimate the Kronecker factors of an expert's Fisher information, or find them in the user's cache.

    They are stored in float32: rounded to less, a matrix with small eigenvalues has negative ones.

    Args:
        expert, base, prompts, options: As for `estimate_diagonal`.
        layers: Names of the linear layers they are needed for.

    Raises:
        ArgumentError, NonFiniteError: As `kronecker_factors` does, with the name of the expert.
        MergeError: If the cache cannot be written.
    """

    def estimate(model: torch.nn.Module, shown: Iterable[NDArray[np.int64]]) -> _Estimate:
        found, n_predictions = kronecker_factors(model, shown, layers, labels=options.labels, seed=options.seed)
        squares = [_square(found.inputs[name]) * _square(found.outputs[name]) for name in found.outputs]
        first: dict[int, str] = {}
        owner = {name: first.setdefault(id(values), name) for name, values in found.inputs.items()}
        stored = {f"{name}.outputs": _triangle(found.outputs.pop(name)) for name in [*found.outputs]}
        stored |= {f"{name}.inputs": _triangle(found.inputs.pop(name)) for name in first.values()}
        return _Estimate(stored, math.sqrt(sum(squares)), n_predictions, owner)

    return KroneckerFile(*_estimated("kfac", expert, base, prompts, layers, options, estimate))


@dataclass(frozen=True)
class _Estimate:
    """Tensors to store, their norm, the number of predictions, and whose inputs' factor a layer has."""

    tensors: dict[str, Tensor]
    norm: float
    n_predictions: int
    owner: dict[str, str]


def _estimated(
    kind: str,
    expert: Source,
    base: Source | None,
    prompts: Sequence[NDArray[np.int64]],
    names: Collection[str],
    options: EstimateOptions,
    estimate: Callable[[torch.nn.Module, Iterable[NDArray[np.int64]]], _Estimate],
) -> tuple[Path, FisherRecord]:
    """Return the file with an estimate, made if it is not there, and its record."""
    folder = default_cache_dir().parent / "fisher"
    make_folder(folder)
    identity = [model_identity(one) for one in (expert, *([base] if base and expert.kind == "adapter" else []))]
    tokens = [tokens_identity(torch.from_numpy(ids)) for ids in prompts]
    versions = [FORMAT, torch.__version__, transformers.__version__]
    key = [versions, kind, options.labels, identity, tokens, sorted(names), options.seed, options.device]
    path = folder / f"{key_of(key)}.safetensors"
    try:
        return path, _record(path)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):  # not there, or damaged
        pass
    shown = tqdm(prompts, "Fisher information", unit="prompt", disable=options.is_silent)
    try:
        found = estimate(_whole_model(expert, base, options.device), shown)
    except MergeError as error:
        raise type(error)(f"The Fisher information of {expert.spec!r} cannot be estimated. {error}") from error
    n_prompts, label = len(prompts), ESTIMATORS[options.labels]
    record = FisherRecord(identity, kind, label, n_prompts, found.n_predictions, options.seed, found.norm, found.owner)
    write_file(path, save(found.tensors, {"fisher": json.dumps(asdict(record))}))
    return path, record


def _record(path: Path) -> FisherRecord:
    with safe_open(path, "pt") as stored:
        return FisherRecord(**json.loads(stored.metadata()["fisher"]))


def _read(path: Path, name: str) -> Tensor:
    with safe_open(path, "pt") as stored:
        values: Tensor = stored.get_tensor(name)
    return values


def _square(values: Tensor) -> float:
    return float(values.double().square().sum())


def _triangle(matrix_nn: Tensor) -> Tensor:
    """Return the upper triangle of a symmetric matrix, row by row."""
    return matrix_nn.cpu()[torch.ones_like(matrix_nn, dtype=torch.bool, device="cpu").triu()]


def _symmetric(triangle: Tensor) -> Tensor:
    """Return the matrix whose upper triangle is given."""
    size = (math.isqrt(8 * len(triangle) + 1) - 1) // 2
    upper_nn = triangle.new_zeros(size, size)
    upper_nn[torch.ones(size, size, dtype=torch.bool).triu()] = triangle
    return upper_nn + upper_nn.triu(1).T


def _whole_model(expert: Source, base: Source | None, device: str) -> torch.nn.Module:
    """Return a model in float32; an adapter's is merged, so that gradients are those of whole weights."""
    from peft import PeftModel

    model = ModelLoader(base, torch.float32, device).load(expert)
    return model.merge_and_unload() if isinstance(model, PeftModel) else model
