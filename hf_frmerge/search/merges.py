"""The merges of a search: made and measured on the bench of a comparison."""

# Shape suffixes: N = experts, M = tasks.

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from hf_frmerge.comparison.candidates import Cell
from hf_frmerge.comparison.command import merge_command
from hf_frmerge.comparison.yardstick import Losses, standings
from hf_frmerge.errors import MergeError
from hf_frmerge.search.record import Chosen, Tried
from hf_frmerge.search.tasks import Tasks

if TYPE_CHECKING:
    from hf_frmerge.comparison.bench import Bench
    from hf_frmerge.comparison.candidates import Candidate
    from hf_frmerge.comparison.comparison import MergeComparison
    from hf_frmerge.comparison.texts import Split
    from hf_frmerge.weighting.pareto.region import Array
    from hf_frmerge.weighting.pareto.search import Measurement

_DIGITS = 4
"""Decimals of weights and scales, so that a command with them can be read. Surrogates are far less exact."""


@dataclass(frozen=True)
class Choice:
    """
    A merge that was chosen.

    Attributes:
        name: what it was chosen as.
        point_N: coefficients of the experts.
        predicted: task -> score by the surrogates; empty if it was not chosen by them.
    """

    name: str
    point_N: Array
    predicted: dict[str, float] = field(default_factory=dict)


class Merges:
    """
    Merges by one method, by the coefficients of the experts: scale times weights.

    Args:
        comparison: Of this method alone.
        bench: Its bench, where they are made and measured.
        candidate: The method.
        has_scale: Whether there is a scale; if not, coefficients sum to 1.

    Attributes:
        tasks: what they are scored on.
        tried: those that were measured on the validation texts.
    """

    def __init__(self, comparison: MergeComparison, bench: Bench, candidate: Candidate, *, has_scale: bool) -> None:
        self._comparison, self._bench = comparison, bench
        self._candidate, self._has_scale = candidate, has_scale
        self.tasks = Tasks(bench.places["validation"])
        self.tried: list[Tried] = []

    def measure(self, point_N: Array) -> Measurement:
        """
        Measure a merge on the validation texts.

        Raises:
            MergeError: If it fails.
        """
        losses = self._losses(point_N, "validation")
        tried = self.tried_at(point_N, self.tasks.scores(losses))
        if tried not in self.tried:
            self.tried.append(tried)
        return self.tasks.measurement(losses)

    def mean_score(self, point_N: Array) -> float:
        """Return the mean score of all experts on the validation texts."""
        counts_M = [task.n_experts for task in self.tasks.all]
        return float(np.average(self.measure(point_N).scores_M, weights=counts_M))

    def tried_at(self, point_N: Array, scores: dict[str, float]) -> Tried:
        """Return a merge for the record."""
        weights, scale = self._weights_and_scale(point_N)
        return Tried(weights, scale, scores)

    def report(self, choices: Sequence[Choice]) -> list[Chosen]:
        """Measure what was chosen on the test texts; return it best first, each merge once, with its command."""
        by_cell: dict[Cell, list[Choice]] = {}
        for choice in choices:
            by_cell.setdefault(self._cell(choice.point_N), []).append(choice)
        losses = {cell.key: [self._losses(same[0].point_N, "test")] for cell, same in by_cell.items()}
        comparison, bench = self._comparison, self._bench
        ranked = standings(losses, bench.base["test"], bench.places["test"], comparison.args.seed)
        chosen = []
        for cell, same in by_cell.items():
            weights, scale = self._weights_and_scale(same[0].point_N)
            standing, folder = ranked[cell.key], re.sub(r"[^\w.]+", "-", same[0].name)
            chosen.append(
                Chosen(
                    names=tuple(choice.name for choice in same),
                    weights=weights,
                    scale=scale,
                    predicted=same[0].predicted,
                    validation=self.tasks.scores(self._losses(same[0].point_N, "validation")),
                    score=standing.score,
                    error=standing.error,
                    by_place=standing.by_place,
                    is_tied=standing.is_tied,
                    command=merge_command(cell, comparison.experts, comparison.base_model, comparison.args, folder),
                )
            )
        return sorted(chosen, key=lambda row: -row.score)

    def _losses(self, point_N: Array, split: Split) -> Losses:
        cell = self._cell(point_N)
        result = self._bench.result(cell, split)
        if result.measured is None:
            raise MergeError(
                f"The merge by {cell.candidate.label} with the weights {cell.weights} failed: {result.failure} Choose "
                "another method (method, --method)."
            )
        return result.measured.losses

    def _cell(self, point_N: Array) -> Cell:
        weights, scale = self._weights_and_scale(point_N)
        return Cell(self._candidate, scale, weights)

    def _weights_and_scale(self, point_N: Array) -> tuple[tuple[float, ...], float | None]:
        total = float(point_N.sum())
        weights = tuple(round(float(part), _DIGITS) for part in point_N / total)
        return weights, round(total, _DIGITS) if self._has_scale else None
