"""
Extract a LoRA adapter from the difference of two full checkpoints.

The best rank-`r` approximation of a dense delta is its truncated SVD (Eckart and Young). A randomised range
finder with power iterations computes it (Halko, Martinsson and Tropp 2011, algorithms 4.4 and 5.1), which reads the
delta in chunks of rows and needs no dense SVD. Every module's error is measured against its delta, not estimated.

Of a merge that was fitted to its experts, the factors that the fit added can be taken instead, as they are recorded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hf_frmerge.checkpoints.adapters.writer import AdapterModule, make_config, new_adapter
from hf_frmerge.checkpoints.alignment.renames import agree_on_names
from hf_frmerge.checkpoints.lock import sole_writer
from hf_frmerge.checkpoints.quantised.dequantise import dequantise
from hf_frmerge.checkpoints.tensors.floats import narrow, widen
from hf_frmerge.checkpoints.tensors.quantised import refuse_quantised
from hf_frmerge.checkpoints.tensors.reader import Checkpoint, some, unchanged
from hf_frmerge.errors import ArgumentError, CheckpointError, NonFiniteError
from hf_frmerge.extraction.correction import read_correction
from hf_frmerge.extraction.difference import DenseDelta
from hf_frmerge.extraction.targets import ExtractTarget, find_modules, task_type
from hf_frmerge.merging.arguments.merging_arguments import MergingArguments
from hf_frmerge.merging.engine.ordered_pool import ordered_pool
from hf_frmerge.merging.output_folder import check_output_dir, remove_model
from hf_frmerge.merging.planning.account import ModelAccount

_LEAST_NORM, _MOST_NORM = 2.0**-100, 2.0**100  # norms of a delta between which products fit into float32
_SMALL = 1e-5  # share of a delta that may be missing beside what rounding the two models took
_OVERSAMPLING = 10  # extra random directions; 5 to 10 suffice (Halko et al., section 4.2)


@dataclass(frozen=True)
class ExtractOptions:
    """
    Options of `extract_lora`.

    Attributes:
        rank: maximum rank of a module.
        energy: share of the delta's squared norm to keep; every module gets the lowest rank, up to `rank`, that does.
            By default all get `rank`.
        correction: take the factors that a fit added to the model, which `base` then lacks; the numbers above and
            below that choose factors have no part in it.
        target_modules: last names of the modules to adapt, as in PEFT (`"q_proj"`, also `"embed_tokens"`); by default
            all linear layers but the output layer.
        power_iterations: more iterations come closer to the exact SVD if singular values decay slowly; each reads the
            delta twice.
        dtype: safetensors code of the factors; by default that of the first module in the fine-tuned model.
        seed: seed of the random directions.
        num_workers: number of threads; by default one per core, at most 4.

    Raises:
        ArgumentError: If a number is out of range.
    """

    rank: int = 16
    energy: float | None = None
    correction: bool = False
    target_modules: Sequence[str] | None = None
    power_iterations: int = 2
    dtype: str | None = None
    seed: int = 42
    num_workers: int | None = None

    def __post_init__(self) -> None:
        for name, holds, wanted in (
            ("rank", self.rank >= 1, "at least 1"),
            ("power_iterations", self.power_iterations >= 0, "at least 0"),
            ("energy", self.energy is None or 0 < self.energy <= 1, "above 0 and at most 1 (a share)"),
        ):
            if not holds:
                raise ArgumentError(f"`{name}` must be {wanted}, but got {getattr(self, name)}.")
        if self.correction and self.energy is not None:
            raise ArgumentError(
                "`energy` chooses ranks, but those of a `correction` are as the fit made them. Give one."
            )


@dataclass(frozen=True)
class ExtractedModule:
    """
    One module of an extracted adapter.

    Attributes:
        module: path of the module in the base model.
        target: name of its weight in the base checkpoint.
        rank: rank of its factors.
        norm: Frobenius norm of the dense delta.
        error: norm of the delta minus the product of the written factors, as a share of `norm`.
    """

    module: str
    target: str
    rank: int
    norm: float
    error: float


@dataclass(frozen=True)
class ExtractedAdapter:
    """
    A written adapter, and the changes it leaves out.

    Attributes:
        output_dir: folder of the adapter.
        modules: modules it changes, with their errors.
        unchanged: modules that are equal in both checkpoints.
        left_out: other tensors that differ (embeddings, norms, biases), with the norms of their differences.
        accounts: what became of the tensors of the fine-tuned model, and of the base.
    """

    output_dir: Path
    modules: list[ExtractedModule]
    unchanged: list[str]
    left_out: dict[str, float]
    accounts: tuple[ModelAccount, ...]

    @property
    def error(self) -> float:
        """Norm of everything the adapter lacks, as a share of the norm of the whole difference."""
        lost = [module.norm * module.error for module in self.modules] + list(self.left_out.values())
        total = [module.norm for module in self.modules] + list(self.left_out.values())
        return float(np.linalg.norm(lost) / np.linalg.norm(total))


def extract_lora(
    merged: Checkpoint,
    base: Checkpoint,
    output_dir: str | Path,
    options: ExtractOptions | None = None,
    *,
    overwrite: bool = False,
) -> ExtractedAdapter:
    """
    Write a PEFT adapter that approximates the difference between `merged` and `base`.

    Args:
        merged (`Checkpoint`):
            Fine-tuned or merged model.
        base (`Checkpoint`):
            Model the adapter will be loaded on. Its `config.json` determines which tensors belong to linear layers.
        output_dir (`str` or `Path`):
            Folder to write.
        options (`ExtractOptions`, *optional*):
            Rank, modules and other options.
        overwrite (`bool`, *optional*, defaults to `False`):
            Replace a model or adapter in `output_dir`.

    Returns:
        `ExtractedAdapter`: Ranks and errors by module, and the tensors that were left out.

    Raises:
        ArgumentError: If no module matches `target_modules`, or `output_dir` is an input or not empty.
        CheckpointError: If a checkpoint is quantised, if they do not fit together or are equal in all chosen modules,
            or differ by other things than a correction that is to be extracted.
        NonFiniteError: If a tensor has NaN or infinity, or the norm of a difference is too far from 1 for float32.
        MergeError: If a merge is writing to `output_dir`, or the disk fails.
    """
    for checkpoint in (merged, base):
        dequantise(checkpoint)
        refuse_quantised(checkpoint)
    args, inputs = MergingArguments(str(output_dir), overwrite=overwrite), [merged.source.path, base.source.path]
    check_output_dir(args, inputs)
    with sole_writer(output_dir):
        check_output_dir(args, inputs)  # again under the lock: another process may have written there meanwhile
        return _extract(merged, base, Path(output_dir), options or ExtractOptions())


def _extract(merged: Checkpoint, base: Checkpoint, output_dir: Path, options: ExtractOptions) -> ExtractedAdapter:
    """Factor all modules in parallel, then write the adapter; the caller holds the lock of the folder."""
    agree_on_names([base, merged])
    targets = find_modules(base, options.target_modules)
    for target in targets:
        _check_pair(merged, base, target.tensor)
    code = options.dtype or merged.tensors[targets[0].tensor].dtype
    factors = read_correction(merged) if options.correction else {}

    def work(numbered: tuple[int, ExtractTarget]) -> _Factored | None:
        index, target = numbered
        delta = DenseDelta(merged, base, target.tensor)
        if options.correction:
            return _given(delta, target, factors[target.tensor], code) if target.tensor in factors else None
        # A generator per module: the result does not depend on the order in which threads run.
        return _factorise(delta, target, options, code, np.random.default_rng([options.seed, index]))

    with unchanged([merged, base]), ordered_pool(options.num_workers) as workers:
        factored = list(workers.map(work, enumerate(targets)))
        extracted = {result.report.target for result in factored if result is not None}
        done = extracted if options.correction else {target.tensor for target in targets}
        others = _other_tensors(merged, base, done)
        norms = list(workers.map(lambda name: DenseDelta(merged, base, name).norm(), others))
    changed = [result for result in factored if result is not None]
    if not changed:
        raise CheckpointError(
            f"{merged.source.spec!r} and {base.source.spec!r} are equal in all {len(targets)} modules asked for "
            f"({some(target.module for target in targets)}): there is nothing to extract."
        )
    modules = [result.output for result in changed]
    source = base.source
    config = make_config({"task_type": task_type(base.config())}, modules)
    config |= {"base_model_name_or_path": source.repo_id or source.spec, "revision": source.revision}
    config["fan_in_fan_out"] = any(target.is_conv1d for target in targets)
    remove_model(output_dir)
    with new_adapter(output_dir, modules, config, code) as writer:
        for result in changed:
            writer.write(result.output, result.up, result.down)
    left_out = {name: norm for name, norm in zip(others, norms) if norm > 0}
    compared = {target.tensor for target in targets} | set(others)
    return ExtractedAdapter(
        output_dir,
        [result.report for result in changed],
        [target.module for target, result in zip(targets, factored) if result is None],
        left_out,
        tuple(_account(checkpoint, extracted, left_out.keys(), compared) for checkpoint in (merged, base)),
    )


def _account(
    checkpoint: Checkpoint, extracted: Collection[str], left_out: Collection[str], compared: Collection[str]
) -> ModelAccount:
    """Count the tensors that are in the adapter, equal in both models, or neither, and why."""
    fates: Counter[str] = Counter()
    for name, info in checkpoint.tensors.items():
        if name in extracted:
            fate = "adapter"
        elif name in left_out:
            fate = "that differ and are left as in the base"
        elif name in compared:
            fate = "equal"
        else:
            fate = "in one of the models only" if info.is_float else "that hold no weights"
        fates[fate] += len(info.stored)
    unused = {fate: count for fate, count in fates.items() if fate not in ("adapter", "equal")}
    return ModelAccount(sum(fates.values()), fates["adapter"], fates["equal"], unused)


@dataclass(frozen=True)
class _Factored:
    """Factors of one module, as they are written, with its report."""

    output: AdapterModule
    up: NDArray[np.floating]
    down: NDArray[np.floating]
    report: ExtractedModule


def _factorise(
    delta: DenseDelta, target: ExtractTarget, options: ExtractOptions, dtype: str, rng: np.random.Generator
) -> _Factored | None:
    """Factor one delta by a randomised SVD and measure the error; `None` if the delta is zero."""
    norm = delta.norm()
    if norm == 0.0:
        return None
    if not _LEAST_NORM < norm < _MOST_NORM:
        raise NonFiniteError(
            f"Tensor {delta.name!r} differs between {delta.merged.source.spec!r} and {delta.base.source.spec!r} by a "
            f"norm of {norm:.3g}: too far from 1 for products in float32. Leave its module out of `target_modules`."
        )
    rows, cols = delta.shape
    directions = min(options.rank + _OVERSAMPLING, rows, cols)
    basis = np.linalg.qr(delta.times(rng.standard_normal((cols, directions))))[0]
    for _ in range(options.power_iterations):
        # Orthonormalise at every half step: powers of large singular values would drown the small ones in rounding.
        basis = np.linalg.qr(delta.times(np.linalg.qr(delta.transposed_times(basis))[0]))[0]
    right, values, small = np.linalg.svd(delta.transposed_times(basis), full_matrices=False)
    keep = min(options.rank, directions)
    if options.energy is not None:
        is_enough = np.cumsum(values[:keep] ** 2) >= options.energy * norm**2
        keep = int(np.argmax(is_enough)) + 1 if is_enough.any() else keep
    # Each factor gets the root of the singular values, so that both have the same scale.
    root = np.sqrt(values[:keep])
    return _factored(delta, target, (basis @ small[:keep].T) * root, (right[:, :keep] * root).T, norm, dtype)


def _given(
    delta: DenseDelta, target: ExtractTarget, factors: tuple[NDArray[np.floating], NDArray[np.floating]], dtype: str
) -> _Factored | None:
    """Take the factors of one delta, after a check that they are what the models differ by; `None` if it is zero."""
    norm = delta.norm()
    if norm == 0.0:
        return None
    result = _factored(delta, target, *factors, norm, dtype)
    if result.report.error * norm > delta.rounding() + _SMALL * norm:
        raise CheckpointError(
            f"{delta.merged.source.spec!r} and {delta.base.source.spec!r} differ in {delta.name!r} by more than the "
            "correction that the fit added. The base has to be the same merge without calibration: leave out "
            "--calibration (calibration_dataset) and merge into another folder."
        )
    return result


def _factored(
    delta: DenseDelta,
    target: ExtractTarget,
    left: NDArray[np.floating],
    right: NDArray[np.floating],
    norm: float,
    dtype: str,
) -> _Factored:
    """Return one delta as factors, rounded as they are written, with the error that is left."""
    up, down = (right.T, left.T) if target.transposed else (left, right)
    up, down = _rounded(up, dtype), _rounded(down, dtype)
    error = delta.distance(down.T, up.T) if target.transposed else delta.distance(up, down)
    rank = down.shape[0]
    output = AdapterModule(target.module, target.kind, rank, up.shape[0], (down.shape[1],))
    return _Factored(output, up, down, ExtractedModule(target.module, target.tensor, rank, norm, error / norm))


def _rounded(values: NDArray[np.floating], dtype: str) -> NDArray[np.floating]:
    """Round values to the dtype they are written in, so that the measured error includes the rounding."""
    return widen(narrow(values, dtype), dtype).reshape(values.shape)


def _check_pair(merged: Checkpoint, base: Checkpoint, name: str) -> None:
    """Raise `CheckpointError` unless a tensor is float and has one shape in both checkpoints."""
    of_merged, of_base = merged.tensors.get(name), base.tensors[name]
    if of_merged is None or of_merged.shape != of_base.shape or not of_merged.is_float or not of_base.is_float:
        actual = f"{of_merged.dtype} {of_merged.shape}" if of_merged else "missing"
        raise CheckpointError(
            f"Tensor {name!r} is {of_base.dtype} {of_base.shape} in {base.source.spec!r} but {actual} in "
            f"{merged.source.spec!r}. An adapter needs float tensors of one shape in both."
        )


def _other_tensors(merged: Checkpoint, base: Checkpoint, done: set[str]) -> list[str]:
    """
    List float tensors in both checkpoints that the adapter does not change. A tensor in only one has no difference.

    Raises:
        CheckpointError: If a tensor has another shape in `merged`.
    """
    resized = [
        name
        for name, info in base.tensors.items()
        if name in merged.tensors and merged.tensors[name].shape != info.shape
    ]
    if resized:
        raise CheckpointError(
            f"{some(resized)} differ in shape between {merged.source.spec!r} and {base.source.spec!r} (a resized "
            "vocabulary?); an adapter cannot express that."
        )
    both = [name for name in base.tensors if name in merged.tensors and name not in done]
    return [name for name in both if base.tensors[name].is_float and merged.tensors[name].is_float]
