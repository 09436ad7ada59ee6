"""Results of a comparison of merge methods, as plain numbers in one file; terminal and page read it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from hf_frmerge.checkpoints.disk import write_file
from hf_frmerge.checkpoints.folders import open_folder
from hf_frmerge.checkpoints.json_text import parse_json
from hf_frmerge.checkpoints.tensors.small_files import read_file
from hf_frmerge.errors import CheckpointError
from hf_frmerge.merging.record.check_types import check_types

COMPARISON_FILE = "comparison.json"
COMPARISON_PAGE = "comparison.html"

Interval = tuple[float, float]
"""Ends of a 95 % interval over texts that were drawn again."""


@dataclass(frozen=True)
class Tried:
    """Score of a method on the validation texts with one scale (`None` in weight space) and one choice of weights."""

    scale: float | None
    weights: tuple[float, ...] | None
    score: float


@dataclass(frozen=True)
class MethodResult:
    """
    One method with the scale and the weights that were best on the validation texts.

    Attributes:
        label: name of the method with its options.
        method, options, scale, weights: how it was merged; `scale` is `None` in weight space, `weights` where all are
            alike.
        is_edge: whether the chosen scale is the smallest or the largest that was tried.
        tried: what was tried, on the validation texts.
        validation: score on the validation texts.
        score: on the test texts: mean share of the experts' gains that is kept, or minus the mean loss.
        error: standard error of the score over texts, and over seeds where there are several.
        interval: of the score.
        by_place: score of every expert, or domain.
        place_intervals: of these.
        lead: score of the best minus this one.
        lead_interval: of that, paired: the same texts are drawn for both.
        is_tied: whether the best cannot be told from it: the interval of the lead begins at 0 or below.
        distance: to the experts' predictions, each on its own text, mean, in radians.
        effective_rank, activation_variance: of the layer that lost most, over the mean of the experts.
        seconds: of the merge in memory, with the fit if there was one; the first of the span methods includes
            measuring for all of them.
        memory: most bytes the merge may hold at a time, beside the model; `None` after a fit, which is not counted.
        seed_scores: score with every seed, where a random method was repeated; `score` is their mean.
        n_prompts: number of prompts it was fitted to; 0 without a fit.
        model: folder or Hub id of a merge that was there already and was compared as it is; `method` is its name then,
            and `seconds` and `memory` are not known.
    """

    label: str
    method: str
    options: dict[str, str]
    scale: float | None
    weights: tuple[float, ...] | None
    is_edge: bool
    tried: list[Tried]
    validation: float
    score: float
    error: float
    interval: Interval
    by_place: dict[str, float]
    place_intervals: dict[str, Interval]
    lead: float
    lead_interval: Interval
    is_tied: bool
    distance: float | None
    effective_rank: float | None
    activation_variance: float | None
    seconds: float | None
    memory: int | None
    seed_scores: tuple[float, ...] = ()
    n_prompts: int = 0
    model: str | None = None


@dataclass(frozen=True)
class ComparisonRecord:
    """
    Result of a comparison.

    Attributes:
        experts, base_model: as the user named them.
        unit: what the scores are: `"share"` of the experts' gains over the base that is kept, or minus the `"loss"`,
            in nats.
        texts: split -> domain -> number of texts and of predictions.
        settings: scales, seeds, and how it was evaluated.
        methods: best first.
        command: command that makes the best of the merges that are not there already, as arguments.
        failed: method that gave no merge -> why.
        notes: what the user should know.
    """

    experts: list[str]
    base_model: str | None
    unit: Literal["share", "loss"]
    texts: dict[str, dict[str, dict[str, int]]]
    settings: dict[str, Any]
    methods: list[MethodResult]
    command: list[str]
    failed: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def best(self) -> MethodResult:
        """The method with the highest score."""
        return self.methods[0]

    @property
    def tied(self) -> list[MethodResult]:
        """Methods that cannot be told from the best, without it."""
        return [row for row in self.methods[1:] if row.is_tied]

    def to_dict(self) -> dict[str, Any]:
        """Return the record as JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ComparisonRecord:
        """Read a record from the values of `to_dict`, with the tuples that JSON turned into lists."""
        return cls(**{**values, "methods": [_method(row) for row in values["methods"]]})


def save_comparison(folder: Path, record: ComparisonRecord) -> None:
    """Write the record as JSON."""
    write_file(folder / COMPARISON_FILE, json.dumps(record.to_dict(), indent=1, ensure_ascii=False) + "\n")


def load_comparison(folder: Path | str) -> ComparisonRecord:
    """
    Read the record of a comparison from its folder.

    Raises:
        CheckpointError: If there is none, or it is damaged.
    """
    opened = open_folder(str(folder))
    try:
        record = ComparisonRecord.from_dict(parse_json(read_file(opened, COMPARISON_FILE, str(folder)), finite=True))
        check_types(record)
        if not record.methods:
            raise ValueError("it has no methods")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder}/{COMPARISON_FILE} is not what a comparison writes ({type(error).__name__}: {error}). Run "
            "`frmerge compare` again with this output folder: what is finished is taken from cells.jsonl."
        ) from error
    return record


def _method(row: dict[str, Any]) -> MethodResult:
    tuples: dict[str, Any] = {name: tuple(row[name]) for name in ("interval", "lead_interval", "seed_scores")}
    tuples["place_intervals"] = {place: tuple(ends) for place, ends in row["place_intervals"].items()}
    tuples["weights"] = _tuple(row["weights"])
    tuples["tried"] = [Tried(one["scale"], _tuple(one["weights"]), one["score"]) for one in row["tried"]]
    return MethodResult(**{**row, **tuples})


def _tuple(weights: list[float] | None) -> tuple[float, ...] | None:
    return None if weights is None else tuple(weights)
