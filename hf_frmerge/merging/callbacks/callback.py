"""
Events of a merge, the callbacks that listen to them, and the flags that callbacks may set.

The events fire in this order:

    init_end
    merge_begin
    step_begin, step_end, [log]            once per tensor; log every `logging_steps` tensors, or if a callback asks
    save, log                              the output is complete; summary of the merge
    merge_end
    prediction_step ..., log, evaluate     once per evaluation
    push_begin                             before an upload
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hf_frmerge.errors import ArgumentError

if TYPE_CHECKING:
    from hf_frmerge.merging.arguments.merging_arguments import MergingArguments
    from hf_frmerge.merging.callbacks.state import MergeState, StepResult

logger = logging.getLogger(__name__)


@dataclass
class MergeControl:
    """
    Flags by which callbacks steer a merge. Callbacks set them, the handler resets them.

    Args:
        should_merge_stop (`bool`):
            Stop after this tensor. Stays set until the next merge begins.
        should_skip_tensor (`bool`):
            Set at `on_step_begin`: do not merge this tensor but copy it from the base model (the first expert when
            there is none). Reset for every tensor.
        should_log (`bool`):
            Log after this tensor. Reset for every tensor, and after logging.
        should_evaluate (`bool`):
            Evaluate the merged model. Reset for every tensor, and after the evaluation.
        stop_reason (`str`):
            Why a callback asked to stop, for the message to the user.
    """

    should_merge_stop: bool = False
    should_skip_tensor: bool = False
    should_log: bool = False
    should_evaluate: bool = False
    stop_reason: str = ""


class MergeCallback:
    """
    Base class of callbacks: override the events of interest.

    Every event gets `args` ([`MergingArguments`]), `state` ([`MergeState`]) and `control` ([`MergeControl`]) by
    position; and by keyword `model` (`None` until it is loaded), `processing_class` and arguments of that event. An
    event may change `control` in place or return another one; `None` keeps it. Later versions may pass further
    keywords, so take `**kwargs`.

    Example:

    ```python
    class SkipHead(MergeCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            control.should_skip_tensor = state.current_tensor == "lm_head.weight"
    ```
    """

    @property
    def name(self) -> str:
        """Name in messages. Adding two callbacks of one name is probably a mistake, and logs a warning."""
        return type(self).__name__

    def on_init_end(
        self, args: MergingArguments, state: MergeState, control: MergeControl, **kwargs: Any
    ) -> MergeControl | None:
        """Called at the end of the initialisation of the merger."""

    def on_merge_begin(
        self, args: MergingArguments, state: MergeState, control: MergeControl, **kwargs: Any
    ) -> MergeControl | None:
        """Called when the plan is made and before the first tensor; `state` has the totals."""

    def on_step_begin(
        self, args: MergingArguments, state: MergeState, control: MergeControl, **kwargs: Any
    ) -> MergeControl | None:
        """Called before the tensor `state.current_tensor`; may set `control.should_skip_tensor`."""

    def on_step_end(
        self, args: MergingArguments, state: MergeState, control: MergeControl, *, result: StepResult, **kwargs: Any
    ) -> MergeControl | None:
        """Called after a tensor, with its `result`."""

    def on_log(
        self, args: MergingArguments, state: MergeState, control: MergeControl, *, logs: dict[str, Any], **kwargs: Any
    ) -> MergeControl | None:
        """Called after something was logged, with a copy of the `logs`."""

    def on_save(
        self, args: MergingArguments, state: MergeState, control: MergeControl, **kwargs: Any
    ) -> MergeControl | None:
        """Called when the output is complete in `args.output_dir`."""

    def on_merge_end(
        self, args: MergingArguments, state: MergeState, control: MergeControl, **kwargs: Any
    ) -> MergeControl | None:
        """Called at the end of the merge."""

    def on_prediction_step(
        self, args: MergingArguments, state: MergeState, control: MergeControl, **kwargs: Any
    ) -> MergeControl | None:
        """Called after a batch of an evaluation, with its `eval_dataloader`."""

    def on_evaluate(
        self,
        args: MergingArguments,
        state: MergeState,
        control: MergeControl,
        *,
        metrics: dict[str, Any],
        **kwargs: Any,
    ) -> MergeControl | None:
        """
        Called after an evaluation, with a copy of its `metrics`.

        With several datasets it is called for each of them and then, with `is_last=True`, for the metrics over all of
        them. `places` names the layer, dataset or expert that a metric's value comes from.
        """

    def on_push_begin(
        self, args: MergingArguments, state: MergeState, control: MergeControl, **kwargs: Any
    ) -> MergeControl | None:
        """Called before an upload to the Hub."""


class CallbackHandler:
    """
    Calls callbacks in the order they were added, and resets the flags of the control as the merge goes on.

    Args:
        callbacks (`Iterable[MergeCallback | type[MergeCallback]]`):
            Instances, or classes that need no arguments.
        model (`Any`, *optional*):
            Passed to every event; may be set later.
        processing_class (`Any`, *optional*):
            Passed to every event; may be set later.
    """

    def __init__(
        self,
        callbacks: Iterable[MergeCallback | type[MergeCallback]],
        model: Any = None,
        processing_class: Any = None,
    ) -> None:
        self.callbacks: list[MergeCallback] = []
        for callback in callbacks:
            self.add_callback(callback)
        self.model = model
        self.processing_class = processing_class

    def add_callback(self, callback: MergeCallback | type[MergeCallback]) -> None:
        """Add a callback, or an instance of a callback class, at the end."""
        added = callback() if isinstance(callback, type) else callback
        if not isinstance(added, MergeCallback):
            raise ArgumentError(
                f"A callback must be a MergeCallback or a class of them, but got {added!r}. To use a reporting "
                "callback of transformers, wrap it: `ReporterBridge(callback)`."
            )
        names = [present.name for present in self.callbacks]
        if added.name in names:
            logger.warning(
                "A %s is among the callbacks already (%s); both will be called.", added.name, ", ".join(names)
            )
        self.callbacks.append(added)

    def pop_callback(self, callback: MergeCallback | type[MergeCallback]) -> MergeCallback | None:
        """Remove and return this callback, or the first one of this class; `None` if there is none."""
        for present in self.callbacks:
            if present is callback or (isinstance(callback, type) and isinstance(present, callback)):
                self.callbacks.remove(present)
                return present
        return None

    def remove_callback(self, callback: MergeCallback | type[MergeCallback]) -> None:
        """Remove this callback, or the first one of this class, if it is there."""
        self.pop_callback(callback)

    def on_init_end(self, args: MergingArguments, state: MergeState, control: MergeControl) -> MergeControl:
        """Fire `on_init_end`."""
        return self.call_event("on_init_end", args, state, control)

    def on_merge_begin(self, args: MergingArguments, state: MergeState, control: MergeControl) -> MergeControl:
        """Reset the stop of an earlier merge, then fire `on_merge_begin`."""
        control.should_merge_stop = False
        control.stop_reason = ""
        return self.call_event("on_merge_begin", args, state, control)

    def on_step_begin(self, args: MergingArguments, state: MergeState, control: MergeControl) -> MergeControl:
        """Reset all flags but the stop, then fire `on_step_begin`."""
        control.should_skip_tensor = False
        control.should_log = False
        control.should_evaluate = False
        return self.call_event("on_step_begin", args, state, control)

    def on_step_end(
        self, args: MergingArguments, state: MergeState, control: MergeControl, result: StepResult
    ) -> MergeControl:
        """Fire `on_step_end`."""
        return self.call_event("on_step_end", args, state, control, result=result)

    def on_log(
        self, args: MergingArguments, state: MergeState, control: MergeControl, logs: dict[str, Any]
    ) -> MergeControl:
        """Reset `should_log`, then fire `on_log`."""
        control.should_log = False
        return self.call_event("on_log", args, state, control, logs=logs)

    def on_save(self, args: MergingArguments, state: MergeState, control: MergeControl) -> MergeControl:
        """Fire `on_save`: the merged model is in its folder."""
        return self.call_event("on_save", args, state, control)

    def on_merge_end(self, args: MergingArguments, state: MergeState, control: MergeControl) -> MergeControl:
        """Fire `on_merge_end`."""
        return self.call_event("on_merge_end", args, state, control)

    def on_prediction_step(
        self, args: MergingArguments, state: MergeState, control: MergeControl, eval_dataloader: Any = None
    ) -> MergeControl:
        """Fire `on_prediction_step`."""
        return self.call_event("on_prediction_step", args, state, control, eval_dataloader=eval_dataloader)

    def on_evaluate(
        self, args: MergingArguments, state: MergeState, control: MergeControl, metrics: dict[str, Any], **details: Any
    ) -> MergeControl:
        """Reset `should_evaluate`, then fire `on_evaluate`."""
        control.should_evaluate = False
        return self.call_event("on_evaluate", args, state, control, metrics=metrics, **details)

    def on_push_begin(self, args: MergingArguments, state: MergeState, control: MergeControl) -> MergeControl:
        """Fire `on_push_begin`."""
        return self.call_event("on_push_begin", args, state, control)

    def call_event(
        self, event: str, args: MergingArguments, state: MergeState, control: MergeControl, **kwargs: Any
    ) -> MergeControl:
        """
        Call one event of all callbacks, in order, and return the resulting control.

        Dictionaries among `kwargs` are copied for each callback: reporting callbacks modify the logs they get, which
        must change neither the log history nor what the next callback sees.
        """
        for callback in self.callbacks:
            copied = {name: dict(value) if isinstance(value, dict) else value for name, value in kwargs.items()}
            # `getattr` is safe here: `event` is always the name of a method of `MergeCallback`.
            answer = getattr(callback, event)(
                args, state, control, model=self.model, processing_class=self.processing_class, **copied
            )
            if answer is not None:
                control = answer
        return control


class DefaultFlowCallback(MergeCallback):
    """
    Set the flags for logging every `logging_steps` tensors, and for evaluating after the last one if `do_eval`.

    With `logging_first_step` the first tensor is logged, too.
    """

    def on_step_end(
        self, args: MergingArguments, state: MergeState, control: MergeControl, *, result: StepResult, **kwargs: Any
    ) -> MergeControl:
        """Set `should_log` and `should_evaluate` if they are due after this tensor."""
        if state.global_step % args.logging_steps == 0 or (state.global_step == 1 and args.logging_first_step):
            control.should_log = True
        if state.global_step >= state.max_steps:
            control.should_evaluate = control.should_evaluate or args.do_eval
        return control


class PrinterCallback(MergeCallback):
    """Print the logs on the main process of each machine; used if there are no progress bars."""

    def on_log(
        self, args: MergingArguments, state: MergeState, control: MergeControl, *, logs: dict[str, Any], **kwargs: Any
    ) -> None:
        """Print one line."""
        if state.is_local_process_zero:
            print(readable_logs(logs), flush=True)  # noqa: T201 - printing is what this callback is for


def readable_logs(logs: dict[str, Any], max_str_len: int | None = None) -> dict[str, Any]:
    """Format logs for one line: numbers with four digits, texts cut at `max_str_len`."""
    shown: dict[str, Any] = {}
    for name, value in logs.items():
        if isinstance(value, float):
            shown[name] = f"{value:.4g}"
        elif isinstance(value, str) and max_str_len is not None and len(value) > max_str_len:
            shown[name] = f"{value[:max_str_len]}… ({len(value)} characters)"
        else:
            shown[name] = value
    return shown
