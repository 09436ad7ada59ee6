"""
Merge LoRA adapters into one LoRA adapter, without ever building a dense delta.

The Gram matrix of the deltas `s_i B_i A_i` comes exactly from their factors, a method turns it into coefficients, and
`sum_i c_i s_i B_i A_i` is again a product of two factors, of rank `sum_i r_i`. That is exact; a smaller rank costs the
singular values it leaves out, and the report says how much.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hf_frmerge.checkpoints.adapters.adapter import Adapter
from hf_frmerge.checkpoints.adapters.base import common_base
from hf_frmerge.checkpoints.adapters.rows import AdapterRow, align_adapters, missing_notes, zero_notes
from hf_frmerge.checkpoints.adapters.writer import AdapterModule, AdapterWriter, make_config
from hf_frmerge.checkpoints.source import Source
from hf_frmerge.checkpoints.tensors.reader import some, unchanged
from hf_frmerge.errors import ArgumentError, CheckpointError
from hf_frmerge.geometry.gram import embed
from hf_frmerge.geometry.lowrank import Factors, concatenate, factor_gram, recompress
from hf_frmerge.geometry.portable import fold
from hf_frmerge.geometry.sphere import combine, dot, norms
from hf_frmerge.kernels.product import product
from hf_frmerge.merging.engine.ordered_pool import ordered_pool
from hf_frmerge.merging.engine.solve import Geometry, solve
from hf_frmerge.merging.planning.blocks import group_of
from hf_frmerge.methods.span import SpanOptions


@dataclass(frozen=True)
class MergedModule:
    """
    How one module was merged.

    Attributes:
        module: path in the base model.
        target: tensor of the base that it changes.
        keys: names of the written factors, down and up.
        rank: rank of the written factors.
        coefficients: one per adapter, on its delta.
        geometry: norms, angles and convergence of its block (all modules of the block together).
        norm: Frobenius norm of the merged delta.
        truncation_error: norm of what recompression left out, as a share of `norm`; 0 where nothing was.
    """

    module: str
    target: str
    keys: tuple[str, str]
    rank: int
    coefficients: tuple[float, ...]
    geometry: Geometry
    norm: float
    truncation_error: float


@dataclass(frozen=True)
class MergedAdapter:
    """A written adapter: where it is, how every module was merged, and what should be said about the inputs."""

    output_dir: Path
    modules: list[MergedModule]
    notes: list[str]

    @property
    def truncation_error(self) -> float:
        """Norm of what recompression left out of the whole adapter, as a share of its norm."""
        lengths = np.array([module.norm for module in self.modules])
        errors = lengths * [module.truncation_error for module in self.modules]
        total = float(norms(lengths))
        return float(norms(errors)) / total if total > 0 else 0.0


def merge_adapters(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    output_dir: str | Path,
    *,
    base: Source | None = None,
    method: str = "karcher",
    options: SpanOptions | None = None,
    block: str = "tensor",
    weights_for: Callable[[str], Sequence[float]] | None = None,
    rank: int | None = None,
    energy: float | None = None,
    dtype: str | None = None,
    strict: bool = False,
    num_workers: int | None = None,
    on_module: Callable[[MergedModule], None] | None = None,
    on_written: Callable[[MergedAdapter, Path], None] | None = None,
) -> MergedAdapter:
    """
    Merge adapters of one base model in delta space and write the result as a PEFT adapter.

    A module that an adapter does not change is a zero delta of it: no direction, but its weight counts in the norm.

    Args:
        adapters (`Sequence[Adapter]`):
            Two or more, opened; all matched to `base`, or all unmatched.
        weights (`Sequence[float]`):
            One per adapter, non-negative, summing to 1.
        output_dir (`str` or `Path`):
            Folder to write.
        base (`Source`, *optional*):
            Base model that the adapters were matched to; the result names it.
        method (`str`, *optional*, defaults to `"karcher"`):
            A key of `SPAN_METHODS`.
        options (`SpanOptions`, *optional*):
            What the method leaves open.
        block (`str`, *optional*, defaults to `"tensor"`):
            What one sphere covers: `"tensor"` (a module), `"layer"` or `"model"`.
        weights_for (`Callable[[str], Sequence[float]]`, *optional*):
            Weights of a target tensor, in place of `weights`.
        rank (`int`, *optional*):
            Give every module this rank, recompressed or filled up with zeros; less if no module has as much. By
            default ranks add up, which is exact.
        energy (`float`, *optional*):
            Recompress every module to the lowest rank that keeps this share of its squared norm.
        dtype (`str`, *optional*):
            Safetensors code of the output; by default that of the first adapter.
        strict (`bool`, *optional*, defaults to `False`):
            Refuse a module that an adapter lacks.
        num_workers (`int`, *optional*):
            Threads; by default one per available core, at most 4.
        on_module (`Callable[[MergedModule], None]`, *optional*):
            Called after each module is written, in order.
        on_written (`Callable[[MergedAdapter, Path], None]`, *optional*):
            Called when all are, with the report and the file that becomes the adapter's configuration after that:
            what it writes is there before the adapter can be loaded.

    Returns:
        `MergedAdapter`: the report.

    Raises:
        ArgumentError: If options contradict each other.
        CheckpointError: If the adapters do not fit together, or hold something that no adapter can express.
        AmbiguousMeanError: If the adapters balance out in a block and `options.on_ambiguous` is `"raise"`.
    """
    _check_arguments(adapters, weights, block)
    base_model, revision = common_base(adapters, base)
    rows = align_adapters(adapters)
    notes = missing_notes(adapters, rows, strict, is_matched=base is not None)
    with ordered_pool(num_workers) as workers:
        grams = list(workers.map(lambda row: factor_gram(row.factors(), product), rows))
        notes += zero_notes(adapters, rows, grams)
        plans = _solve(
            adapters, rows, grams, weights_for or (lambda _: weights), method, options or SpanOptions(), block
        )
        most = max(plan.most_rank for plan in plans)
        plans = list(workers.map(lambda plan: plan.with_rank(rank and min(rank, most), energy), plans))

        outputs = [plan.output for plan in plans]
        notes += _rank_notes([output.rank for output in outputs], most)
        first = next((adapter.config.raw for adapter in adapters if adapter.config.base_model), adapters[0].config.raw)
        config = make_config(first, outputs) | {"base_model_name_or_path": base_model, "revision": revision}
        done = []
        files = unchanged(adapter.checkpoint for adapter in adapters)  # asked before the writer gives its files names
        with AdapterWriter(output_dir, outputs, config, dtype or rows[0].first.up.dtype) as writer, files:
            for module in workers.map(lambda plan: plan.write(writer), plans):
                done.append(module)
                if on_module is not None:
                    on_module(module)
            merged = MergedAdapter(Path(output_dir), done, notes)
            config_file = writer.publish_weights()
            if on_written is not None:
                on_written(merged, config_file)
    return merged


@dataclass(frozen=True)
class _Plan:
    """What is to be done for one module."""

    row: AdapterRow
    coefficients: NDArray[np.float64]
    geometry: Geometry
    norm: float
    rank: int = 0

    @property
    def used(self) -> list[bool]:
        """Adapters whose factors are written: those with a coefficient, or one if there is none."""
        used = [bool(c) and delta is not None for c, delta in zip(self.coefficients, self.row.deltas)]
        return used if any(used) else [delta is self.row.first for delta in self.row.deltas]

    @property
    def full_rank(self) -> int:
        return sum(delta.rank for delta, use in zip(self.row.deltas, self.used) if use and delta is not None)

    @property
    def output(self) -> AdapterModule:
        first = self.row.first
        return AdapterModule(first.module, first.kind, self.rank, self.row.n_out, first.down.shape[1:])

    def stacked(self) -> Factors:
        return concatenate(self.row.factors(self.used), self.coefficients)

    @property
    def most_rank(self) -> int:
        """Rank that no merged delta of this module exceeds."""
        return min(self.full_rank, self.row.n_out, self.row.n_in)

    def with_rank(self, rank: int | None, energy: float | None) -> _Plan:
        """Decide the rank. The file is laid out before it is written, so an energy bound is worked out twice."""
        if energy is not None:
            return replace(self, rank=recompress(self.stacked(), rank, energy)[0].A.shape[0])
        return replace(self, rank=self.full_rank if rank is None else rank)

    def exact(self) -> Factors:
        """Like `stacked`, but float32 where the inputs are: half the memory traffic for what is rounded next."""
        parts = [
            (pair.B * np.float64(c * pair.scale), pair.A)
            for c, pair, use in zip(self.coefficients, self.row.factors(self.used), self.used)
            if use
        ]
        dtype = np.result_type(*(down for _, down in parts))
        up = np.concatenate([up for up, _ in parts], axis=1, dtype=dtype, casting="same_kind")
        return Factors(up, np.concatenate([down for _, down in parts]))

    def write(self, writer: AdapterWriter) -> MergedModule:
        if self.rank < self.full_rank:
            pair, error = recompress(self.stacked(), self.rank)
        else:
            pair, error = self.exact(), 0.0
        missing = self.rank - pair.A.shape[0]
        writer.write(self.output, np.pad(pair.B, ((0, 0), (0, missing))), np.pad(pair.A, ((0, missing), (0, 0))))
        first, keys = self.row.first, self.output.keys
        coefficients = tuple(self.coefficients.tolist())
        return MergedModule(first.module, first.target, keys, self.rank, coefficients, self.geometry, self.norm, error)


def _check_arguments(adapters: Sequence[Adapter], weights: Sequence[float], block: str) -> None:
    if len(adapters) != len(weights):
        raise ArgumentError(f"Expected one weight per adapter, got {len(weights)} for {len(adapters)} adapters.")
    if block not in ("tensor", "layer", "model"):
        raise ArgumentError(
            f"block={block!r} gives rows of one module different coefficients, which factors cannot express. Use "
            '"tensor", "layer" or "model", or adapter_output="merged".'
        )
    for adapter in adapters:
        if adapter.dense:
            raise CheckpointError(
                f"Adapter {adapter.spec!r} holds full tensors beside its factors (modules_to_save: "
                f'{some(adapter.dense)}), which a merged adapter cannot carry. Use adapter_output="merged".'
            )


def _rank_notes(ranks: Sequence[int], most: int) -> list[str]:
    """Say that ranks differ: PEFT reads every module's own, others the one of the whole adapter."""
    if len(set(ranks)) == 1:
        return []
    return [
        f"The modules of the merged adapter have ranks from {min(ranks)} to {max(ranks)}, listed in rank_pattern and "
        "alpha_pattern of its adapter_config.json. PEFT reads these; runtimes that read only r and lora_alpha scale "
        f"some modules wrongly. adapter_rank={most} (--adapter-rank {most}) gives all modules one rank and loses "
        "nothing; a lower one makes a smaller file, and what it loses is reported."
    ]


