"""Turns what the engine does into the events callbacks listen to."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hf_frmerge.merging.callbacks.callback import CallbackHandler, MergeControl
from hf_frmerge.merging.callbacks.state import StepResult
from hf_frmerge.merging.engine.outcomes import StepObserver, StepOutcome

if TYPE_CHECKING:
    from hf_frmerge.merging.arguments.merging_arguments import MergingArguments
    from hf_frmerge.merging.callbacks.state import MergeState
    from hf_frmerge.merging.planning.tensor_step import TensorStep


class CallbackObserver(StepObserver):
    """
    Fires `on_step_begin` and `on_step_end`, keeps the state, and obeys the control.

    Several tensors are under way at once, so some begin before earlier ones have ended; both events come in the order
    of the plan.

    Args:
        handler: Whom to tell.
        args, state, control: What events are told.
        log: Called with what is to be logged, when a callback asks for it.
    """

    def __init__(
        self,
        handler: CallbackHandler,
        args: MergingArguments,
        state: MergeState,
        control: MergeControl,
        log: Callable[[dict[str, Any]], None],
    ) -> None:
        self.control = control
        self._handler = handler
        self._args = args
        self._state = state
        self._log = log

    def begin(self, step: TensorStep) -> bool:
        """Announce a tensor."""
        self._state.current_tensor = step.name
        self.control = self._handler.on_step_begin(self._args, self._state, self.control)
        return not self.control.should_skip_tensor

    def end(self, outcome: StepOutcome) -> bool:
        """Report a tensor."""
        result = step_result(outcome)
        self._state.record(result)
        self.control = self._handler.on_step_end(self._args, self._state, self.control, result)
        if self.control.should_log:
            self._log({"norm_ratio": result.norm_ratio, "max_angle": result.max_angle, "n_iter": result.n_iter})
        return not self.control.should_merge_stop


def step_result(outcome: StepOutcome) -> StepResult:
    """Return what callbacks are told about a tensor."""
    step, geometry = outcome.step, outcome.geometry
    if geometry is None:
        return StepResult(step.name, outcome.action, step.nbytes, (), 1.0, 0.0, 0, 0.0, True, 0)
    return StepResult(
        name=step.name,
        action="merge",
        nbytes=step.nbytes,
        norms=geometry.norms,
        norm_ratio=geometry.norm_ratio,
        max_angle=geometry.max_angle,
        n_iter=geometry.n_iter,
        residual=geometry.residual,
        converged=geometry.converged,
        ambiguous=geometry.n_ambiguous,
        n_blocks=step.n_blocks,
    )
