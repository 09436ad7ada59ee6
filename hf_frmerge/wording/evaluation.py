"""Verdicts on an evaluation, as sentences."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from hf_frmerge.evaluation.headlines import Headline, headlines
from hf_frmerge.evaluation.record import MERGED, CollapseRatio, EvaluationRecord, Recovered
from hf_frmerge.evaluation.weakest import weakest_domain
from hf_frmerge.visible import visible
from hf_frmerge.wording.metrics import metric_of
from hf_frmerge.wording.numbers import listed, number, percent
from hf_frmerge.wording.verdicts import Verdict, graded

N_NAMED = 4
"""Maximum number of names in a sentence."""


def evaluation_verdicts(record: EvaluationRecord) -> list[Verdict]:
    """Return all verdicts on a record: what the model keeps, where it is weak, and what changed most."""
    return [
        *recovery_verdict(record),
        *weakest_domain_verdict(record),
        *distance_verdict(record),
        *worst_token_verdict(record),
        *layer_verdict(record),
        *repetition_verdict(record),
    ]


def recovery_verdict(record: EvaluationRecord) -> list[Verdict]:
    """Return at most one verdict: the share of each expert's gain over the base that the merged model keeps."""
    measured = [row for row in record.recovery if row.model == MERGED]
    # Without a gain over the base there is no share to keep: it would be a division by zero.
    rows = [row for row in measured if row.share is not None]
    if not rows:
        hopeless = list(dict.fromkeys(row.expert for row in measured))
        if not hopeless:
            return []
        text = f"No expert is better than the base on the text of its own. Measured were {listed(hopeless)}."
        return [Verdict("watch", "The experts gained nothing to keep", text)]
    shares = {row.expert: float(row.share) for row in rows if row.share is not None}
    weakest, best = min(shares, key=shares.__getitem__), max(shares, key=shares.__getitem__)
    if len(rows) <= N_NAMED:
        text = listed([f"{percent(row.share)} of what {row.expert} gained{_on(row)}" for row in rows])
    else:
        text = f"{percent(shares[weakest])} ({weakest}) to {percent(shares[best])} ({best}) of what each expert gained"
    level = graded(shares[weakest], 0.8, 0.5)
    title = {"good": "It keeps what the experts can do", "watch": "It keeps much of what the experts can do"}
    text = f"On the text it was measured on, it keeps {text} over the base."
    return [Verdict(level, title.get(level, "It loses much of what an expert can do"), text)]


def weakest_domain_verdict(record: EvaluationRecord) -> list[Verdict]:
    """Return at most one verdict: the domain on which the merged model is farthest behind the best other model."""
    weak = weakest_domain(record.scores)
    if weak is None:
        return []
    metric = metric_of(weak.metric)
    numbers = (
        f"{metric.title.lower()} {metric.written(weak.merged)} against {metric.written(weak.best)} for {weak.model}"
    )
    if weak.gap <= 0:
        text = f"It is behind no other model on any domain. Closest is {weak.domain}, {numbers}."
        return [Verdict("good", "Its weakest domain is no weakness", text)]
    # Losses are in nats and unbounded, so a gap of 0.1 is little; other metrics lie between 0 and 1.
    far = 0.5 if weak.metric in ("loss", "perplexity") else 0.1
    text = f"On {weak.domain} it is farthest behind the best other model, {numbers}."
    return [Verdict("bad" if weak.gap > far else "watch", f"Weakest on {weak.domain}", text)]


