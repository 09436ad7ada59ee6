"""What the observer of the main process is told when several processes share a merge."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_frmerge.merging.engine.outcomes import StepObserver, StepOutcome

if TYPE_CHECKING:
    from hf_frmerge.merging.engine.processes import Processes
    from hf_frmerge.merging.planning.plan import MergePlan
    from hf_frmerge.merging.planning.tensor_step import TensorStep


class SharedObserver(StepObserver):
    """
    Lets the observer of the main process hear of every tensor, whichever process merges it.

    All tensors begin before the work is shared out, since any may be skipped. Those of the main process end while it
    runs, the others' when all have finished.

    Attributes:
        go_on: whether the observer never asked to stop.
    """

    def __init__(self, observer: StepObserver, plan: MergePlan, processes: Processes) -> None:
        self.go_on = True
        self._observer = observer
        self._plan = plan
        self._processes = processes
        # All processes need each other for the one sphere of the model: none may leave before the end.
        self._may_stop = plan.args.block != "model"
        announced = plan.steps if processes.is_main else []
        self._skipped = set(processes.gather([step.name for step in announced if not observer.begin(step)]))

    def begin(self, step: TensorStep) -> bool:
        """Return what the main process decided."""
        return step.name not in self._skipped

    def end(self, outcome: StepOutcome) -> bool:
        """Tell the observer of the main process."""
        if self._processes.is_main:
            self.go_on = self._observer.end(outcome) and self.go_on
        return self.go_on or not self._may_stop

    def all_outcomes(self, own: list[StepOutcome]) -> list[StepOutcome]:
        """Return the outcomes of all processes in the order of the plan; the observer is told of the others'."""
        found = {outcome.step.name: outcome for outcome in self._processes.gather(own)}
        told = {outcome.step.name for outcome in own}
        outcomes = [found[step.name] for step in self._plan.steps if step.name in found]
        for outcome in outcomes:
            if outcome.step.name not in told:
                self.end(outcome)
        return outcomes
