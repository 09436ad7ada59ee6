"""Sentences at the top of a report: what was merged, what is kept, where it is weak."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from hf_frmerge.evaluation.headlines import Headline, headlines
from hf_frmerge.evaluation.record import MERGED, EvaluationRecord, Recovered
from hf_frmerge.evaluation.weakest import weakest_domain
from hf_frmerge.merging.summary import ROUNDING_ANGLE, is_below_rounding
from hf_frmerge.report.facts import MergeFacts
from hf_frmerge.report.words import listed, number, percent, visible

Level = Literal["good", "watch", "bad", "fact"]

_METHODS = {
    "karcher": "the weighted Karcher mean",
    "slerp": "spherical interpolation",
    "linear": "a plain weighted average",
    "nre": "a norm-rescaled average",
    "task_arithmetic": "task arithmetic",
}
_BLOCKS = {"tensor": "tensor by tensor", "row": "row by row", "head": "head by head", "layer": "layer by layer"}
_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
_NAMED = 4  # names a sentence can carry


@dataclass(frozen=True)
class Verdict:
    """One finding: how it is to be taken, a few words, and the sentence."""

    level: Level
    title: str
    text: str


def verdicts(facts: MergeFacts) -> list[Verdict]:
    """Return what there is to say about a merge, what was merged first and the fine print of the geometry last."""
    found = [_what(facts)]
    if facts.record is not None:
        top = {headline.name: headline for headline in headlines(facts.record)}
        for part in (_recovery, _weakest_domain, _distance, _worst_token):
            found += part(facts.record)
        found += _layers(top) + _repetition(top, facts.record)
    if facts.merged_tensors:
        found += [*_norms(facts), *_rounding(facts), *_convergence(facts)]
    return found


def _level(value: float, good: float, poor: float) -> Level:
    return "good" if value >= good else "watch" if value >= poor else "bad"


def _what(facts: MergeFacts) -> Verdict:
    manifest = facts.manifest
    kinds = {expert["kind"] for expert in manifest["experts"]}
    kind = {"full": "fine-tuned models", "adapter": "LoRA adapters"}[kinds.pop()] if len(kinds) == 1 else "models"
    weights = [expert["weight"] for expert in manifest["experts"]]
    if len(weights) <= _NAMED:
        names = listed([f"{name} (weight {weight:.3g})" for name, weight in zip(facts.experts, weights)])
    else:
        names = f"with weights of {min(weights):.3g} to {max(weights):.3g}"
        names = f"of weight {weights[0]:.3g} each" if min(weights) == max(weights) else names
    block = _BLOCKS.get(manifest["arguments"]["block"], "as one block")
    method = _METHODS.get(manifest["method"], manifest["method"].replace("_", " "))
    what = "their differences to the base" if manifest["space"] == "deltas" else "the weights themselves"
    copied = len(facts.tensors) - len(facts.merged_tensors)
    counts = f"{len(facts.merged_tensors):,} tensors were merged" + (f", {copied:,} copied" if copied else "")
    return Verdict(
        "fact",
        "What was merged",
        f"{len(weights)} {kind}, {names}, by {method} of {what}, {block}. {counts}.",
    )


def _recovery(record: EvaluationRecord) -> list[Verdict]:
    rows = [row for row in record.recovery if row.model == MERGED and row.share is not None]
    if not rows:
        hopeless = list(dict.fromkeys(row.expert for row in record.recovery if row.model == MERGED))
        text = f"On the text of its own, none is better than the base: {listed(hopeless)}." if hopeless else ""
        return [Verdict("watch", "The experts gained nothing to keep", text)] if hopeless else []
    shares = {row.expert: float(row.share) for row in rows if row.share is not None}
    weakest, best = min(shares, key=shares.__getitem__), max(shares, key=shares.__getitem__)
    if len(rows) <= _NAMED:
        text = listed([f"{percent(row.share)} of what {row.expert} gained{_on(row)}" for row in rows])
    else:
        text = f"{percent(shares[weakest])} ({weakest}) to {percent(shares[best])} ({best}) of what each expert gained"
    level = _level(shares[weakest], 0.8, 0.5)
    title = {"good": "It keeps what the experts can do", "watch": "It keeps much of what the experts can do"}
    return [
        Verdict(level, title.get(level, "It loses much of what an expert can do"), f"It keeps {text} over the base.")
    ]


def _on(row: Recovered) -> str:
    return "" if row.domain == row.expert else f" on {row.domain}"


def _weakest_domain(record: EvaluationRecord) -> list[Verdict]:
    """Where the merged model is farthest behind the best other model."""
    weak = weakest_domain(record.scores)
    if weak is None:
        return []
    numbers = f"{weak.metric.replace('_', ' ')} {number(weak.merged)} against {number(weak.best)} for {weak.model}"
    if weak.gap <= 0:
        text = f"It is behind no other model on any domain. Closest is {weak.domain}: {numbers}."
        return [Verdict("good", "Its weakest domain is no weakness", text)]
    far = 0.5 if weak.metric in ("loss", "perplexity") else 0.1
    text = f"There it is farthest behind the best other model: {numbers}."
    return [Verdict("bad" if weak.gap > far else "watch", f"Weakest on {weak.domain}", text)]


def _distance(record: EvaluationRecord) -> list[Verdict]:
    rows = [row for row in record.distances if row.model == MERGED and row.other in record.experts]
    if not rows:
        return []
    mean = float(np.average([row.fisher_rao.mean for row in rows], weights=[row.n_tokens for row in rows]))
    far, unlike = max(rows, key=lambda row: row.fisher_rao.mean), min(rows, key=lambda row: row.top1_agreement)
    text = (
        f"Its predictions are {number(mean)} rad from an expert's on average (Fisher–Rao; π is nothing in common), at "
        f"most {number(far.fisher_rao.mean)}, from {far.other} on {far.domain}. Its first guess is the expert's on "
        f"{percent(unlike.top1_agreement)} of the tokens or more."
    )
    between = [row for row in record.distances if {row.model, row.other} <= set(record.experts)]
    if not between:
        return [Verdict("fact", "How far its predictions moved", text)]
    apart = float(np.average([row.fisher_rao.mean for row in between], weights=[row.n_tokens for row in between]))
    text += f" Two experts are {number(apart)} rad apart."
    if mean < apart:
        return [Verdict("good", "It lies between the experts", text)]
    return [Verdict("bad", "It is farther from the experts than they are from each other", text)]


def _worst_token(record: EvaluationRecord) -> list[Verdict]:
    if not record.worst_tokens:
        return []
    worst = max(record.worst_tokens, key=lambda token: token.distance)
    text = (
        f"On {worst.domain} the text goes on with “{visible(worst.token, spaces=True)}”. {worst.expert} gives that "
        f"{percent(worst.expert_probability)}, the merged model {percent(worst.merged_probability)}; its guess is "
        f"“{visible(worst.merged_guess, spaces=True)}” ({number(worst.distance)} rad)."
    )
    return [Verdict("fact", "Where a prediction changed most", text)]


def _layers(top: dict[str, Headline]) -> list[Verdict]:
    rank, variance = top.get("effective_rank"), top.get("activation_variance")
    if rank is None or variance is None or not math.isfinite(rank.value):
        return []
    level = _level(rank.value, 0.9, 0.7)
    text = (
        f"Effective rank of the activations is at least {number(rank.value)} of the experts' mean ({rank.place}), "
        f"their variance at least {number(variance.value)} ({variance.place})."
    )
    title = {
        "good": "No layer has collapsed",
        "watch": f"Activations are poorer in {rank.place}",
        "bad": f"Activations have collapsed in {rank.place}",
    }
    return [Verdict(level, title[level], text)]


def _repetition(top: dict[str, Headline], record: EvaluationRecord) -> list[Verdict]:
    merged = top.get("repetition")
    experts = [row.repetition for row in record.generations if row.model in record.experts]
    if merged is None or not experts or merged.value <= max(experts) + 0.1:
        return []
    text = (
        f"{percent(merged.value)} of the 4-grams of a continuation have occurred in it before, against at most "
        f"{percent(max(experts))} in those of the experts."
    )
    return [Verdict("bad", "It repeats itself", text)]


def _norms(facts: MergeFacts) -> list[Verdict]:
    angles, kept, linear = (facts.geometry(name) for name in ("max_angle", "norm_ratio", "linear_norm_ratio"))
    points = "differences to the base" if facts.manifest["space"] == "deltas" else "weights"
    text = (
        f"The experts' {points} are {number(float(np.median(angles)))} rad apart in the median tensor, at most "
        f"{number(float(angles.max()))}. A plain average would have kept at least "
        f"{number(100 * float(linear.min()), 4)} % of their length; this merge keeps at least "
        f"{number(100 * float(kept.min()), 4)} %."
    )
    return [Verdict("fact", "Angles and lengths", text)]


def _rounding(facts: MergeFacts) -> list[Verdict]:
    """Whether the method can matter at all, against the simplest one that keeps norms."""
    method, space = facts.manifest["method"], facts.manifest["space"]
    gap = float(np.nanmax(facts.geometry("gap_to_nre")))
    dtype = facts.manifest["tensors"][facts.merged_tensors[0].name]["dtype"]
    if method not in ("karcher", "slerp"):
        return []
    text = f"It is at most {number(gap)} rad from the norm-rescaled average in any block"
    if is_below_rounding(gap, space, dtype):
        rounding = f"rounding to {_DTYPES[dtype]} ({number(ROUNDING_ANGLE[dtype])} rad)"
        return [Verdict("fact", "The method makes no difference here", f"{text}: less than {rounding}.")]
    text += ". Whether that is for the better, only an evaluation of both can tell."
    return [Verdict("fact", "The method makes a difference", text)]


def _convergence(facts: MergeFacts) -> list[Verdict]:
    blocks = sum(len(tensor.geometry["unconverged"]) for tensor in facts.merged_tensors if tensor.geometry)
    ambiguous = int(np.nansum(facts.geometry("n_ambiguous")))
    residual, steps = float(np.nanmax(facts.geometry("residual"))), int(np.nanmax(facts.geometry("n_iter")))
    found = []
    if blocks:
        text = (
            f"In {blocks:,} blocks the mean is not exact (up to {number(residual)} rad). Merge again with more steps."
        )
        found.append(Verdict("bad", "The iteration did not converge everywhere", text))
    elif facts.manifest["method"] == "karcher":
        when = f"after at most {steps} steps" if steps else "at the first guess"
        text = f"In every block, {when}; {number(residual)} rad are left at most."
        found.append(Verdict("good", "The mean converged", text))
    if ambiguous:
        text = f"In {ambiguous:,} blocks the experts cancel out; the plain average was taken there."
        found.append(Verdict("watch", "No direction to prefer", text))
    return found
