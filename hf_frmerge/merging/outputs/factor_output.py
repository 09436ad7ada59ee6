"""Output of merged modules as the factors of an adapter; no dense delta is ever built."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
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
from hf_frmerge.geometry.lowrank import Factors, factor_gram
from hf_frmerge.kernels.product import product
from hf_frmerge.merging.engine.engine import worker_count
from hf_frmerge.merging.engine.outcomes import FactorDetails
from hf_frmerge.merging.outputs.merged_factors import SumOfFactors, merged_factors

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hf_frmerge.checkpoints.adapters.rows import AdapterRow
    from hf_frmerge.kernels.interface import Kernels
    from hf_frmerge.merging.engine.tensor_stack import TensorStack
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
        deltas = [merged_factors(tensor) for tensor in tensors]
        most = max(delta.most_rank for delta in deltas)
        wanted = None if args.adapter_rank is None else min(args.adapter_rank, most)  # a higher rank only adds zeros
        # On threads, as an energy bound takes singular values. The engine's own wait for the layout.
        with ThreadPoolExecutor(worker_count(self._plan)) as pool:
            needed = list(pool.map(lambda delta: delta.rank_to_write(wanted, args.adapter_energy), deltas))
        ranks = [max(needed)] * len(needed) if args.adapter_rank_pattern == "uniform" else needed
        # A module is compressed to the rank it needs; what it is written with beyond that is zeros.
        self._needed = {tensor.step.name: rank for tensor, rank in zip(tensors, needed)}
        modules = [_module(delta.inputs.row, rank) for delta, rank in zip(deltas, ranks)]
        self._modules = {tensor.step.name: module for tensor, module in zip(tensors, modules)}
        self.notes = _rank_notes(ranks)
        adapters = [expert.adapter for expert in self._plan.experts if expert.adapter]
        base_model, revision = common_base(adapters, base.source if base else None)
        source = next((a.config.raw for a in adapters if a.config.base_model), adapters[0].config.raw)
        config = make_config(source, modules) | {"base_model_name_or_path": base_model, "revision": revision}
        self._writer.lay_out(modules, config)

    def merge(self, kernels: Kernels, tensor: TensorWork, piece: Piece) -> str:
        """Compute the factors of a merged module and write them; return the digest of the written bytes."""
        module, delta = self._modules[tensor.step.name], merged_factors(tensor)
        pair, error = delta.compute(self._needed[tensor.step.name])
        if isinstance(delta, SumOfFactors) and delta.inputs.correction is None:
            # After a resume the decision comes from the journal, and the Gram matrix was not computed in this run.
            norm = delta.norm(tensor.grams[0] if tensor.grams.any() else tensor.inputs.gram(kernels, piece)[0][0])
        else:
            norm = float(np.sqrt(factor_gram([pair], product)[0, 0] / (1.0 - error**2)))
        self._details[tensor.step.name] = FactorDetails(module.rank, norm, error)
        missing = module.rank - pair.A.shape[0]
        if missing:  # `adapter_rank`, or the largest rank, is above the rank of the module
            pair = Factors(np.pad(pair.B, ((0, 0), (0, missing))), np.pad(pair.A, ((0, missing), (0, 0))))
        return _joint_digest(self._writer.write(module, pair.B, pair.A))

    def merge_stack(self, kernels: Kernels, stack: TensorStack) -> list[str]:
        """Never called: modules of adapters are not stacked."""
        raise AssertionError("plans of adapters have no stacks")

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


def _module(row: AdapterRow, rank: int) -> AdapterModule:
    first = row.first
    return AdapterModule(first.module, first.kind, rank, row.n_out, first.down.shape[1:])
