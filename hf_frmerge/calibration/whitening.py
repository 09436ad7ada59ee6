"""
Solve for the coefficients of a merge with lengths and angles by the experts' Fisher information.

What comes out is a table of coefficients for the engine, so that neither prompts nor Fisher information are needed to
check the merge, or to make it again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm.auto import tqdm

from hf_frmerge.calibration.blocks.block_files import BlockFiles
from hf_frmerge.calibration.blocks.forward import merge_distances
from hf_frmerge.calibration.blocks.matrices import layer_matrix
from hf_frmerge.calibration.blocks.weights import WeightReader
from hf_frmerge.calibration.fits.equations import diagonal_files, kronecker_files
from hf_frmerge.calibration.inputs import batches_of, counts_of, digest_of, fitted_and_held_out, is_silent
from hf_frmerge.calibration.kept_files import RECORD_FILE, read_record, write_record
from hf_frmerge.checkpoints.tensors.reader import some
from hf_frmerge.errors import ArgumentError
from hf_frmerge.fisher.average import FLOOR
from hf_frmerge.fisher.metric import diagonal_metric, kronecker_metric, weighted_gram
from hf_frmerge.kernels.load import load_kernels
from hf_frmerge.merging.decisions import Solution, scaled
from hf_frmerge.merging.engine.journal import fingerprint
from hf_frmerge.merging.engine.solve import points_of, solve
from hf_frmerge.merging.planning.coefficient_table import read_coefficients, write_coefficients
from hf_frmerge.merging.planning.corrections import CalibrationRecord

if TYPE_CHECKING:
    from hf_frmerge.calibration.blocks.blockwise_model import BlockwiseModel
    from hf_frmerge.calibration.prompts.read_prompts import Prompts
    from hf_frmerge.fisher.files import DiagonalFile, KroneckerFile
    from hf_frmerge.fisher.metric import Metric
    from hf_frmerge.merging.engine.processes import Processes
    from hf_frmerge.merging.planning.plan import MergePlan

logger = logging.getLogger(__name__)


def whiten(
    plan: MergePlan,
    whole: MergePlan,
    model: BlockwiseModel,
    prompts: Sequence[Prompts],
    staging: Path,
    processes: Processes,
) -> CalibrationRecord | None:
    """
    Solve a merge with lengths and angles by Fisher information, and write its coefficients.

    Tensors without such information have those without data. The merge is compared with that without data on prompts
    held out, and written whatever these say, as it was asked for by name. One tensor of all models is in memory at a
    time, beside whole models while their information is estimated; that is kept in the user's cache, so that an
    interrupted call goes on with it. Several processes leave all this to the main one.

    Args:
        plan: Plan of the merge, by a method that decides by lengths and angles.
        whole: The same merge into a whole model: another plan if the output is an adapter.
        model: Modules of its models.
        prompts: Prompts of every expert.
        staging: Folder of unfinished files.
        processes: Processes that share the merge.

    Returns:
        How the merge was made; `None` in all processes but the main one.

    Raises:
        ArgumentError: If there are too few prompts to judge by, an expert's information cannot be estimated, or
            predictions depend on none of the tensors that are merged.
        AmbiguousMeanError: If experts cancel, and `on_ambiguous` is `"raise"`.
        NonFiniteError: If a gradient is not finite.
        ResumeError: If the folder holds a calibration with other arguments.
    """
    started = time.process_time()
    fitted, held_out = fitted_and_held_out(plan, prompts)
    if not processes.is_main:
        return None
    kernels = load_kernels(plan.args.device)
    reader = WeightReader(whole, kernels, model)
    # An interrupted call was of the same arguments, or is refused.
    BlockFiles(staging, {**fingerprint(plan, kernels.name), "prompts": [p.digest for p in prompts]})
    done = staging / RECORD_FILE
    if done.exists():  # the merge died after this
        return read_record(done)
    metric_of = _metrics(plan, model, reader, fitted)
    merged = {step.name for step in plan.steps if step.action == "merge"}
    solutions = {}
    for parameter, tensor in tqdm(reader.tensors.items(), "Calibrating", unit="tensor", disable=is_silent(plan)):
        metric = metric_of(parameter) if tensor in merged else None
        if metric is not None:
            solutions[tensor] = _solve(whole, reader, parameter, metric)
    if not solutions:
        raise ArgumentError(
            "The experts' predictions on the prompts depend on none of the tensors that are merged, so that fisher="
            f"{plan.args.fisher!r} would change nothing. Leave it out."
        )
    _warn_of_unconverged(solutions)
    write_coefficients(staging, {name: one.coefficients for name, one in solutions.items()}, whole.space)
    weighted = replace(whole)
    weighted.take_coefficients(read_coefficients(staging))
    distances = merge_distances({"start": whole, "table": weighted}, model, batches_of(plan, model, (), held_out))
    record = CalibrationRecord(
        prompts=counts_of(plan, fitted),
        held_out=counts_of(plan, held_out),
        tokens=sum(len(ids) for p in prompts for ids in p.token_ids),
        source=prompts[0].source,
        digest=digest_of(prompts),
        options={
            "fisher": plan.args.fisher,
            "fisher_labels": plan.args.fisher_labels,
            "floor": FLOOR,
            "weighted_tensors": len(solutions),
            "plain_tensors": len(merged) - len(solutions),
        },
        form="table",
        distances=distances,
        seconds=round(time.process_time() - started, 1),
    )
    write_record(done, record)
    return record


def _metrics(
    plan: MergePlan, model: BlockwiseModel, reader: WeightReader, prompts: Sequence[Prompts]
) -> Callable[[str], Metric | None]:
    """Estimate the experts' information; return what gives a parameter's inner product, or `None` without any."""
    if plan.args.fisher == "diagonal":
        return partial(_diagonal, reader, diagonal_files(plan, model, prompts, is_silent(plan)))
    return partial(_kronecker, reader, model, kronecker_files(plan, model, prompts, is_silent(plan)))


def _diagonal(reader: WeightReader, files: Sequence[DiagonalFile], parameter: str) -> Metric | None:
    if not all(parameter in file for file in files):
        return None
    step = reader.step(parameter)
    return diagonal_metric([file.read(parameter) for file in files], step.weights, step.n_blocks)


def _kronecker(
    reader: WeightReader, model: BlockwiseModel, files: Sequence[KroneckerFile], parameter: str
) -> Metric | None:
    layer, _, kind = parameter.rpartition(".")
    if kind != "weight" or not all(layer in file.record.owner for file in files):
        return None
    step, factors = reader.step(parameter), [file.read_relative(layer) for file in files]
    is_flipped = layer_matrix(model.model, layer).is_flipped
    return kronecker_metric(factors, step.weights, step.n_blocks, is_flipped=is_flipped)


def _solve(whole: MergePlan, reader: WeightReader, parameter: str, metric: Metric) -> Solution:
    """Solve for the coefficients of a tensor as the engine does, in another inner product."""
    step = reader.step(parameter)
    operands, has_base = reader.operands(parameter)
    gram_BKK = weighted_gram([operand.reshape(step.n_blocks, -1) for operand in operands], metric)
    (solution,) = solve(
        points_of(gram_BKK[np.newaxis], whole.space, has_base),
        [step.weights],
        whole.args.method,
        whole.span_options,
        tensors=[step.name],
        experts=[expert.spec for expert in whole.experts],
        numbers=[step.block_len == 1],
    )
    decision = scaled(solution, step.scale)
    assert isinstance(decision, Solution)  # as what is scaled is one
    return decision


def _warn_of_unconverged(solutions: dict[str, Solution]) -> None:
    unsolved = [name for name, one in solutions.items() if one.geometry is not None and not one.geometry.converged]
    if unsolved:
        logger.warning("%s did not reach the tolerance. Raise max_iter, or tol.", some(unsolved))
