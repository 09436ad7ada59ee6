"""Observer that turns outcomes of the engine into events of callbacks."""

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
    Fires `on_step_begin` and `on_step_end`, updates the state, and follows the control.

    Several tensors are processed at the same time, so a tensor may begin before earlier ones have ended. Each of the
    two events is fired in the order of the plan.

    Args:
        handler: Handler of the callbacks.
        args, state, control: Arguments of the events.
        log: Called with a dictionary to log, when a callback asks for it.
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
        """Fire `on_step_begin`; return whether to merge the tensor."""
        self._state.current_tensor = step.name
        self.control = self._handler.on_step_begin(self._args, self._state, self.control)
        return not self.control.should_skip_tensor

    def end(self, outcome: StepOutcome) -> bool:
        """Update the state and fire `on_step_end`; return whether to continue."""
        result = step_result(outcome)
        self._state.record(result)
        self.control = self._handler.on_step_end(self._args, self._state, self.control, result)
        if self.control.should_log:
            self._log({"norm_ratio": result.norm_ratio, "max_angle": result.max_angle, "n_iter": result.n_iter})
        return not self.control.should_merge_stop


def step_result(outcome: StepOutcome) -> StepResult:
    """Return the outcome of a tensor in the form that callbacks get."""
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
