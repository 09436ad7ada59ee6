"""Output of merged modules as the factors of an adapter; no dense delta is ever built."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from threadpoolctl import threadpool_limits
from xxhash import xxh3_128_hexdigest

from hf_frmerge.checkpoints.adapters.base import common_base
from hf_frmerge.checkpoints.adapters.writer import AdapterModule, AdapterWriter, make_config
from hf_frmerge.checkpoints.beside.look_beside import copy_files
from hf_frmerge.checkpoints.disk import make_folder
from hf_frmerge.checkpoints.tensors.reader import ADAPTER_FILE
from hf_frmerge.geometry.lowrank import Factors, concatenate, factor_gram, kept_rank, recompress
from hf_frmerge.geometry.sphere import combine, dot
from hf_frmerge.kernels.product import product
from hf_frmerge.merging.decisions import Solution
from hf_frmerge.merging.engine.engine import worker_count
from hf_frmerge.merging.engine.outcomes import FactorDetails
from hf_frmerge.merging.operands.factor_inputs import FactorInputs

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hf_frmerge.checkpoints.adapters.rows import AdapterRow
    from hf_frmerge.kernels.interface import Kernels
    from hf_frmerge.merging.engine.tensor_work import TensorWork
    from hf_frmerge.merging.planning.blocks import Piece
    from hf_frmerge.merging.planning.plan import MergePlan


class FactorOutput:
    """
    Output of modules as factors in one adapter file.

    The ranks follow from the coefficients, so the file can only be laid out when all modules are decided: an adapter
    is one batch.
    """

    def __init__(self, plan: MergePlan) -> None:
        self._plan = plan
        self._modules: dict[str, AdapterModule] = {}
        self._needed: dict[str, int] = {}
        self._details: dict[str, FactorDetails] = {}
        self._writer = AdapterWriter(plan.args.output_dir, plan.steps[0].dtype)
        self.staging = self._writer.staging
        self.notes: list[str] = []
        # The engine recompresses modules on threads of its own; BLAS threads that spin under each of them doubled the
        # CPU time of five adapters of a 7B model.
        self._blas_limit = threadpool_limits(1, user_api="blas")

    def begin(self) -> bool:
        """Create the staging folder. The file is created by `lay_out`, in the one process that merges an adapter."""
        make_folder(self.staging)
        return False

    def lay_out(self, tensors: Sequence[TensorWork]) -> None:
        """Choose the rank of every module, and create the file or open that of an earlier run."""
        args, base = self._plan.args, self._plan.base
        sums = [_sum_of(tensor) for tensor in tensors]
        most = max(one.most_rank for one in sums)
        wanted = None if args.adapter_rank is None else min(args.adapter_rank, most)  # a higher rank only adds zeros
        # On threads, as an energy bound takes singular values. The engine's own wait for the layout.
        with ThreadPoolExecutor(worker_count(self._plan)) as pool:
            needed = list(pool.map(lambda one: one.rank_to_write(wanted, args.adapter_energy), sums))
        ranks = [max(needed)] * len(needed) if args.adapter_rank_pattern == "uniform" else needed
        # A module is compressed to the rank it needs; what it is written with beyond that is zeros.
        self._needed = {tensor.step.name: rank for tensor, rank in zip(tensors, needed)}
        modules = [_module(one.inputs.row, rank) for one, rank in zip(sums, ranks)]
        self._modules = {tensor.step.name: module for tensor, module in zip(tensors, modules)}
        self.notes = _rank_notes(ranks)
        adapters = [expert.adapter for expert in self._plan.experts if expert.adapter]
        base_model, revision = common_base(adapters, base.source if base else None)
        source = next((a.config.raw for a in adapters if a.config.base_model), adapters[0].config.raw)
        config = make_config(source, modules) | {"base_model_name_or_path": base_model, "revision": revision}
        self._writer.lay_out(modules, config)

    def merge(self, kernels: Kernels, tensor: TensorWork, piece: Piece) -> str:
        """Compute the factors of a merged module and write them; return the digest of the written bytes."""
        module, terms = self._modules[tensor.step.name], _sum_of(tensor)
        needed = self._needed[tensor.step.name]
        if needed < terms.rank:
            pair, error = recompress(concatenate(*terms.read()), needed)
        else:
            pair, error = _exact(*terms.read()), 0.0
        if terms.inputs.correction is None:
            # After a resume the decision comes from the journal, and the Gram matrix was not computed in this run.
            coefficients = terms.coefficients
            gram = tensor.grams[0] if tensor.grams.any() else tensor.inputs.gram(kernels, piece)[0][0]
            squared = dot(combine(coefficients, gram), coefficients)
        else:
            squared = factor_gram([pair], product)[0, 0]
        norm = float(np.sqrt(np.maximum(squared, 0.0)))
        self._details[tensor.step.name] = FactorDetails(module.rank, norm, error)
        missing = module.rank - pair.A.shape[0]
        if missing:  # `adapter_rank`, or the largest rank, is above the rank of the module
            pair = Factors(np.pad(pair.B, ((0, 0), (0, missing))), np.pad(pair.A, ((0, missing), (0, 0))))
        return _joint_digest(self._writer.write(module, pair.B, pair.A))

    def copy(self, kernels: Kernels, tensor: TensorWork, piece: Piece) -> str:
        """Never called: an adapter cannot hold a copy of a module of the base."""
        raise AssertionError("plans of adapters copy nothing")

    def read_back(self, tensor: TensorWork, piece: Piece) -> str:
        """Return the digest of a module's factors in the unfinished file."""
        return _joint_digest(self._writer.read_back(self._modules[tensor.step.name]))

    def details(self, tensor: str) -> FactorDetails:
        """Return rank, norm and truncation error of a written module."""
        return self._details[tensor]

    def sync(self) -> None:
        """Sync the file to disk."""
        self._writer.sync()

    def publish(self) -> dict[str, Path]:
        """Copy the files that the adapter takes from its sources, and rename its weights into place."""
        folder = self._writer.output_dir
        names = copy_files(self._plan.carried, folder)
        self._writer.publish()
        return {name: folder / name for name in [*names, ADAPTER_FILE]}

    def write_config(self) -> Path:
        """Write `adapter_config.json` into the staging folder."""
        return self._writer.write_config()

    def close(self) -> None:
        """Close the file."""
        self._blas_limit.restore_original_limits()
        self._writer.close()


