"""The merges of a comparison: those it makes, planned before any is measured, and those that are there already."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from hf_frmerge.checkpoints.resolve import resolve_all
from hf_frmerge.checkpoints.source import refuse_gguf
from hf_frmerge.comparison.candidates import Candidate, Cell, arguments_of, cells_of, default_candidates
from hf_frmerge.errors import ArgumentError
from hf_frmerge.evaluation.models.identity import model_identity
from hf_frmerge.evaluation.models.merged import architecture_of
from hf_frmerge.evaluation.models.names import models_of_merge
from hf_frmerge.hub.card.licences import licences_of_plan
from hf_frmerge.methods.table import METHODS
from hf_frmerge.weighting.plan_merge import plan_merge

if TYPE_CHECKING:
    from hf_frmerge.comparison.fitter import Fitter
    from hf_frmerge.merging.arguments.merging_arguments import MergingArguments
    from hf_frmerge.merging.planning.plan import MergePlan


@dataclass(frozen=True)
class CellPlanner:
    """
    Plans merges of the same experts.

    Attributes:
        experts: local folders or Hub ids.
        base_model: what they were fine-tuned from; `None` if there is none.
        args: what all merges share; the method is that of a fit.
        notes: sentences for the record; what was left out or measured is added.
    """

    experts: Sequence[str]
    base_model: str | None
    args: MergingArguments
    notes: list[str]

    def plan(self, cell: Cell) -> MergePlan:
        """Return the plan of one merge, which the caller closes. Raises `MergeError` if it cannot be made."""
        args = replace(self.args, **arguments_of(cell))
        if not cell.is_refined:
            args = replace(args, refine_steps=0)
        return plan_merge(
            self.experts,
            args,
            cell.weights,
            self.base_model,
            check=_check_licences,
            has_prompts=cell.fit is not None,
        )

    def cells(
        self,
        methods: Sequence[Candidate] | None,
        scales: Sequence[float],
        weights: Sequence[Sequence[float] | str | None],
        fitter: Fitter | None,
    ) -> list[list[Cell]]:
        """
        Return the cells of every method, after planning one of each: what cannot be merged fails now.

        Args:
            methods: What was asked for; by default about ten that can run on these experts.
            scales: Factors of the merged delta that every method is tried with.
            weights: Weights of the experts that every method is tried with, or their names.
            fitter: Of the merges that prompts decide; `None` without prompts.

        Raises:
            MergeError: If a method that was asked for cannot merge these experts, or none can.
        """
        has_base = self.base_model is not None
        numbers = [self._numbers(one) for one in weights]
        chosen = methods or default_candidates(len(self.experts), has_base=has_base)
        without_data = [candidate for candidate in chosen if not METHODS[candidate.method].needs_prompts]
        cells = []
        for candidate in without_data:
            own = cells_of(candidate, scales, numbers, has_base=has_base)
            try:
                self.plan(own[0]).close()
            except ArgumentError as error:
                if methods or candidate is without_data[0]:  # asked for, or wrong for all methods
                    raise
                self.notes.append(f"{candidate.label} was left out: {error}")
            else:
                cells.append(own)
        if fitter is None:
            return cells
        # The first to be run: what only a fit can find should not come after all others.
        return [*([cell] for cell in self._fitted(chosen, numbers[0], fitter)), *cells]

    def _fitted(self, chosen: Sequence[Candidate], weights: tuple[float, ...] | None, fitter: Fitter) -> list[Cell]:
        """Return the merges that prompts decide: that by `args.method`, fitted, and the methods that need prompts."""
        methods = [Candidate(self.args.method), *(one for one in chosen if METHODS[one.method].needs_prompts)]
        scale = 1.0 if self.base_model is not None else None
        cells = [Cell(candidate, scale, weights, fitter.digest) for candidate in dict.fromkeys(methods)]
        for cell in cells:
            with closing(self.plan(cell)) as plan:
                fitter.check(plan)
        return cells

    def _numbers(self, weights: Sequence[float] | str | None) -> tuple[float, ...] | None:
        """Return weights as numbers; what a name stands for is measured now."""
        if not isinstance(weights, str):
            return None if weights is None else tuple(map(float, weights))
        with closing(plan_merge(self.experts, self.args, weights, self.base_model, check=_check_licences)) as plan:
            self.notes.append(plan.notes[-1])
            return tuple(plan.weights)


def _check_licences(plan: MergePlan) -> None:
    licences_of_plan(plan).raise_if_refused()


def ready_cells(
    models: Sequence[str], architecture: str, *, token: str | bool | None = None, allow_pickle: bool = False
) -> list[Cell]:
    """
    Return a cell for every merge that is there already: a full model or an adapter, in a folder or on the Hub.

    It is known by its content, so that a model that was written anew is measured anew.

    Args:
        models: Folders or Hub ids.
        architecture: Class of the models that are compared.
        token, allow_pickle: As for `resolve`.

    Raises:
        ArgumentError: If one is of another architecture, and so not a merge of these experts.
        CheckpointError: If one is missing or broken.
    """
    sources = dict(zip(models, resolve_all(models, token=token, allow_pickle=allow_pickle)))
    refuse_gguf(sources.values())
    cells = []
    for name, spec in models_of_merge(models)[0].items():
        source = sources[spec]
        found = architecture_of(source.path) if source.kind != "adapter" else architecture
        if found != architecture:
            raise ArgumentError(
                f"{spec} is {found or 'a model without a name of its class'}, and the experts are {architecture}: it "
                "is no merge of them. Leave it out (--also, also)."
            )
        content = (("content", model_identity(source)),)
        cells.append(Cell(Candidate(name, content), scale=None, weights=None, model=spec))
    return cells
