"""Callback that detects a collapsing merge, while it runs and when it is evaluated."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from hf_frmerge.errors import ArgumentError
from hf_frmerge.merging.callbacks.callback import MergeCallback, MergeControl
from hf_frmerge.merging.callbacks.state import StepResult
from hf_frmerge.merging.callbacks.thresholds import Trip, parse_threshold

if TYPE_CHECKING:
    from hf_frmerge.merging.arguments.merging_arguments import MergingArguments
    from hf_frmerge.merging.callbacks.state import MergeState

logger = logging.getLogger(__name__)


class CollapseGuardCallback(MergeCallback):
    """
    Stop a merge, or warn, if it collapses: if tensors lose norm, or a metric of an evaluation is out of bounds.

    Values out of bounds are kept in `trips`. With `action="stop"` the callback sets `control.should_merge_stop` and
    `control.stop_reason`; the merger decides what to raise. NaN is out of all bounds.

    Args:
        min_norm_ratio (`float`, *optional*):
            Smallest accepted norm of a merged tensor, as a share of the weighted mean norm of the experts. The plain
            mean of N orthogonal deltas has `1 / sqrt(N)`; norm-preserving methods have 1.
        thresholds (`Iterable[str]`, *optional*):
            Metrics of an evaluation that mean collapse, such as `"effective_rank<0.9"` or `"perplexity>40"`. Names
            may leave out the prefix `eval_` and the name of a dataset.
        action (`str`, *optional*, defaults to `"stop"`):
            `"stop"`, or `"warn"` to log and continue.

    Raises:
        ArgumentError: If there is nothing to watch, or a threshold cannot be parsed.

    Example:

    ```python
    merger.add_callback(CollapseGuardCallback(min_norm_ratio=0.8, thresholds=["perplexity>40"]))
    ```
    """

    def __init__(
        self,
        min_norm_ratio: float | None = None,
        thresholds: Iterable[str] = (),
        action: Literal["stop", "warn"] = "stop",
    ) -> None:
        self.min_norm_ratio = min_norm_ratio
        self.thresholds = [parse_threshold(text) for text in thresholds]
        self.action = action
        self.trips: list[Trip] = []
        self._matched: set[str] = set()  # names of thresholds that matched a metric in this evaluation so far
        if min_norm_ratio is None and not self.thresholds:
            raise ArgumentError("A collapse guard needs `min_norm_ratio`, `thresholds` or both: it watches nothing.")
        if action not in ("stop", "warn"):
            raise ArgumentError(f"`action` of a collapse guard must be 'stop' or 'warn', but got {action!r}.")

    def on_merge_begin(self, args: MergingArguments, state: MergeState, control: MergeControl, **kwargs: Any) -> None:
        """Clear the trips of an earlier merge."""
        self.trips = []

    def on_step_end(
        self, args: MergingArguments, state: MergeState, control: MergeControl, *, result: StepResult, **kwargs: Any
    ) -> None:
        """Check the norm ratio of a merged tensor."""
        # The ratio of an all-zero tensor means nothing.
        if self.min_norm_ratio is None or result.action != "merge" or not any(result.norms):
            return
        if not result.norm_ratio >= self.min_norm_ratio:
            self._trip(
                Trip(result.name, "norm_ratio", result.norm_ratio, f"norm_ratio<{self.min_norm_ratio}"), control
            )

    def on_evaluate(
        self,
        args: MergingArguments,
        state: MergeState,
        control: MergeControl,
        *,
        metrics: dict[str, Any],
        places: Mapping[str, str] | None = None,
        is_last: bool = True,
        **kwargs: Any,
    ) -> None:
        """Check the metrics of an evaluation; with `is_last`, also that every threshold matched a metric."""
        for threshold in self.thresholds:
            if threshold.find(metrics):
                self._matched.add(threshold.name)
            elif is_last and threshold.name not in self._matched:
                # Without a warning, a guard that watches no metric would look like a merge that is fine.
                logger.warning(
                    "The collapse guard watches %r, but the metrics are %s.", threshold.name, ", ".join(metrics)
                )
            for trip in threshold.trips(metrics, places or {}):
                self._trip(trip, control, is_measured=True)
        if is_last:
            self._matched.clear()

    def on_merge_end(self, args: MergingArguments, state: MergeState, control: MergeControl, **kwargs: Any) -> None:
        """With `action="warn"`, log how many tensors were out of bounds."""
        if self.action == "warn" and len(self.trips) > 1:
            worst = min(self.trips, key=lambda trip: -math.inf if math.isnan(trip.value) else trip.value)
            logger.warning("Collapse guard: %d tensors in all; the worst is %s", len(self.trips), worst)

    def _trip(self, trip: Trip, control: MergeControl, *, is_measured: bool = False) -> None:
        self.trips.append(trip)
        if self.action == "stop":
            control.should_merge_stop = True
            control.stop_reason = f"collapse guard: {trip}"
        elif is_measured or len(self.trips) == 1:
            # A collapsing merge has hundreds of such tensors: log the first, and one line for all at the end.
            logger.warning("Collapse guard: %s", trip)