def _joint_digest(parts: Sequence[NDArray[np.uint8]]) -> str:
    return xxh3_128_hexdigest(b"".join(part.data for part in parts))


@dataclass(frozen=True)
class _Sum:
    """
    What is summed to the delta of a module: the adapters that have a coefficient, and what calibration adds.

    Attributes:
        inputs: factors of all adapters, and the correction.
        coefficients: of every adapter.
    """

    inputs: FactorInputs
    coefficients: NDArray[np.float64]

    @property
    def used(self) -> list[bool]:
        """Whose factors are written: of adapters with a coefficient; if there are none, of the first."""
        row = self.inputs.row
        used = [bool(c) and delta is not None for c, delta in zip(self.coefficients, row.deltas)]
        return used if any(used) else [delta is row.first for delta in row.deltas]

    @property
    def rank(self) -> int:
        """Rank of the factors side by side."""
        ranks = (delta.rank for delta, use in zip(self.inputs.row.deltas, self.used) if use and delta is not None)
        return sum(ranks) + self.inputs.correction_rank

    @property
    def most_rank(self) -> int:
        """Upper limit for the rank of the delta."""
        return min(self.rank, self.inputs.row.n_out, self.inputs.row.n_in)

    def read(self) -> tuple[list[Factors], NDArray[np.float64]]:
        """Read the factors; return them with their coefficients."""
        factors, coefficients = self.inputs.row.factors(self.used), self.coefficients
        if self.inputs.correction is not None:
            factors.append(self.inputs.read_correction())
            coefficients = np.append(coefficients, 1.0)
        return factors, coefficients

    def rank_to_write(self, rank: int | None, energy: float | None) -> int:
        """Return the rank to write. For an energy bound that takes half of a recompression, with one to follow."""
        if energy is not None:
            return kept_rank(concatenate(*self.read()), rank, energy)
        return self.rank if rank is None else rank


def _sum_of(tensor: TensorWork) -> _Sum:
    assert isinstance(tensor.inputs, FactorInputs) and isinstance(tensor.decision, Solution)
    return _Sum(tensor.inputs, tensor.decision.coefficients[0])


def _rank_notes(ranks: Sequence[int]) -> list[str]:
    """Note it if ranks differ: PEFT reads the rank of every module, but other runtimes only that of the adapter."""
    if len(set(ranks)) == 1:
        return []
    return [
        f"The modules of the merged adapter have ranks from {min(ranks)} to {max(ranks)}, listed in rank_pattern and "
        "alpha_pattern of its adapter_config.json. PEFT reads these; runtimes that read only r and lora_alpha scale "
        "some modules wrongly. adapter_rank_pattern='uniform' (--adapter-rank-pattern uniform) gives all of them rank "
        f"{max(ranks)}, filled up with zeros, and loses nothing; adapter_rank=R (--adapter-rank R) makes a smaller "
        "file, and what it loses is reported."
    ]


def _exact(factors: Sequence[Factors], coefficients: NDArray[np.float64]) -> Factors:
    """Do what `concatenate` does, in float32 if the inputs are: half the memory traffic, and it is rounded next."""
    used = [(pair, c) for pair, c in zip(factors, coefficients) if pair.A.shape[0]]
    scales = [c * pair.scale for pair, c in used]
    up = np.concatenate([pair.B for pair, _ in used], axis=1)
    # The product is taken in float64, and rounded as it is stored.
    np.multiply(up, np.repeat(scales, [pair.A.shape[0] for pair, _ in used]), out=up, casting="same_kind")
    return Factors(up, np.concatenate([pair.A for pair, _ in used]))


def _module(row: AdapterRow, rank: int) -> AdapterModule:
    first = row.first
    return AdapterModule(first.module, first.kind, rank, row.n_out, first.down.shape[1:])
