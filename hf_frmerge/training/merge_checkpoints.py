"""`MergeCheckpointsCallback`: the mean of the last checkpoints of a training run, kept on disk while it runs."""

from __future__ import annotations

import logging
import re
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy

from hf_frmerge.errors import ArgumentError, MergeError
from hf_frmerge.merging.arguments.merging_arguments import MergingArguments
from hf_frmerge.merging.arguments.named_weights import SHAPES, is_name, parse_name
from hf_frmerge.merging.engine.outcomes import StepObserver
from hf_frmerge.merging.engine.processes import Processes
from hf_frmerge.merging.run import run_merge
from hf_frmerge.methods.table import CHOICES
from hf_frmerge.weighting.plan_merge import plan_merge

logger = logging.getLogger(__name__)

_CHECKPOINT = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")


class MergeCheckpointsCallback(TrainerCallback):
    """
    Merge the last checkpoints of a training run whenever one is saved.

    The merged model is a full record like any other merge: `frmerge verify` checks it as long as its checkpoints are
    there. It is read from the checkpoints on disk and takes the memory of a few pieces of tensors, not of a model;
    what it costs is to read the checkpoints and to write one model. The main process merges. With adapters the
    checkpoints and the merge are adapters. If a merge fails, a warning says why, and the training goes on.

    Args:
        last (`int`, *optional*, defaults to 5):
            How many checkpoints are merged; as many as there are, until there are so many. One alone is not.
        weights (`str`, *optional*, defaults to `"uniform"`):
            Their weights by step: `"uniform"`, `"linear"`, `"1-sqrt"` or `"ema:0.9"`, as for `frmerge merge`.
        args (`MergingArguments`, *optional*):
            Options of the merge. By default the Karcher mean of whole tensors, in the folder `merged` inside that of
            the run. The folder is overwritten by every merge.

    Raises:
        ArgumentError: If `last` is below 2, `weights` is no such name, or the merge needs a base model or prompts.
    """

    def __init__(self, last: int = 5, weights: str = "uniform", args: MergingArguments | None = None) -> None:
        if last < 2:
            raise ArgumentError(
                f"`last` must be at least 2, the number of checkpoints that are merged, but got {last}."
            )
        if not is_name(weights) or parse_name(weights).name not in SHAPES:
            raise ArgumentError(
                f"`weights` of checkpoints that come and go are 'uniform', 'linear', '1-sqrt' or 'ema:DECAY'; got "
                f"{weights!r}."
            )
        if args is not None and CHOICES[args.method].needs_deltas:
            raise ArgumentError(
                f"method={args.method!r} is made of differences to a base model, which checkpoints of one run do not "
                "have. Choose 'karcher', 'linear' or another method that takes the models as they are."
            )
        if args is not None and (CHOICES[args.method].needs_prompts or args.fisher or args.refine_steps):
            option = f"method={args.method!r}" if CHOICES[args.method].needs_prompts else "fisher or refine_steps"
            raise ArgumentError(
                f"{option} asks what models do on prompts, which a merge during training does not. Leave it out here, "
                "and merge the checkpoints afterwards, with `frmerge merge --calibration`."
            )
        self.last, self.weights, self.args = last, weights, args

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check that checkpoints are saved, and that enough of them are kept."""
        if args.save_strategy == SaveStrategy.NO:
            raise ArgumentError(
                "MergeCheckpointsCallback merges checkpoints, but save_strategy is 'no'. Set it to 'steps' or 'epoch'."
            )
        # The best checkpoint takes one of the places.
        needed = self.last + (1 if args.load_best_model_at_end else 0)
        if args.save_total_limit is not None and args.save_total_limit < needed:
            raise ArgumentError(
                f"MergeCheckpointsCallback(last={self.last}) needs {needed} checkpoints on disk, but "
                f"save_total_limit={args.save_total_limit} deletes them. Set save_total_limit={needed} or more, or a "
                "smaller `last`."
            )

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Merge the last checkpoints, on the main process."""
        if not state.is_world_process_zero:
            return
        assert args.output_dir is not None  # Trainer saved a checkpoint there
        checkpoints = _checkpoints(Path(args.output_dir), state.global_step)[-self.last :]
        if len(checkpoints) < 2:
            return
        options = self.args or MergingArguments(output_dir=str(Path(args.output_dir) / "merged"))
        options = replace(options, overwrite=True)
        try:
            with closing(plan_merge(checkpoints, options, self.weights)) as plan:
                run_merge(plan, StepObserver(), Processes(alone=True))
        except MergeError as error:
            logger.warning(
                "The last %d checkpoints were not merged at step %d, and the training goes on: %s",
                len(checkpoints),
                state.global_step,
                error,
            )


def _checkpoints(run: Path, step: int) -> list[str]:
    """Return the checkpoints of a run in the order of their steps; later ones than `step` are of an earlier run."""
    found = {int(match[1]): str(path) for path in run.iterdir() if (match := _CHECKPOINT.fullmatch(path.name))}
    return [found[number] for number in sorted(found) if number <= step]
