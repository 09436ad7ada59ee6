"""Refine what a fit found, and write it if it is nearer to the experts."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from hf_frmerge.calibration.blocks.block_files import factors_for_adapter
from hf_frmerge.calibration.blocks.streams import Batch
from hf_frmerge.calibration.refinement.corrected_merge import corrections_to_refine, parameter_of, read_start
from hf_frmerge.calibration.refinement.expert_updates import coefficients_to_refine, write_table
from hf_frmerge.calibration.refinement.losses import row_losses
from hf_frmerge.calibration.refinement.progress_file import Best, write_tensors
from hf_frmerge.calibration.refinement.refine import Refinement, RefineOptions
from hf_frmerge.calibration.sweep import FittedBlock, Sweep
from hf_frmerge.merging.planning.corrections import CORRECTIONS_FILE, Form, RefinementRecord, mean_known

if TYPE_CHECKING:
    from hf_frmerge.merging.arguments.merging_arguments import MergingArguments

PROGRESS_FILE = "refinement.safetensors"

_LEARNING_RATES: dict[Form, float] = {"table": 1e-2, "dense": 3e-5, "low_rank": 3e-4}


def refine_fit(
    args: MergingArguments,
    sweep: Sweep,
    blocks: Sequence[FittedBlock],
    by_form: dict[str, tuple[float | None, ...]],
    form: Form,
    staging: Path,
    transposed: Collection[str] | None,
    written: Sequence[Batch] = (),
) -> tuple[Form, RefinementRecord]:
    """
    Refine a fit, and write what comes of it if that is nearer to the experts than what the fit found.

    Args:
        args: Arguments of the merge.
        sweep: After its last block.
        blocks: What the fit found for every block.
        by_form: Held-out distances by form; those of the refinement's best point are added as `"refined"`.
        form: Form of the fit that was chosen. The refinement keeps it; where the fit gained nothing, it has the form
            that was asked for, or a number for every weight, if that may be written.
        staging: Folder of unfinished files.
        transposed: Where the output is an adapter, the tensors that the model stores as `(n_in, n_out)`; else `None`.
        written: Further prompts, which experts wrote.

    Returns:
        The form to write, and how it was refined.
    """
    from_fit = form != "start"
    refined_form = form if from_fit else _form_without_fit(args, transposed)
    start = read_start(sweep.state)
    if refined_form == "table":
        corrections = coefficients_to_refine(sweep.state, start, blocks, from_fit=from_fit)
    else:
        corrections = corrections_to_refine(
            sweep.state, start, blocks, refined_form, from_fit=from_fit, factors_only=transposed is not None
        )
    rate = args.refine_learning_rate or _LEARNING_RATES[refined_form]
    options = RefineOptions(
        args.refine_steps,
        partial(row_losses, loss=args.refine_loss, beta=args.refine_beta),
        rate,
        args.calibration_batch_size,
        args.seed,
        args.refine_rho,
        is_barycentre=args.refine_teacher == "barycentre",
        lmbda=args.refine_lmbda,
    )
    best = Refinement(sweep, start, corrections, options, written).run(
        staging / PROGRESS_FILE, silent=args.disable_tqdm or None
    )
    best_step = 0
    if best is not None:
        by_form["refined"] = best.distances
        if mean_known(best.distances) < mean_known(by_form[form]):
            best_step = best.step
            _write(best, refined_form, sweep, staging, transposed)
    loss = args.refine_loss if sweep.gives_logits else "angle"
    return refined_form if best_step else form, RefinementRecord(args.refine_steps, loss, rate, form, best_step)


def _form_without_fit(args: MergingArguments, transposed: Collection[str] | None) -> Form:
    """Return the form of a refinement that begins at the merge without data."""
    if args.calibration_form == "table":
        return "table"
    return "dense" if transposed is None and args.calibration_form != "low_rank" else "low_rank"


def _write(best: Best, form: Form, sweep: Sweep, staging: Path, transposed: Collection[str] | None) -> None:
    """Write a table of coefficients, or corrections under the names of tensors, or those of an adapter."""
    if form == "table":
        write_table(sweep.state, {parameter_of(name): values for name, values in best.corrections.items()}, staging)
        return
    tensors = {}
    for name, values in best.corrections.items():
        parameter = parameter_of(name)
        tensors[sweep.state.reader.tensors[parameter] + name.removeprefix(parameter)] = values
    write_tensors(
        staging / CORRECTIONS_FILE, tensors if transposed is None else factors_for_adapter(tensors, transposed)
    )
