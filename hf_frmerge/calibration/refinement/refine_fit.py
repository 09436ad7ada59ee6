"""Refine what a fit found, and write it if it is nearer to the experts."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from hf_frmerge.calibration.block_files import factors_for_adapter
from hf_frmerge.calibration.refinement.corrected_merge import corrections_to_refine, parameter_of, read_start
from hf_frmerge.calibration.refinement.progress_file import write_tensors
from hf_frmerge.calibration.refinement.refine import Refinement, RefineOptions
from hf_frmerge.calibration.sweep import FittedBlock, Sweep
from hf_frmerge.merging.planning.corrections import CORRECTIONS_FILE, Form, RefinementRecord, mean_known

if TYPE_CHECKING:
    from hf_frmerge.merging.arguments.merging_arguments import MergingArguments

PROGRESS_FILE = "refinement.safetensors"

_LEARNING_RATES: dict[Form, float] = {"dense": 3e-5, "low_rank": 3e-4}


def refine_fit(
    args: MergingArguments,
    sweep: Sweep,
    blocks: Sequence[FittedBlock],
    by_form: dict[str, tuple[float | None, ...]],
    form: Form,
    staging: Path,
    transposed: Collection[str] | None,
) -> tuple[Form, RefinementRecord]:
    """
    Refine a fit, and write the corrections if they are nearer to the experts than what the fit found.

    Args:
        args: Arguments of the merge.
        sweep: After its last block.
        blocks: What the fit found for every block.
        by_form: Held-out distances by form; those of the refinement's best point are added as `"refined"`.
        form: Form of the fit that was chosen. The refinement keeps it; where the fit gained nothing, it has a number
            for every weight, if that may be written.
        staging: Folder of unfinished files.
        transposed: Where the output is an adapter, the tensors that the model stores as `(n_in, n_out)`; else `None`.

    Returns:
        The form to write, and how it was refined.
    """
    may_be_dense = transposed is None and args.calibration_form != "low_rank"
    refined_form: Form = form if form != "start" else "dense" if may_be_dense else "low_rank"
    start = read_start(sweep.state)
    corrections = corrections_to_refine(
        sweep.state, start, blocks, refined_form, from_fit=form != "start", factors_only=transposed is not None
    )
    rate = args.refine_learning_rate or _LEARNING_RATES[refined_form]
    options = RefineOptions(args.refine_steps, args.refine_loss, rate, args.calibration_batch_size, args.seed)
    best = Refinement(sweep, start, corrections, options).run(
        staging / PROGRESS_FILE, silent=args.disable_tqdm or None
    )
    best_step = 0
    if best is not None:
        by_form["refined"] = best.distances
        if mean_known(best.distances) < mean_known(by_form[form]):
            best_step = best.step
            _write(best.corrections, sweep.state.reader.tensors, staging / CORRECTIONS_FILE, transposed)
    loss = args.refine_loss if sweep.gives_logits else "angle"
    return refined_form if best_step else form, RefinementRecord(args.refine_steps, loss, rate, form, best_step)


def _write(
    corrections: dict[str, Tensor], tensor_of: dict[str, str], path: Path, transposed: Collection[str] | None
) -> None:
    """Write corrections under the names of tensors, or those of an adapter."""
    tensors = {}
    for name, values in corrections.items():
        parameter = parameter_of(name)
        tensors[tensor_of[parameter] + name.removeprefix(parameter)] = values
    write_tensors(path, tensors if transposed is None else factors_for_adapter(tensors, transposed))
