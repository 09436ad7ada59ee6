"""Tables of a report: text of the cells, and the values they are sorted by."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hf_frmerge.evaluation.record import MERGED, EvaluationRecord
from hf_frmerge.report.facts import MergeFacts, TensorFacts
from hf_frmerge.wording import parts
from hf_frmerge.wording import scores as words
from hf_frmerge.wording.numbers import number, percent
from hf_frmerge.wording.scores import ScoreTable

MAX_ROWS = 2000
"""With more tensors, those of one kind in a layer share a row: browsers can show more, but nobody reads it."""


@dataclass(frozen=True)
class Cell:
    """Text of a cell, and the value to sort by: `None` in text columns, NaN if missing."""

    text: str
    value: float | None = None
    is_best: bool = False


@dataclass(frozen=True)
class Column:
    """Heading of a column, and its explanation."""

    title: str
    note: str = ""


@dataclass(frozen=True)
class Table:
    """
    Table with headings.

    Attributes:
        key: valid and unique as an HTML id.
        note: sentence below the table.
        shown: number of rows shown until the reader expands the table.
    """

    key: str
    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""
    shown: int = 12

    @property
    def numeric(self) -> list[bool]:
        """Whether each column holds numbers."""
        return [any(row[index].value is not None for row in self.rows) for index in range(len(self.columns))]


def score_tables(record: EvaluationRecord) -> list[Table]:
    """Return a table per metric: a row per model, the merged one first; a column per domain, the best marked."""
    return [_score_table(record, scores, index) for index, scores in enumerate(words.score_tables(record.scores))]


def _score_table(record: EvaluationRecord, scores: ScoreTable, index: int) -> Table:
    """Build the table of one metric; the order is merged model, other models such as the base, experts."""
    rows = []
    for model in sorted(scores.models, key=lambda model: (model != MERGED, model in record.experts)):
        cells = [
            Cell(
                scores.written(model, domain),
                scores.values.get((model, domain), math.nan),
                scores.is_best(model, domain),
            )
            for domain in scores.domains
        ]
        rows.append((Cell(_label(record, model)), *cells))
    columns = (Column("Model"), *(Column(domain) for domain in scores.domains))
    return Table(f"scores-{index}", scores.metric.heading, columns, tuple(rows), scores.metric.meaning)


def _number(value: float | None, digits: int = 3) -> Cell:
    return Cell(number(value, digits), math.nan if value is None else float(value))


def _percent(value: float | None, digits: int = 0) -> Cell:
    return Cell(percent(value, digits), math.nan if value is None else float(value))


def _count(value: int) -> Cell:
    return Cell(f"{value:,}", float(value))


def _label(record: EvaluationRecord, name: str) -> str:
    return f"{name} (base)" if record.models.get(name) == "base" and name != "base" else name


def distance_table(record: EvaluationRecord) -> Table | None:
    """Return distances of predictions: first those of the merged model, then those between experts, for scale."""
    if not record.distances:
        return None
    rows = sorted(record.distances, key=lambda row: row.model != MERGED)
    error = max(row.error for row in rows)
    bound = f" They are estimates from samples: the means may be off by up to {number(error)} rad." if error else ""
    return Table(
        "distances",
        parts.DISTANCES.title,
        (
            Column("From"),
            Column("To"),
            Column("Text"),
            Column("Mean", "Fisher–Rao distance of the predictions, in radians"),
            Column("Median", "Fisher–Rao distance, in radians"),
            Column("95 %", "95 of 100 tokens are closer, in radians"),
            Column("Largest", "Fisher–Rao distance, in radians"),
            Column(
                "KL", "Kullback–Leibler divergence of the model from the other, KL(other ‖ model), in nats a token"
            ),
            Column("KL back", "KL(model ‖ other), in nats a token"),
            Column("JS", "Jensen–Shannon divergence, in nats a token"),
            Column("Same guess", "Share of tokens on which both have the same first guess"),
            Column("Tokens"),
        ),
        tuple(
            (
                Cell(row.model),
                Cell(row.other),
                Cell(row.domain),
                _number(row.fisher_rao.mean),
                _number(row.fisher_rao.median),
                _number(row.fisher_rao.p95),
                _number(row.fisher_rao.max),
                _number(row.kl_other_model),
                _number(row.kl_model_other),
                _number(row.jensen_shannon),
                _percent(row.top1_agreement),
                _count(row.n_tokens),
            )
            for row in rows
        ),
        f"{parts.DISTANCES.meaning}{bound}",
    )


def objective_table(record: EvaluationRecord) -> Table | None:
    """Return the merge objective and its lowest possible value, by domain, in squared radians."""
    if not record.objectives:
        return None
    return Table(
        "objectives",
        parts.OBJECTIVES.title,
        (
            Column("Text"),
            Column("Reached", "Weighted mean squared Fisher–Rao distance to the experts, in squared radians"),
            Column("Lowest possible", "The same for the exact barycentre of the experts' outputs"),
            Column("To the barycentre", "Mean Fisher–Rao distance to it, in radians"),
            Column("95 %", "95 of 100 tokens are closer to it, in radians"),
        ),
        tuple(
            (
                Cell(row.domain),
                _number(row.value),
                _number(row.lowest),
                _number(row.to_barycentre.mean),
                _number(row.to_barycentre.p95),
            )
            for row in record.objectives
        ),
        parts.OBJECTIVES.meaning,
    )


def layer_table(record: EvaluationRecord) -> Table | None:
    """Return variance and effective rank of the merged model's layers, and their ratios to the experts' mean."""
    ratios = record.collapse()  # empty without experts to compare with
    if not ratios:
        return None
    merged = {row.layer: row for row in record.layers if row.model == MERGED}
    return Table(
        "layers",
        parts.LAYERS.title,
        (
            Column("Layer", "0 is the output of the embedding"),
            Column("Variance", "Activation variance, mean over features"),
            Column("÷ experts", "Over the mean of the experts"),
            Column("Effective rank", "exp of the entropy of the spectrum of the centred covariance"),
            Column("÷ experts ", "Over the mean of the experts"),
        ),
        tuple(
            (
                Cell(str(row.layer), float(row.layer)),
                _number(merged[row.layer].activation_variance),
                _percent(row.activation_variance, 1),
                _number(merged[row.layer].effective_rank),
                _percent(row.effective_rank, 1),
            )
            for row in ratios
        ),
        parts.LAYERS.meaning,
    )


def block_table(facts: MergeFacts) -> Table | None:
    """Return statistics of the merge: a row per tensor, or per kind and layer if there are over `MAX_ROWS`."""
    if not facts.measured_tensors:
        return None
    groups: dict[str, list[TensorFacts]] = {}
    is_grouped = len(facts.measured_tensors) > MAX_ROWS
    for tensor in facts.measured_tensors:
        name = tensor.name if not is_grouped or tensor.layer is None else f"layer {tensor.layer}: {tensor.kind}"
        groups.setdefault(name, []).append(tensor)
    note = "Angles in radians; lengths are Euclidean norms."
    if is_grouped:
        note += f" {len(facts.measured_tensors):,} tensors, those of a kind in a layer together: means, and the worst."
    return Table(
        "blocks",
        f"{parts.BLOCKS.title}, tensor by tensor",
        (
            Column("Tensor"),
            Column("Blocks", "Spheres it was cut into"),
            Column("Lengths", "Norms of the experts, smallest to largest"),
            Column("Angle", "Mean angle of two experts, in radians"),
            Column("Largest", "Largest angle of two experts in any block, in radians"),
            Column("Average keeps", "Length of the plain weighted average over the experts' mean length"),
            Column("Merge keeps", "Length of the merged tensor over the experts' mean length"),
            Column("To rescaled", "Largest angle to the norm-rescaled average in any block, in radians"),
            Column("Steps", "Most steps of the iteration in any block"),
            Column("Left", "Residual: the largest tangent norm at the end, in radians"),
            Column("Not converged", "Blocks that did not meet the tolerance"),
        ),
        tuple(_block_row(name, group) for name, group in groups.items()),
        note,
        shown=16,
    )


def _block_row(name: str, group: Sequence[TensorFacts]) -> tuple[Cell, ...]:
    """Summarise a group of tensors: the mean of mean angles, sums of counts, and the worst of the rest."""
    geometry = [tensor.geometry for tensor in group if tensor.geometry is not None]
    norms = [norm for entry in geometry for norm in entry.norms]
    lengths = number(min(norms)) if min(norms) == max(norms) else f"{number(min(norms))} to {number(max(norms))}"
    return (
        Cell(name),
        _count(sum(tensor.n_blocks for tensor in group)),
        Cell(lengths, max(norms)),
        _number(math.fsum(entry.mean_angle for entry in geometry) / len(geometry)),
        _number(max(entry.max_angle for entry in geometry)),
        _number(min(entry.linear_norm_ratio for entry in geometry), 4),
        _number(min(entry.norm_ratio for entry in geometry), 4),
        _number(max(entry.gap_to_nre for entry in geometry), 2),
        _count(max(entry.n_iter for entry in geometry)),
        _number(max(entry.residual for entry in geometry), 2),
        _count(sum(len(entry.unconverged) for entry in geometry)),
    )
