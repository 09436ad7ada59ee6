"""Observer of a merge that several processes share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_frmerge.merging.engine.outcomes import StepObserver, StepOutcome

if TYPE_CHECKING:
    from hf_frmerge.merging.engine.processes import Processes
    from hf_frmerge.merging.planning.plan import MergePlan
    from hf_frmerge.merging.planning.tensor_step import TensorStep


class SharedObserver(StepObserver):
    """
    Notifies the observer of the main process of every tensor, whichever process merges it.

    `begin` is called for all tensors before the work is distributed, since the observer may skip any of them. `end` is
    called for the main process's tensors while it runs, and for the others' after all processes have finished.

    Attributes:
        go_on: False once the observer has asked to stop.
    """

    def __init__(self, observer: StepObserver, plan: MergePlan, processes: Processes) -> None:
        self.go_on = True
        self._observer = observer
        self._plan = plan
        self._processes = processes
        # With block="model" all processes exchange their Gram matrices: if one stopped, the others would wait for it.
        self._may_stop = plan.args.block != "model"
        announced = plan.steps if processes.is_main else []
        self._skipped = set(processes.gather([step.name for step in announced if not observer.begin(step)]))

    def begin(self, step: TensorStep) -> bool:
        """Return what the main process's observer decided."""
        return step.name not in self._skipped

    def end(self, outcome: StepOutcome) -> bool:
        """Notify the observer, on the main process."""
        if self._processes.is_main:
            self.go_on = self._observer.end(outcome) and self.go_on
        return self.go_on or not self._may_stop

    def all_outcomes(self, finished: list[StepOutcome]) -> list[StepOutcome]:
        """Return the outcomes of all processes in the order of the plan, and notify the observer of the others'."""
        by_name = {outcome.step.name: outcome for outcome in self._processes.gather(finished)}
        already_ended = {outcome.step.name for outcome in finished}
        outcomes = [by_name[step.name] for step in self._plan.steps if step.name in by_name]
        for outcome in outcomes:
            if outcome.step.name not in already_ended:
                self.end(outcome)
        return outcomes
