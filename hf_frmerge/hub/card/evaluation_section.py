"""Turn the record of an evaluation into sentences and tables for a model card."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hf_frmerge.evaluation.record import (
    MERGED,
    CollapseRatio,
    EvaluationRecord,
    FunctionDistance,
    Generation,
    Recovered,
    WorstToken,
)
from hf_frmerge.hub.card.markdown import Markdown, MarkdownTable, bold, escape
from hf_frmerge.hub.card.metric_tables import MetricTable, metric_tables, shown_model
from hf_frmerge.wording.evaluation import evaluation_verdicts, layer_name, recovery_verdict, weakest_layers
from hf_frmerge.wording.numbers import NONE, decimals, percent

_WORST_LAYERS = 3
_WORST_TOKENS = 5
_PROMPTS = 2
_GENERATED = 240  # characters shown of a prompt and of a continuation
_CONTEXT = 60  # characters shown before a token


@dataclass
class EvaluationSection:
    """Evaluation part of a card, as Markdown; fields for what was not measured are empty."""

    measured_on: str
    summary: str | None = None
    metrics: list[MetricTable] = field(default_factory=list)
    recovery: MarkdownTable | None = None
    distances: MarkdownTable | None = None
    distance_note: str | None = None
    objectives: MarkdownTable | None = None
    layers: MarkdownTable | None = None
    layer_note: str | None = None
    generations: list[tuple[str, MarkdownTable]] = field(default_factory=list)
    verdicts: list[str] = field(default_factory=list)
    worst_tokens: MarkdownTable | None = None
    commands: list[str] = field(default_factory=list)


def evaluation_section(record: EvaluationRecord) -> EvaluationSection:
    """
    Write up a record for readers who have never merged a model.

    Args:
        record (`EvaluationRecord`):
            Record of the evaluation. Names and texts in it are escaped here, because they may contain Markdown.

    Returns:
        `EvaluationSection`: Input of the card's template.
    """
    distances = [row for row in record.distances if row.model == MERGED and row.other in record.experts]
    collapse = record.collapse()
    kept = recovery_verdict(record)
    return EvaluationSection(
        measured_on=_measured_on(record),
        summary=kept[0].text if kept else None,
        metrics=metric_tables(record.scores),
        recovery=_recovery(record.recovery),
        distances=_distances(record, distances),
        distance_note=_distance_note(record, distances),
        objectives=_objectives(record),
        layers=_layers(collapse),
        layer_note=_layer_note(record),
        generations=_generations(record.generations),
        verdicts=[verdict.text for verdict in evaluation_verdicts(record) if verdict not in kept],
        worst_tokens=_worst_tokens(record.worst_tokens),
        commands=record.commands,
    )


def _measured_on(record: EvaluationRecord) -> str:
    """Return `Measured on 2,000 tokens (math 1,000, code 1,000), in bfloat16, in blocks of 256 tokens.`"""
    tokens: dict[str, int] = {}
    samples: dict[str, int] = {}
    # Several metrics share the texts of a domain: the maximum counts them once, a sum would not.
    for score in record.scores:
        counts, count = (tokens, score.n_tokens) if score.n_tokens else (samples, score.n_samples)
        counts[score.domain] = max(counts.get(score.domain, 0), count)
    parts = [_counted(tokens, "tokens"), _counted({d: n for d, n in samples.items() if d not in tokens}, "samples")]
    text = "Measured"
    if any(parts):
        text += f" on {' and '.join(part for part in parts if part)}"
    if record.settings.get("dtype", "auto") != "auto":
        text += f", in {escape(record.settings['dtype'])}"
    if "block_size" in record.settings:
        text += f", in blocks of {escape(record.settings['block_size'])} tokens"
    return Markdown(f"{text}." if text != "Measured" else "")


def _counted(counts: dict[str, int], unit: str) -> str:
    """Format counts as `2,000 tokens (math 1,000, code 1,000)`; empty if the total is 0."""
    total = sum(counts.values())
    if not total:
        return ""
    by_domain = ", ".join(
        f"{escape(domain)} {count:,}" if len(counts) > 1 else escape(domain) for domain, count in counts.items()
    )
    return f"{total:,} {unit} ({by_domain})"


def _recovery(rows: Sequence[Recovered]) -> MarkdownTable | None:
    """Tabulate each expert's gain over the base in loss, and how much of it the merged model keeps."""
    lines = tuple(
        (
            escape(row.expert),
            escape(row.domain),
            decimals(row.gain, 3),
            decimals(row.kept, 3),
            NONE if row.share is None else f"**{percent(row.share)}**",
        )
        for row in rows
        if row.model == MERGED
    )
    header = ("Expert", "Its text", "Expert better than the base by", "This model better than the base by", "Kept")
    return MarkdownTable(header, lines) if lines else None


def _distances(record: EvaluationRecord, rows: Sequence[FunctionDistance]) -> MarkdownTable | None:
    """
    Tabulate Fisher-Rao distances and shares of equal guesses, `0.31 (82 %)`: a row per domain, a column per expert.

    The last column is the mean distance between experts in radians, for scale.
    """
    if not rows:
        return None
    domains = list(dict.fromkeys(row.domain for row in rows))
    others = list(dict.fromkeys(row.other for row in rows))
    by_pair = {(row.domain, row.other): row for row in rows}
    expert_distances = {
        domain: [
            row.fisher_rao.mean
            for row in record.distances
            if row.domain == domain and row.model in record.experts and row.other in record.experts
        ]
        for domain in domains
    }
    has_scale = any(expert_distances.values())

    def format_pair(domain: str, other: str) -> str:
        row = by_pair.get((domain, other))
        return NONE if row is None else f"{decimals(row.fisher_rao.mean, 3)} ({percent(row.top1_agreement)})"

    lines = []
    for domain in domains:
        gaps = expert_distances[domain]
        mean = decimals(math.fsum(gaps) / len(gaps), 3) if gaps else NONE
        lines.append((escape(domain), *(format_pair(domain, o) for o in others), *([mean] if has_scale else [])))
    header = ("Text", *(f"to {escape(other)}" for other in others), *(["between experts"] if has_scale else []))
    return MarkdownTable(header, tuple(lines))


