"""`WeightSearch`: choose the weights of the experts by measuring a few merges."""

# Shape suffixes: N = experts.

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from hf_frmerge.comparison.candidates import SCALES, parse_candidate
from hf_frmerge.comparison.comparison import MergeComparison
from hf_frmerge.errors import ArgumentError
from hf_frmerge.evaluation.models.names import models_of_merge
from hf_frmerge.merging.arguments.merging_arguments import MergingArguments
from hf_frmerge.merging.arguments.values import did_you_mean
from hf_frmerge.methods.table import METHODS
from hf_frmerge.search.figure import save_figure
from hf_frmerge.search.merges import Choice, Merges
from hf_frmerge.search.record import SearchRecord, Tried, finite, save_record, save_table
from hf_frmerge.search.sentences import ALIKE
from hf_frmerge.weighting.greedy import greedy_soup
from hf_frmerge.weighting.pareto.front import choose
from hf_frmerge.weighting.pareto.nsga import require_pymoo
from hf_frmerge.weighting.pareto.region import GRIDS, Region
from hf_frmerge.weighting.pareto.search import front_by_acquisition, front_of_all, front_of_pairs
from hf_frmerge.weighting.pareto.surrogate import require_evaluations

if TYPE_CHECKING:
    from hf_frmerge.weighting.pareto.front import Front
    from hf_frmerge.weighting.pareto.search import Found

By = Literal["pareto", "bayesian", "nested", "greedy"]
WAYS: tuple[By, ...] = ("pareto", "bayesian", "nested", "greedy")

_FRONT = 100  # points of the front that are recorded


