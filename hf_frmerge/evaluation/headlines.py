"""Reduce an evaluation to the few numbers that are logged and compared with thresholds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from hf_frmerge.evaluation.record import MERGED, EvaluationRecord
from hf_frmerge.merging.record.manifest import read_manifest


@dataclass(frozen=True)
class Headline:
    """
    One number about the merged model: the worst over layers, experts or tensors.

    Attributes:
        name: such as `perplexity`, `fisher_rao` (radians), `effective_rank` (ratio to the mean of the experts).
        value: the number.
        place: where the value occurs, in words: a layer, a dataset, an expert, a tensor.
        domain: dataset it was measured on; `None` for a number about the whole model.
    """

    name: str
    value: float
    place: str
    domain: str | None = None


def headlines(record: EvaluationRecord, output_dir: str | Path | None = None) -> list[Headline]:
    """
    Return the headlines of a record, first per dataset, then for the whole model.

    Per dataset: every metric of the merged model; `fisher_rao`, the largest mean distance to an expert, in radians;
    `top1_agreement`, the smallest agreement with an expert on the likeliest token; `objective` (Eq. 3 of arXiv
    2603.04972); and `to_barycentre`, the mean distance to the barycentre of the experts' outputs, in radians.
    For the whole model: `recovery_<expert>` and `recovery`, the smallest of them; `effective_rank` and
    `activation_variance`, the smallest ratio of a layer to the mean of the experts; `repetition`, the largest, and
    `entropy`, the smallest, over its continuations; and with `output_dir`, `norm_ratio`, see `norm_headline`.

    Args:
        record (`EvaluationRecord`): Record of an evaluation.
        output_dir (`str` or `Path`, *optional*): Folder of the merge.
    """
    rows = [headline for domain in record.domains for headline in _of_domain(record, domain)]
    shares = [
        Headline(f"recovery_{row.expert}", row.share, f"on {row.domain}")
        for row in record.recovery
        if row.model == MERGED and row.share is not None
    ]
    rows += shares
    by_expert = [Headline("recovery", h.value, f"{h.name.removeprefix('recovery_')} {h.place}") for h in shares]
    layers = record.collapse()
    continuations = [row for row in record.generations if row.model == MERGED]
    rows += _lowest(by_expert)
    rows += _lowest([Headline("effective_rank", row.effective_rank, f"layer {row.layer}") for row in layers])
    rows += _lowest([Headline("activation_variance", row.activation_variance, f"layer {row.layer}") for row in layers])
    rows += _highest([Headline("repetition", row.repetition, f"continuing {row.domain}") for row in continuations])
    rows += _lowest([Headline("entropy", row.entropy, f"continuing {row.domain}") for row in continuations])
    return [*rows, *norm_headline(output_dir)] if output_dir is not None else rows


def metrics_of_models(record: EvaluationRecord, prefix: str) -> dict[str, float]:
    """Return the metrics of all models, named `<prefix>_<model>_<domain>_<metric>`."""
    return {
        f"{prefix}_{score.model}_{score.domain}_{name}": value
        for score in record.scores
        for name, value in score.metrics.items()
    }


def norm_headline(output_dir: str | Path) -> list[Headline]:
    """Return `norm_ratio` of the tensor that kept least of its experts' norm, from the manifest of a merge."""
    measured = ((name, tensor.geometry) for name, tensor in read_manifest(Path(output_dir)).tensors.items())
    return _lowest(
        [
            Headline("norm_ratio", geometry.norm_ratio, name)
            for name, geometry in measured
            if geometry is not None and any(geometry.norms)  # an all-zero tensor has no norm to lose
        ]
    )


def by_key(measured: Iterable[Headline], prefix: str = "", *, name_domains: bool = True) -> dict[str, Headline]:
    """
    Return headlines by metric name: `<prefix>_<domain>_<name>`, or `<prefix>_<name>`.

    Args:
        measured (`Iterable[Headline]`): Headlines of a record.
        prefix (`str`, *optional*): Prefix of every name.
        name_domains (`bool`, *optional*, defaults to `True`): Include the domain in the names.
    """
    return {
        "_".join(part for part in (prefix, headline.domain if name_domains else None, headline.name) if part): headline
        for headline in measured
    }


@dataclass(frozen=True)
class MetricsEvent:
    """Metrics that one `on_evaluate` reports, the places of their values, and whether it is the last event."""

    metrics: dict[str, float]
    places: dict[str, str]
    is_last: bool


def metric_events(
    measured: Iterable[Headline], prefix: str, domains: Iterable[str], speed: Mapping[str, float]
) -> list[MetricsEvent]:
    """
    Group headlines into events as `Trainer` does: one per named dataset, then the whole model; without names, one.

    Args:
        measured (`Iterable[Headline]`): Headlines of a record.
        prefix (`str`): Prefix of every name.
        domains (`Iterable[str]`): Names the user gave to the datasets; empty for one dataset without a name.
        speed (`Mapping[str, float]`): Runtime and throughput, added to the last event.
    """
    measured, names = list(measured), list(domains)
    parts = [by_key([h for h in measured if h.domain == name], prefix) for name in [*names, None]]
    if not names:
        parts = [by_key(measured, prefix, name_domains=False)]
    events = [
        MetricsEvent(
            metrics={key: h.value for key, h in part.items()},
            places={key: h.place for key, h in part.items()},
            is_last=part is parts[-1],
        )
        for part in parts
    ]
    events[-1].metrics.update({f"{prefix}_{name}": value for name, value in speed.items()})
    return events


def _of_domain(record: EvaluationRecord, domain: str) -> list[Headline]:
    """Return the headlines of one dataset."""
    rows = [
        Headline(name, math.nan if value is None else value, domain, domain)
        for score in record.scores
        if score.model == MERGED and score.domain == domain
        for name, value in score.metrics.items()
    ]
    pairs = [row for row in record.distances if row.model == MERGED and row.domain == domain]
    # Distance to the base is no defect: a merge is meant to leave the base.
    pairs = [row for row in pairs if row.other in record.experts]
    rows += _highest([Headline("fisher_rao", r.fisher_rao.mean, f"{domain}, to {r.other}", domain) for r in pairs])
    rows += _lowest([Headline("top1_agreement", r.top1_agreement, f"{domain}, with {r.other}", domain) for r in pairs])
    for row in record.objectives:
        if row.domain == domain:
            rows.append(Headline("objective", row.value, domain, domain))
            rows.append(Headline("to_barycentre", row.to_barycentre.mean, domain, domain))
    return rows


def _lowest(candidates: list[Headline]) -> list[Headline]:
    """Return the headline with the lowest value, in a list; NaN counts as the lowest, so thresholds notice it."""
    return [min(candidates, key=lambda h: -math.inf if math.isnan(h.value) else h.value)] if candidates else []


def _highest(candidates: list[Headline]) -> list[Headline]:
    """Return the headline with the highest value, in a list; NaN counts as the highest."""
    return [max(candidates, key=lambda h: math.inf if math.isnan(h.value) else h.value)] if candidates else []
