"""Progress bars of a merge and its evaluations."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Sized
from functools import cache
from typing import TYPE_CHECKING, Any

from hf_frmerge.merging.callbacks.callback import MergeCallback, MergeControl, readable_logs
from hf_frmerge.merging.callbacks.state import StepResult

if TYPE_CHECKING:
    from tqdm import tqdm

    from hf_frmerge.merging.arguments.merging_arguments import MergingArguments
    from hf_frmerge.merging.callbacks.state import MergeState


@cache
def _bar() -> type[tqdm[Any]]:
    """Return the bar for a notebook or a terminal. `tqdm.auto` does the same, but imports asyncio as well."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # in notebooks tqdm warns that this module is experimental
        from tqdm.autonotebook import tqdm

    class ThreadBar(tqdm):  # type: ignore[type-arg]
        """Bar of one process. The lock of tqdm's own is between processes, too, and imports multiprocessing."""

        _lock = threading.RLock()

    return ThreadBar


class ProgressCallback(MergeCallback):
    """
    Show a progress bar (bytes, blocks, speed, time left), and write the logs above it.

    Args:
        max_str_len (`int`, *optional*, defaults to `100`):
            Longer texts in the logs are cut.
    """

    def __init__(self, max_str_len: int = 100) -> None:
        self.max_str_len = max_str_len
        self._merge_bar: tqdm[Any] | None = None
        self._prediction_bar: tqdm[Any] | None = None
        self._blocks = 0

    def on_merge_begin(self, args: MergingArguments, state: MergeState, control: MergeControl, **kwargs: Any) -> None:
        """Count blocks from 0."""
        self._blocks = 0

    def on_step_begin(self, args: MergingArguments, state: MergeState, control: MergeControl, **kwargs: Any) -> None:
        """Open the bar with the first tensor: what a calibration took before it says nothing about the time left."""
        if state.is_world_process_zero and self._merge_bar is None:
            self._merge_bar = _bar()(
                desc="Merging",
                total=state.bytes_total,
                initial=state.bytes_done,
                unit="B",
                unit_scale=True,
                dynamic_ncols=True,
            )

    def on_step_end(
        self, args: MergingArguments, state: MergeState, control: MergeControl, *, result: StepResult, **kwargs: Any
    ) -> None:
        """Advance the bar by the bytes of the tensor."""
        self._blocks += result.n_blocks
        if self._merge_bar is not None:
            self._merge_bar.set_postfix_str(
                f"{self._blocks} blocks, {state.global_step}/{state.max_steps} tensors", refresh=False
            )
            self._merge_bar.update(state.bytes_done - self._merge_bar.n)

    def on_merge_end(self, args: MergingArguments, state: MergeState, control: MergeControl, **kwargs: Any) -> None:
        """Close the bar."""
        if self._merge_bar is not None:
            self._merge_bar.close()
            self._merge_bar = None

    def on_prediction_step(
        self,
        args: MergingArguments,
        state: MergeState,
        control: MergeControl,
        *,
        eval_dataloader: object = None,
        **kwargs: Any,
    ) -> None:
        """Advance the bar of the evaluation, if its length is known."""
        if not state.is_world_process_zero or not isinstance(eval_dataloader, Sized):
            return
        if self._prediction_bar is None:
            self._prediction_bar = _bar()(
                desc="Evaluating", total=len(eval_dataloader), leave=self._merge_bar is None, dynamic_ncols=True
            )
        self._prediction_bar.update(1)

    def on_evaluate(
        self,
        args: MergingArguments,
        state: MergeState,
        control: MergeControl,
        *,
        metrics: dict[str, Any],
        **kwargs: Any,
    ) -> None:
        """Close the bar of the evaluation."""
        if self._prediction_bar is not None:
            self._prediction_bar.close()
            self._prediction_bar = None

    def on_log(
        self, args: MergingArguments, state: MergeState, control: MergeControl, *, logs: dict[str, Any], **kwargs: Any
    ) -> None:
        """Write the logs above the bars."""
        if state.is_world_process_zero:
            _bar().write(str(readable_logs(logs, self.max_str_len)))