def _solve(
    adapters: Sequence[Adapter],
    rows: Sequence[AdapterRow],
    grams: Sequence[NDArray[np.float64]],
    weights_for: Callable[[str], Sequence[float]],
    method: str,
    options: SpanOptions,
    block: str,
) -> list[_Plan]:
    """Find the coefficients of every module from the Gram matrix of its block."""
    groups: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(group_of(row.first.target, block), []).append(index)
    points, used, names = [], [], []
    for group, members in groups.items():
        weights = [tuple(weights_for(rows[index].first.target)) for index in members]
        if len(set(weights)) > 1:
            raise ArgumentError(
                f"weight_rules give modules of one block ({group or 'the model'!r}) different weights: {weights[0]} "
                f"and {next(w for w in weights if w != weights[0])}. Use block='tensor', or rules that keep blocks "
                "whole."
            )
        points.append(embed(fold(np.stack([grams[index] for index in members])))[None])
        used.append(weights[0])
        whole = group if block == "layer" else "the whole model"
        names.append(rows[members[0]].first.target if block == "tensor" else whole)
    experts = [adapter.spec for adapter in adapters]
    solutions = solve(np.stack(points), used, method, options, tensors=names, experts=experts)
    plans: dict[int, _Plan] = {}
    for members, solution in zip(groups.values(), solutions):
        coefficients = solution.coefficients[0]
        for index in members:
            norm = float(np.sqrt(np.maximum(dot(combine(coefficients, grams[index]), coefficients), 0.0)))
            plans[index] = _Plan(rows[index], coefficients, solution.geometry, norm)
    return [plans[index] for index in range(len(rows))]
