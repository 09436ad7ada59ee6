"""What a merger has in common with `transformers.Trainer`: state, control, and callbacks that hear of both."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from hf_frmerge.errors import MergeError
from hf_frmerge.merging.callbacks.callback import CallbackHandler, MergeControl
from hf_frmerge.merging.callbacks.defaults import with_default_callbacks
from hf_frmerge.merging.callbacks.state import MergeState
from hf_frmerge.merging.engine.processes import Processes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hf_frmerge.merging.arguments.merging_arguments import MergingArguments
    from hf_frmerge.merging.callbacks.callback import MergeCallback


class CallbackHost:
    """
    Holds the callbacks, the state and the control of a merger, under the names they have in `Trainer`.

    Args:
        args (`MergingArguments`):
            Passed to every event; `log_level`, `report_to` and `disable_tqdm` choose the default callbacks.
        callbacks (`Sequence[MergeCallback | type[MergeCallback]]`):
            Callbacks besides the default ones.
        processing_class (*optional*):
            Passed to every event.

    Raises:
        ArgumentError: If `args.report_to` names an integration that is unknown or not installed.
    """

    def __init__(
        self, args: MergingArguments, callbacks: Sequence[MergeCallback | type[MergeCallback]], processing_class: Any
    ) -> None:
        self.args = args
        if args.log_level != "passive":
            logging.getLogger("hf_frmerge").setLevel(args.get_process_log_level())
        self.processes = Processes()
        is_main = self.processes.is_main
        self.state = MergeState(is_world_process_zero=is_main, is_local_process_zero=is_main)
        self.control = MergeControl()
        # Callbacks listen on the main process only: one merge, one log, whatever the number of processes.
        listeners = with_default_callbacks(callbacks, args)
        self.callback_handler = CallbackHandler(listeners if is_main else (), processing_class=processing_class)
        self._fire("on_init_end")

    def add_callback(self, callback: MergeCallback | type[MergeCallback]) -> None:
        """Add a callback, given as a class or an instance."""
        self.callback_handler.add_callback(callback)

    def pop_callback(self, callback: MergeCallback | type[MergeCallback]) -> MergeCallback | None:
        """Remove a callback and return it."""
        return self.callback_handler.pop_callback(callback)

    def remove_callback(self, callback: MergeCallback | type[MergeCallback]) -> None:
        """Remove a callback."""
        self.callback_handler.remove_callback(callback)

    def is_world_process_zero(self) -> bool:
        """Whether this is the process that writes and logs."""
        return self.processes.is_main

    def log(self, logs: dict[str, Any]) -> None:
        """Add to `state.log_history` and fire `on_log`."""
        self.state.log_history.append({**logs, "step": self.state.global_step})
        self._fire("on_log", logs=logs)

    def _end(self, report: dict[str, Any]) -> None:
        """
        Fire the last events of a merge: `on_save` and `on_merge_end`, or the latter alone if it was stopped.

        Raises:
            MergeError: If a callback stopped the merge, with its reason.
        """
        if report["complete"]:
            self._fire("on_save")
            totals = ("n_merged", "n_copied", "seconds", "bytes_per_second", "n_not_converged", "residual")
            self.log({f"merge_{name}": report[name] for name in totals if name in report})
        # Reporters close their run and bars their line here, so a stopped merge has an end too.
        self._fire("on_merge_end")
        if not report["complete"]:
            reason = self.control.stop_reason or "a callback asked for it"
            raise MergeError(
                f"The merge was stopped after {self.state.global_step} of {self.state.max_steps} tensors: {reason}. "
                f"{self.args.output_dir!r} holds no model; pass resume_from_checkpoint=True to go on."
            )

    def _fire(self, event: str, **details: Any) -> None:
        """Fire an event of `CallbackHandler`; the control that the callbacks return is the one that counts."""
        handle = getattr(self.callback_handler, event)
        self.control = handle(self.args, self.state, self.control, **details)