def _distance_note(record: EvaluationRecord, rows: Sequence[FunctionDistance]) -> str | None:
    """State the error of the distances if only part of each prediction was compared; `None` if they are exact."""
    error = max((row.error for row in rows), default=0.0)
    if not error > 0:
        return None
    kept = record.settings.get("top_k")
    compared = f"the {kept} likeliest" if kept else "the likeliest"
    return f"Exact to {error:.2g} rad: beyond {compared} guesses, only a sample of each expert's was compared."


def _objectives(record: EvaluationRecord) -> MarkdownTable | None:
    """Tabulate the merge objective beside its lowest possible value, a row per domain."""
    rows = tuple(
        (
            escape(row.domain),
            decimals(row.value, 4),
            decimals(row.lowest, 4),
            decimals(row.to_barycentre.mean, 3),
        )
        for row in record.objectives
    )
    header = ("Text", "This model", "Lowest any model could have", "Distance to that best compromise (rad)")
    return MarkdownTable(header, rows) if rows else None


def _layers(collapse: Sequence[CollapseRatio]) -> MarkdownTable | None:
    """Tabulate the layers that lost most, and the mean over all layers with finite ratios."""
    if not collapse:
        return None
    rows = [
        (layer_name(row.layer), percent(row.activation_variance, 1), percent(row.effective_rank, 1))
        for row in sorted(weakest_layers(collapse, _WORST_LAYERS), key=lambda row: row.layer)
    ]
    ratios = [(row.activation_variance, row.effective_rank) for row in collapse]
    known = [pair for pair in ratios if all(map(math.isfinite, pair))]
    if known:
        variance, rank = (percent(math.fsum(values) / len(known), 1) for values in zip(*known))
        rows.append((f"mean of all {len(known)}", variance, rank))
    header = ("Layer", "Spread (activation variance)", "Directions in use (effective rank)")
    return MarkdownTable(header, tuple(rows))


def _layer_note(record: EvaluationRecord) -> str | None:
    """Warn if there are fewer tokens than dimensions: the effective rank then depends on the number of tokens."""
    n_tokens, n_features = (record.settings.get(name) for name in ("n_tokens", "n_features"))
    if not (n_tokens and n_features) or n_tokens > n_features:
        return None
    return (
        f"The {n_tokens:,} tokens are too few for layers of {n_features:,} dimensions: compare the directions in use "
        "with each other only."
    )


def _generations(rows: Sequence[Generation]) -> list[tuple[str, MarkdownTable]]:
    """Tabulate the continuations of the first prompts, a table per prompt; the merged model comes last."""
    prompts = list(dict.fromkeys(row.prompt for row in rows if row.model == MERGED))[:_PROMPTS]
    shown: list[tuple[str, MarkdownTable]] = []
    for prompt in prompts:
        of_prompt = sorted((row for row in rows if row.prompt == prompt), key=lambda row: row.model == MERGED)
        lines = tuple(
            (shown_model(row.model), escape(row.text.strip(), _GENERATED), percent(row.repetition))
            for row in of_prompt
        )
        table = MarkdownTable(("", "goes on", "repeated"), lines, numeric=False)
        shown.append((escape(prompt.strip(), _GENERATED), table))
    return shown


def _worst_tokens(rows: Sequence[WorstToken]) -> MarkdownTable | None:
    """Tabulate the tokens at which the merged model is farthest from an expert."""
    worst = sorted(rows, key=lambda row: -row.distance)[:_WORST_TOKENS]
    lines = tuple(
        (
            f"…{escape(row.context[-_CONTEXT:])}{bold(escape(row.token))}",
            escape(row.expert),
            _guess(row.expert_guess, row.expert_probability),
            _guess(row.merged_guess, row.merged_probability),
            decimals(row.distance, 2),
        )
        for row in worst
    )
    header = ("Text and its <b>next token</b>", "Expert", "The expert's guess", "This model's guess", "Distance (rad)")
    return MarkdownTable(header, lines, numeric=False) if lines else None


def _guess(guess: str, probability: float) -> str:
    """Format as `four (90%)`: the model's first guess, and the probability it gives the actual token."""
    return f"{escape(guess.strip()) or ('white space' if guess else 'nothing')} ({percent(probability)})"


def hide_names(record: EvaluationRecord, hide: Any) -> EvaluationRecord:
    """Copy a record, applying `hide` to names of models and domains and to commands, but not to evaluated texts."""
    data = record.to_dict()
    about = ("model", "other", "expert", "domain")
    for part, value in data.items():
        if part in ("models", "weights"):
            data[part] = {hide(name): item for name, item in value.items()}
        elif part == "commands":
            data[part] = [hide(command) for command in value]
        elif part != "settings":
            data[part] = [{k: hide(v) if k in about else v for k, v in row.items()} for row in value]
    return EvaluationRecord.from_dict(data)
