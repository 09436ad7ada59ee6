"""Merge adapters again, and compare the factors with those of a merged adapter."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np
from xxhash import xxh3_128_hexdigest

from hf_frmerge.checkpoints.adapters.adapter import open_adapter
from hf_frmerge.checkpoints.source import Source
from hf_frmerge.checkpoints.tensors.floats import SIGNIFICANT_BITS
from hf_frmerge.checkpoints.tensors.reader import open_checkpoint
from hf_frmerge.errors import CheckpointError, NonFiniteError
from hf_frmerge.geometry.lowrank import Factors, concatenate, factor_gram
from hf_frmerge.kernels.product import product
from hf_frmerge.merging.engine.outcomes import StepObserver
from hf_frmerge.merging.engine.processes import Processes
from hf_frmerge.merging.run import run_merge
from hf_frmerge.methods.spectral.decision import tolerance

if TYPE_CHECKING:
    from hf_frmerge.checkpoints.adapters.factors import LowRankDelta
    from hf_frmerge.checkpoints.tensors.reader import Checkpoint
    from hf_frmerge.merging.planning.plan import MergePlan
    from hf_frmerge.merging.record.manifest import Manifest


def compare_adapter(merged: Checkpoint, manifest: Manifest, plan: MergePlan) -> tuple[int, list[str]]:
    """
    Run the plan of a merged adapter again, and compare.

    Sums of the experts are compared factor by factor and bit for bit. What a spectral method made went through LAPACK,
    which may find other factors of the same product on another machine: factors are compared with their digest in
    the record, and the product with that found here, to `methods.spectral.decision.tolerance` of its norm.

    Returns:
        Number of tensors compared, and a sentence for every problem.
    """
    with TemporaryDirectory(prefix="frmerge-verify-") as folder:
        again = Source(folder, "adapter", folder)
        try:
            run_merge(replace(plan, args=replace(plan.args, output_dir=folder)), StepObserver(), Processes())
        except NonFiniteError as error:
            return 0, [str(error)]
        return (
            _compare_modules(merged.source, again, manifest, plan)
            if plan.args.merges_matrices
            else _compare_factors(merged, again)
        )


def _compare_factors(merged: Checkpoint, again: Source) -> tuple[int, list[str]]:
    problems = []
    with open_checkpoint(again) as expected:
        names = sorted(merged.tensors.keys() | expected.tensors.keys())
        for name in names:
            if name not in merged.tensors or name not in expected.tensors:
                problems.append(f"Tensor {name!r} is only in one of the merged adapter and its derivation.")
            elif not np.array_equal(merged.read(name), expected.read(name)):
                problems.append(f"Tensor {name!r} differs from what its experts and options give.")
    return len(names), problems


def _compare_modules(merged: Source, again: Source, manifest: Manifest, plan: MergePlan) -> tuple[int, list[str]]:
    try:
        actual = open_adapter(merged)
    except CheckpointError as error:
        return 0, [str(error)]
    expected = open_adapter(again)
    recorded = {f"{_module_of(step.name, plan)}.weight": manifest.tensors.get(step.name) for step in plan.steps}
    names = sorted(actual.deltas.keys() | expected.deltas.keys())
    problems, allowed = [], tolerance(plan.args.method)
    with closing(actual.checkpoint), closing(expected.checkpoint):
        for name in names:
            entry = recorded.get(name)
            if name not in actual.deltas or name not in expected.deltas:
                problems.append(f"The delta of {name!r} is only in one of the merged adapter and its derivation.")
            elif entry is None or _digest_of(actual.deltas[name]) != entry.output:
                problems.append(f"The delta of {name!r} was changed after the merge.")
            elif not _are_near(expected.deltas[name], actual.deltas[name], allowed):
                problems.append(
                    f"The delta of {name!r} is farther than {allowed:g} of its norm from what its experts and "
                    "options give."
                )
    return 2 * len(names), problems


def _module_of(target: str, plan: MergePlan) -> str:
    """Return the name that a module has in the merged adapter: that of the first expert that changes it."""
    adapters = [expert.adapter for expert in plan.experts if expert.adapter is not None]
    return next(adapter.deltas[target].module for adapter in adapters if target in adapter.deltas)


def _digest_of(delta: LowRankDelta) -> str:
    """Return the digest of the factors as they are stored."""
    parts = [delta.checkpoint.read(info.name) for info in (delta.down, delta.up)]
    return xxh3_128_hexdigest(b"".join(part.data for part in parts))


def _are_near(expected: LowRankDelta, actual: LowRankDelta, allowed: float) -> bool:
    """Whether two products are the same to `allowed` of their norm, after their factors were rounded."""
    here, there = (Factors(*delta.read(), delta.scale) for delta in (expected, actual))
    difference = _norm(concatenate([here, there], np.array([1.0, -1.0])))
    rounding = sum(
        # Both factors are rounded: what the error of one is at most, times the other.
        2.0 ** -SIGNIFICANT_BITS[delta.up.dtype]
        * abs(scale)
        * (np.linalg.norm(B) * np.linalg.norm(A, 2) + np.linalg.norm(B, 2) * np.linalg.norm(A))
        for delta, (B, A, scale) in ((expected, here), (actual, there))
    )
    return bool(difference <= allowed * _norm(here) + rounding)


def _norm(pair: Factors) -> float:
    return float(np.sqrt(max(factor_gram([pair], product)[0, 0], 0.0)))
