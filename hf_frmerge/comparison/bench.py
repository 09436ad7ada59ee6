"""Run the cells of a comparison: merge in memory, measure, keep the result."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_frmerge.comparison.cell_file import CellFile, CellResult
from hf_frmerge.comparison.texts import SPLITS, Split
from hf_frmerge.comparison.yardstick import Losses, Place, gains_of, own_texts, score_of
from hf_frmerge.errors import AmbiguousMeanError, NonFiniteError
from hf_frmerge.evaluation.models.names import BASE
from hf_frmerge.merging.engine.engine import worker_count

if TYPE_CHECKING:
    from hf_frmerge.comparison.candidates import Cell
    from hf_frmerge.comparison.evaluator import Evaluator
    from hf_frmerge.comparison.merged_model import MergedModel
    from hf_frmerge.merging.planning.plan import MergePlan


@dataclass(frozen=True)
class Trial:
    """
    A method with the scale and the weights that were best on the validation texts.

    Attributes:
        cell: the merge.
        is_edge: whether its scale is the smallest or the largest that was tried.
        validation: score on the validation texts; NaN if no merge worked.
        test: result on the test texts, or why there is none.
        seconds: the longest that one of its merges took.
    """

    cell: Cell
    is_edge: bool
    validation: float
    test: CellResult
    seconds: float


class Bench:
    """
    Bench on which all cells are run, one after another.

    Args:
        plan_of: Returns the plan of a cell, to be closed.
        merged: The model in memory.
        evaluator: Evaluator of all models.
        cells: File of finished cells.
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
        on_progress: Callable[[str], object],
    ) -> None:
        self._plan_of, self._merged, self.evaluator, self.cells = plan_of, merged, evaluator, cells
        self._on_progress = on_progress
        references = {split: evaluator.references(split) for split in SPLITS}
        self.base: dict[Split, Losses | None] = {split: references[split].pop(BASE, None) for split in SPLITS}
        self.places, self.without_gain = self._find_places(references)

    def try_all(self, cells: Sequence[Cell]) -> Trial:
        """Run all cells of one method on the validation texts, and the best of them on the test texts."""
        results = [(cell, self.result(cell, "validation")) for cell in cells]
        seconds = max(result.seconds for _, result in results)
        scored = [
            (score_of(result.measured.losses, self.places["validation"]), cell)
            for cell, result in results
            if result.measured is not None
        ]
        if not scored:
            return Trial(cells[0], False, float("nan"), results[0][1], seconds)
        score, best = max(scored, key=lambda pair: pair[0])  # the first of equals
        scales = [cell.scale for cell in cells if cell.scale is not None]
        is_edge = best.scale is not None and len(set(scales)) > 1 and best.scale in (min(scales), max(scales))
        return Trial(best, is_edge, score, self.result(best, "test"), seconds)

    def result(self, cell: Cell, split: Split) -> CellResult:
        """Return the result of a cell, run now unless it is finished."""
        known = self.cells.find(cell, split)
        if known is not None:
            return known
        self._on_progress(f"{cell.candidate.label}{'' if cell.scale is None else f' × {cell.scale:g}'} ({split})")
        result = self._run(cell, split)
        self.cells.add(cell, split, result)
        return result

    def _run(self, cell: Cell, split: Split) -> CellResult:
        with closing(self._plan_of(cell)) as plan:
            memory = worker_count(plan) * plan.piece_memory
            try:
                seconds = self._merged.merge(plan, cell)
            except (AmbiguousMeanError, NonFiniteError) as error:  # the other methods may work
                return CellResult(None, memory=memory, failure=str(error))
        model = self._merged.model()
        if split == "validation":
            measured = self.evaluator.validate(model)
        else:
            measured = self.evaluator.test(model, self.places["test"])
        return CellResult(measured, seconds, memory)

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