class WeightSearch:
    """
    Choose the weights of the experts by measuring merges.

    Merges are made in memory and measured on a quarter of the texts, as in a `MergeComparison`; those that are chosen
    are measured on the others, beside equal weights. What was measured is kept in `args.output_dir`: the same call
    goes on where an interrupted one was.

    Args:
        experts (`Sequence[str]`):
            Two or more fine-tunes of one model, full or LoRA: local folders or Hub ids.
        eval_dataset (`Mapping[str, Rows]`):
            Name -> rows with `text` or `input_ids`, with a label for classifiers, or with `image` and a label. A text
            that has the name of an expert is that expert's own.
        base_model (`str`, *optional*):
            What they were fine-tuned from; by default what adapters name. Without one there are no scales, and losses
            are scored in place of shares of the experts' gains.
        by (`str`, *optional*, defaults to `"pareto"`):
            `"pareto"` measures merges all over the weights and finds the front of what is best for some task by
            quadratic surrogates (MAP, arXiv 2406.07529); `"bayesian"` measures half of them where the surrogates are
            least sure; `"nested"` joins the experts two by two, for many of them. `"greedy"` averages experts, the
            best first, as long as the score does not fall (arXiv 2203.05482).
        method (`str`, *optional*, defaults to `"linear"`):
            `NAME` or `NAME,option=value`, of all merges.
        scales (`Sequence[float]`, *optional*):
            Smallest and largest factor of the merged delta, or one; by default from 0.5 to 2, and 1 for a greedy soup.
        n_evaluations (`int`, *optional*):
            Merges that surrogates are fitted to; with `"nested"` of every pair. By default twice as many as a
            quadratic function has coefficients.
        args (`MergingArguments`, *optional*):
            What all merges share, where they run and how they are evaluated; `output_dir` is the folder of the
            search, `seed` draws texts, weights and resamples, too.
        max_tokens, eval_dtype, cache_dir, on_progress, on_prediction_step:
            As in `MergeComparison`.

    Example:

    ```python
    texts = {"math": ["the rooms of the house", "each room opens on another"] * 4}
    record = WeightSearch(["org/math", "org/code"], texts, "org/base", by="greedy").run()
    print(record.chosen[0].names, record.chosen[0].weights, record.chosen[0].command)
    ```
    """

    def __init__(
        self,
        experts: Sequence[str],
        eval_dataset: Mapping[str, Any],
        base_model: str | None = None,
        *,
        by: By = "pareto",
        method: str = "linear",
        scales: Sequence[float] | None = None,
        n_evaluations: int | None = None,
        args: MergingArguments | None = None,
        max_tokens: int = 2048,
        eval_dtype: str = "auto",
        cache_dir: str | None = None,
        on_progress: Callable[[str], object] | None = None,
        on_prediction_step: Callable[[Any], None] | None = None,
    ) -> None:
        if by not in WAYS:
            raise ArgumentError(f"There is no search by {by!r}: expected one of {WAYS}.{did_you_mean(by, WAYS)}")
        if len(experts) < 2:
            raise ArgumentError(f"Weights are chosen for two or more experts, but got {len(experts)}.")
        name = parse_candidate(method).method
        if METHODS[name].needs_prompts:
            raise ArgumentError(
                f"`method={name!r}` asks what the experts do on prompts, which a search does not have. Choose another "
                "one; `frmerge compare --calibration` has it beside others."
            )
        self.by, self.n_evaluations = by, n_evaluations
        self.scales = _checked_scales(scales, by)
        self.comparison = MergeComparison(
            experts,
            eval_dataset,
            base_model,
            methods=[method],
            scales=self.scales or (1.0,),
            args=args if args is not None else MergingArguments(output_dir="search"),
            max_tokens=max_tokens,
            eval_dtype=eval_dtype,
            cache_dir=cache_dir,
            on_progress=on_progress,
            on_prediction_step=on_prediction_step,
        )
        # Before long work; whether there is a scale is only known when adapters were asked for their base.
        self._check(Region(len(experts), self._range(has_scale=base_model is not None)))

    def run(self) -> SearchRecord:
        """
        Search, and return the record, which is also in `search.json` and `.parquet`, with a figure in `front.svg`.

        Raises:
            ArgumentError: If options contradict each other or the models, a text cannot be used, or there are too few
                evaluations.
            CheckpointError: If a model is missing, broken, or does not fit the others.
            ResumeError: If the folder holds measurements of something else.
            MergeError: If a licence forbids merges, a merge fails, or a file cannot be written.
        """
        comparison = self.comparison
        with comparison.bench() as (bench, [[cell, *_]]):
            has_scale = cell.scale is not None
            if self.scales is not None and not has_scale:
                raise ArgumentError(
                    "There is no scale without a base model, or in weight space: leave scales (--scales) out."
                )
            region = Region(len(comparison.experts), self._range(has_scale=has_scale))
            self._check(region)
            merges = Merges(comparison, bench, cell.candidate, has_scale=has_scale)
            choices, found = self._choose(merges, region)
            chosen = merges.report(choices)
            if bench.without_gain:
                comparison.notes.append(
                    f"Not counted: {', '.join(bench.without_gain)}, no better than the base on the texts here."
                )
            record = SearchRecord(
                experts=comparison.experts,
                base_model=comparison.base_model,
                by=self.by,
                method=cell.candidate.label,
                unit="loss" if bench.places["test"][0].gain is None else "share",
                texts=bench.evaluator.sizes(),
                settings={
                    "scales": list(region.scales) if has_scale else None,
                    "evaluations": None if self.by == "greedy" else self._n_evaluations(region),
                    "seed": comparison.args.seed,
                    "max_tokens": comparison.max_tokens,
                },
                tried=merges.tried,
                fit=_fit(found.front) if found is not None else {},
                front=_recorded(found.front.thinned(_FRONT), merges) if found is not None else [],
                chosen=chosen,
                notes=comparison.notes,
            )
            folder = Path(comparison.args.output_dir)
            save_record(folder, record)
            save_table(folder, record)
            save_figure(folder, record)
        return record

    def _choose(self, merges: Merges, region: Region) -> tuple[list[Choice], Found | None]:
        """Search; return what was chosen, equal weights at last, and the front if there is one."""
        found = None
        if self.by == "greedy":
            choices = _soup(merges, region)
        else:
            found = self._find(merges, region)
            choices = _chosen(found)
        low, high = region.scales
        scales = [scale for scale in SCALES if low <= scale <= high] or [low]
        alike_N = np.full(region.n_experts, 1.0 / region.n_experts)
        return [*choices, Choice(ALIKE, max((alike_N * scale for scale in scales), key=merges.mean_score))], found

    def _find(self, merges: Merges, region: Region) -> Found:
        tasks, seed = merges.tasks.all, self.comparison.args.seed
        n_evaluations = self._n_evaluations(region)
        if self.by == "nested":
            own = self._own_tasks(merges)
            return front_of_pairs(tasks, region, merges.measure, own, n_evaluations, seed)
        find = front_by_acquisition if self.by == "bayesian" else front_of_all
        return find(tasks, region, merges.measure, n_evaluations, seed)

    def _own_tasks(self, merges: Merges) -> list[int]:
        """Return the number of every expert's own task."""
        own, names = merges.tasks.own, list(models_of_merge(self.comparison.experts)[0])
        for name in names:
            if name not in own:
                raise ArgumentError(
                    f"by='nested' joins experts for the texts they are good at, but none is known of {name!r}. Give "
                    f"the base model and a text that it gained on, or a text with its name (--data {name}=FILE); or "
                    "leave the expert out; or search by='pareto'."
                )
        return [own[name] for name in names]

    def _range(self, *, has_scale: bool) -> tuple[float, float]:
        """Return the smallest and the largest scale; there is none in weight space."""
        if not has_scale:
            return 1.0, 1.0
        chosen = self.scales or ((1.0,) if self.by == "greedy" else (SCALES[0], SCALES[-1]))
        return chosen[0], chosen[-1]

    def _n_evaluations(self, region: Region) -> int:
        """Return the number of merges that surrogates are fitted to."""
        fitted = Region(2, region.scales) if self.by == "nested" else region
        return self.n_evaluations if self.n_evaluations is not None else fitted.n_evaluations

    def _check(self, region: Region) -> None:
        """Check what a search of a region takes."""
        if self.by == "greedy":
            if self.n_evaluations is not None:
                raise ArgumentError("A greedy soup takes as many merges as it takes: leave evaluations out.")
            return
        fitted = Region(2, region.scales) if self.by == "nested" else region
        require_evaluations(fitted, self._n_evaluations(region))
        if fitted.dimension not in GRIDS:
            require_pymoo(fitted.n_experts)


