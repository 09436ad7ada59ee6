"""Bridge to the reporting integrations of transformers: TensorBoard, W&B, Trackio, MLflow and the others."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from hf_frmerge.errors import ArgumentError
from hf_frmerge.merging.arguments.values import did_you_mean
from hf_frmerge.merging.callbacks.callback import MergeCallback, MergeControl
from hf_frmerge.merging.callbacks.state import StepResult

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from hf_frmerge.merging.arguments.merging_arguments import MergingArguments
    from hf_frmerge.merging.callbacks.state import MergeState


class ReporterBridge(MergeCallback):
    """
    Forward the events of a merge to a reporting callback of transformers.

    Merge begin and end are forwarded as train begin and end, other events under the same name. The reporter reads
    `MergeState` as it would read a `TrainerState`, and a copy of the arguments with tokens masked. Its return values
    are ignored: a reporter does not steer a merge. Only logs are sent, so environment variables that make a reporter
    upload checkpoints (such as `WANDB_LOG_MODEL`) have no effect.

    Args:
        reporter (`transformers.TrainerCallback`):
            Reporting callback, such as `transformers.integrations.TensorBoardCallback()`.
    """

    def __init__(self, reporter: TrainerCallback) -> None:
        self.reporter: Any = reporter

    @property
    def name(self) -> str:
        """Name of the reporting callback, so that bridges to different ones are not taken for duplicates."""
        return type(self.reporter).__name__

    def on_init_end(self, args: MergingArguments, state: MergeState, control: MergeControl, **kwargs: Any) -> None:
        """Forward."""
        self.reporter.on_init_end(_trainer_args(args), state, control, **kwargs)

    def on_merge_begin(self, args: MergingArguments, state: MergeState, control: MergeControl, **kwargs: Any) -> None:
        """Forward as the begin of a training, where reporters open their run."""
        self.reporter.on_train_begin(_trainer_args(args), state, control, **kwargs)

    def on_step_end(
        self, args: MergingArguments, state: MergeState, control: MergeControl, *, result: StepResult, **kwargs: Any
    ) -> None:
        """Forward without `result`, which reporters do not take."""
        self.reporter.on_step_end(_trainer_args(args), state, control, **kwargs)

    def on_log(
        self, args: MergingArguments, state: MergeState, control: MergeControl, *, logs: dict[str, Any], **kwargs: Any
    ) -> None:
        """Forward. Reporters reopen their run for evaluations after the merge has ended."""
        self.reporter.on_log(_trainer_args(args), state, control, logs=logs, **kwargs)

    def on_save(self, args: MergingArguments, state: MergeState, control: MergeControl, **kwargs: Any) -> None:
        """Forward."""
        self.reporter.on_save(_trainer_args(args), state, control, **kwargs)

    def on_merge_end(self, args: MergingArguments, state: MergeState, control: MergeControl, **kwargs: Any) -> None:
        """Forward as the end of a training, where reporters close their run."""
        self.reporter.on_train_end(_trainer_args(args), state, control, **kwargs)

    def on_evaluate(
        self,
        args: MergingArguments,
        state: MergeState,
        control: MergeControl,
        *,
        metrics: dict[str, Any],
        **kwargs: Any,
    ) -> None:
        """Forward."""
        self.reporter.on_evaluate(_trainer_args(args), state, control, metrics=metrics, **kwargs)


def reporting_callbacks(report_to: str) -> list[ReporterBridge]:
    """
    Create bridges to the integrations named in `MergingArguments.report_to`.

    Args:
        report_to (`str`):
            Comma-separated names; `"none"` for no integration, `"all"` for every one that is installed.

    Raises:
        ArgumentError: If a name is unknown, or the library of an integration is not installed.
    """
    names = [name.strip() for name in report_to.split(",")]
    if names == ["none"]:
        return []
    # Imported here because it takes seconds (the integrations import torch), and most merges do not report.
    from transformers.integrations import get_available_reporting_integrations
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    if names == ["all"]:
        names = get_available_reporting_integrations()
    bridges = []
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            raise ArgumentError(
                f"unknown report_to {name!r}: expected none, all, or some of {', '.join(INTEGRATION_TO_CALLBACK)}."
                + did_you_mean(name, INTEGRATION_TO_CALLBACK)
            )
        try:
            bridges.append(ReporterBridge(INTEGRATION_TO_CALLBACK[name]()))
        except (ImportError, RuntimeError) as error:  # the message of the integration says what to install
            raise ArgumentError(f"`report_to={name}` cannot be used here: {error}") from error
    return bridges


def _trainer_args(args: MergingArguments) -> SimpleNamespace:
    """Return the options that reporters read; options that only a training has get neutral values."""
    return SimpleNamespace(
        **args.to_dict(),
        to_dict=args.to_dict,
        to_json_string=args.to_json_string,
        to_sanitized_dict=args.to_sanitized_dict,
        load_best_model_at_end=False,
        save_total_limit=None,
        project="huggingface",  # the Trainer's default, under which trackio stores runs
        trackio_space_id=None,
        trackio_bucket_id=None,
        trackio_static_space_id=False,  # no Space is created without being asked for
    )
