"""Run the cells of a comparison: merge in memory, measure, keep the result."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from hf_frmerge.comparison.candidates import with_seeds
from hf_frmerge.comparison.cell_file import CellFile, CellResult
from hf_frmerge.comparison.fitter import WithoutGainError
from hf_frmerge.comparison.texts import SPLITS, Split
from hf_frmerge.comparison.yardstick import Losses, Place, gains_of, own_texts, score_of
from hf_frmerge.errors import AmbiguousMeanError, NonFiniteError
from hf_frmerge.evaluation.comparison_record import Tried
from hf_frmerge.evaluation.models.names import BASE
from hf_frmerge.merging.engine.engine import worker_count

if TYPE_CHECKING:
    from hf_frmerge.comparison.candidates import Cell
    from hf_frmerge.comparison.evaluator import Evaluator
    from hf_frmerge.comparison.fitter import Fitter
    from hf_frmerge.comparison.merged_model import MergedModel
    from hf_frmerge.merging.planning.plan import MergePlan


@dataclass(frozen=True)
class Trial:
    """
    A method with the scale and the weights that were best on the validation texts.

    Attributes:
        cell: the merge.
        tried: what was tried, and how it did on the validation texts; empty if no merge worked.
        tests: results on the test texts: one, or one a seed.
        seconds: the longest that one of its merges took.
    """

    cell: Cell
    tried: list[Tried]
    tests: list[CellResult]
    seconds: float

    @property
    def label(self) -> str:
        """Name in tables."""
        n_prompts = self.tests[0].n_prompts
        return f"{self.cell.label} to {n_prompts} prompts" if n_prompts else self.cell.label

    @property
    def is_edge(self) -> bool:
        """Whether its scale is the smallest or the largest of those that were tried."""
        scales = [one.scale for one in self.tried if one.scale is not None]
        return len(set(scales)) > 1 and self.cell.scale in (min(scales), max(scales))

    @property
    def validation(self) -> float:
        """Score on the validation texts."""
        return max(one.score for one in self.tried)

    @property
    def failure(self) -> str | None:
        """Why there is no merge; `None` if there is one."""
        return next((result.failure for result in self.tests if result.failure is not None), None)


class Bench:
    """
    Bench on which all cells are run, one after another.

    Args:
        plan_of: Returns the plan of a cell, to be closed.
        merged: The model in memory.
        evaluator: Evaluator of all models.
        cells: File of finished cells.
        fitter: Fits the merges that are to be fitted; `None` if none is.
        on_progress: Called with what is run next.

    Attributes:
        evaluator, cells: as passed.
        base: split -> losses of the base; `None` if it is not measured.
        places: split -> where merges are scored.
        without_gain: experts that are no better than the base on their own text, so that nothing of them can be kept.
    """

    def __init__(
        self,
        plan_of: Callable[[Cell], MergePlan],
        merged: MergedModel,
        evaluator: Evaluator,
        cells: CellFile,
        fitter: Fitter | None,
        on_progress: Callable[[str], object],
    ) -> None:
        self._plan_of, self._merged, self.evaluator, self.cells = plan_of, merged, evaluator, cells
        self._fitter, self._on_progress = fitter, on_progress
        references = {split: evaluator.references(split) for split in SPLITS}
        self.base: dict[Split, Losses | None] = {split: references[split].pop(BASE, None) for split in SPLITS}
        self.places, self.without_gain = self._find_places(references)

    def try_all(self, cells: Sequence[Cell], n_seeds: int, seed: int) -> Trial:
        """
        Run all cells of one method on the validation texts, and the best of them on the test texts.

        Args:
            cells: The cells.
            n_seeds: How often a method that draws at random is repeated on the test texts, with seeds of its own.
            seed: The first of these.
        """
        results = [(cell, self.result(cell, "validation")) for cell in cells]
        seconds = max(result.seconds for _, result in results)
        places = self.places["validation"]
        tried = [
            (cell, Tried(cell.scale, cell.weights, score_of(result.measured.losses, places)))
            for cell, result in results
            if result.measured is not None
        ]
        if not tried:
            return Trial(cells[0], [], [results[0][1]], seconds)
        best = max(tried, key=lambda pair: pair[1].score)[0]  # the first of equals
        tests = [self.result(one, "test") for one in with_seeds(best, n_seeds, seed)]
        return Trial(best, [one for _, one in tried], tests, seconds)

    def result(self, cell: Cell, split: Split) -> CellResult:
        """Return the result of a cell, run now unless it is finished."""
        known = self.cells.find(cell, split)
        if known is not None:
            return known
        self._on_progress(f"{cell.label}{'' if cell.scale is None else f' × {cell.scale:g}'} ({split})")
        result = self._run(cell, split)
        self.cells.add(cell, split, result)
        return result

    def _run(self, cell: Cell, split: Split) -> CellResult:
        if cell.model is not None:
            return self._measure(cell.model, split, CellResult(None))
        with closing(self._plan_of(cell)) as plan:
            memory = worker_count(plan) * plan.piece_memory
            started = time.perf_counter()
            try:
                n_prompts = self._fitter.fit(plan, cell) if self._fitter is not None and cell.fit is not None else 0
                self._merged.merge(plan, cell)
            # Another method may work; a fit that was asked for and is wrong has raised `ArgumentError` before.
            except (AmbiguousMeanError, NonFiniteError, WithoutGainError) as error:
                return CellResult(None, memory=memory, failure=str(error))
            seconds = time.perf_counter() - started
        return self._measure(self._merged.model(), split, CellResult(None, seconds, memory, n_prompts=n_prompts))

    def _measure(self, model: Any, split: Split, merge: CellResult) -> CellResult:
        """Measure a merge, in memory or in a folder, and add what was found to what is known of it."""
        if split == "validation":
            measured = self.evaluator.validate(model)
        else:
            measured = self.evaluator.test(model, self.places["test"])
        if not all(math.isfinite(losses.mean) for losses in measured.losses.values()):
            return replace(merge, failure="What the merged model predicts is not a finite number.")
        return replace(merge, measured=measured)

    def _find_places(
        self, experts: Mapping[Split, Mapping[str, Losses]]
    ) -> tuple[dict[Split, list[Place]], list[str]]:
        """Return the experts with a gain in both splits, and the names of the others; without a base all texts."""
        texts = [Place(domain, domain) for domain in next(iter(experts["test"].values()))]
        base = self.base
        if base["validation"] is None or base["test"] is None:
            return dict.fromkeys(SPLITS, texts), []
        own = own_texts(base["validation"], experts["validation"])
        gains = {
            "validation": gains_of(base["validation"], experts["validation"], own),
            "test": gains_of(base["test"], experts["test"], own),
        }
        names = {place.name for place in gains["validation"]} & {place.name for place in gains["test"]}
        places: dict[Split, list[Place]] = {
            split: [place for place in gains[split] if place.name in names] or texts for split in SPLITS
        }
        return places, [name for name in own if name not in names]