def _soup(merges: Merges, region: Region) -> list[Choice]:
    """Return a greedy soup, and the expert that is best alone."""
    scale = region.scales[0]
    soup = greedy_soup(region.n_experts, lambda weights: merges.mean_score(np.array(weights) * scale))
    alone = max(np.eye(region.n_experts) * scale, key=merges.mean_score)
    return [Choice("greedy soup", np.array(soup) * scale), Choice("best expert", alone)]


def _chosen(found: Found) -> list[Choice]:
    """Return what is chosen of the merges that were measured: their front is sure, that of the surrogates is not."""
    tasks = found.front.tasks
    return [
        Choice(name, found.points_PN[number], dict(zip((t.name for t in tasks), found.predicted_PM[number].tolist())))
        for name, number in choose(tasks, found.scores_PM).items()
    ]


def _fit(front: Front) -> dict[str, float | None]:
    return {task.name: finite(one.left_out) for task, one in zip(front.tasks, front.surrogates)}


def _recorded(front: Front, merges: Merges) -> list[Tried]:
    names = [task.name for task in front.tasks]
    return [
        merges.tried_at(point_N, dict(zip(names, scores_M.tolist())))
        for point_N, scores_M in zip(front.points_FN, front.scores_FM)
    ]


def _checked_scales(scales: Sequence[float] | None, by: By) -> tuple[float, ...] | None:
    """Return one scale, or the smallest and the largest; `None` if none were given."""
    if scales is None:
        return None
    checked = tuple(sorted({float(scale) for scale in scales}))
    most = 1 if by == "greedy" else 2
    if not 1 <= len(checked) <= most or not all(0 < scale < float("inf") for scale in checked):
        expected = "one positive number" if most == 1 else "one positive number, or the smallest and the largest"
        raise ArgumentError(f"The scales (scales, --scales) of a search by {by!r} are {expected}; got {list(scales)}.")
    return checked