def distance_verdict(record: EvaluationRecord) -> list[Verdict]:
    """Return at most one verdict: distances to the experts' predictions, compared with those between experts."""
    rows = [row for row in record.distances if row.model == MERGED and row.other in record.experts]
    if not rows:
        return []
    # Weighted by tokens: a short domain should not count as much as a long one.
    mean = float(np.average([row.fisher_rao.mean for row in rows], weights=[row.n_tokens for row in rows]))
    # On the experts' own texts, if there are any: on others, the merged model need not agree with an expert.
    best_known = {(row.expert, row.domain) for row in record.recovery}
    own_texts = [row for row in rows if (row.other, row.domain) in best_known]
    worst = max(
        own_texts or rows, key=lambda row: math.inf if math.isnan(row.fisher_rao.mean) else row.fisher_rao.mean
    )
    where = "On the experts' own texts they" if own_texts else "They"
    text = (
        f"Its predictions are {number(mean)} rad from an expert's on average (Fisher–Rao; π is nothing in common). "
        f"{where} differ most from those of {worst.other} on {worst.domain}, "
        f"by {number(worst.fisher_rao.mean)} rad, with the same first guess for {percent(worst.top1_agreement)} "
        "of the tokens."
    )
    between = [row for row in record.distances if {row.model, row.other} <= set(record.experts)]
    if not between:
        return [Verdict("fact", "How far its predictions moved", text)]
    expert_mean = float(
        np.average([row.fisher_rao.mean for row in between], weights=[row.n_tokens for row in between])
    )
    text += f" Two experts are {number(expert_mean)} rad apart."
    if mean < expert_mean:
        return [Verdict("good", "It lies between the experts", text)]
    return [Verdict("bad", "It is farther from the experts than they are from each other", text)]


def worst_token_verdict(record: EvaluationRecord) -> list[Verdict]:
    """Return at most one verdict: the token whose prediction changed most."""
    if not record.worst_tokens:
        return []
    worst = max(record.worst_tokens, key=lambda token: token.distance)
    text = (
        f"On {worst.domain} the text goes on with “{visible(worst.token, spaces=True)}”. {worst.expert} gives that "
        f"{percent(worst.expert_probability)}, the merged model {percent(worst.merged_probability)}; its guess is "
        f"“{visible(worst.merged_guess, spaces=True)}” ({number(worst.distance)} rad)."
    )
    return [Verdict("fact", "Where a prediction changed most", text)]


def layer_verdict(record: EvaluationRecord) -> list[Verdict]:
    """Return at most one verdict: the layer that lost most, if the layers were measured."""
    ratios = record.collapse()
    if not ratios:
        return []
    worst = weakest_layers(ratios, 1)[0]
    text = (
        f"Its weakest layer is {layer_name(worst.layer)}, with {percent(worst.activation_variance)} of the experts' "
        f"activation variance and {percent(worst.effective_rank)} of their effective rank."
    )
    level = graded(_kept(worst), 0.9, 0.7)
    title = {
        "good": "No layer has collapsed",
        "watch": f"Activations are poorer in layer {layer_name(worst.layer)}",
        "bad": f"Activations have collapsed in layer {layer_name(worst.layer)}",
    }
    return [Verdict(level, title[level], text)]


def repetition_verdict(record: EvaluationRecord) -> list[Verdict]:
    """Return a verdict if the merged model repeats itself clearly more than any expert."""
    top: dict[str, Headline] = {headline.name: headline for headline in headlines(record)}
    merged = top.get("repetition")
    experts = [row.repetition for row in record.generations if row.model in record.experts]
    # Greedy continuations of good models repeat themselves too, so only a clear excess counts.
    if merged is None or not experts or merged.value <= max(experts) + 0.1:
        return []
    text = (
        f"{percent(merged.value)} of the 4-grams of a continuation have occurred in it before, against at most "
        f"{percent(max(experts))} in those of the experts."
    )
    return [Verdict("bad", "It repeats itself", text)]


def weakest_layers(ratios: Sequence[CollapseRatio], count: int) -> list[CollapseRatio]:
    """Return the `count` layers that lost most, worst first."""
    return sorted(ratios, key=_kept)[:count]


def layer_name(layer: int) -> str:
    """Name a layer by its number; 0 is marked as the embedding, which most people do not count as a layer."""
    return "0 (embedding)" if layer == 0 else str(layer)


def _kept(row: CollapseRatio) -> float:
    """Return the smaller ratio of a layer; NaN counts as the worst."""
    values = (row.activation_variance, row.effective_rank)
    return min(-math.inf if math.isnan(value) else value for value in values)


def _on(row: Recovered) -> str:
    """Name the domain, unless it has the name of the expert."""
    return "" if row.domain == row.expert else f" on {row.domain}"
