"""What is said about a calibration, and about a merge that had none."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from hf_frmerge.merging.planning.corrections import mean_known, nearest_start
from hf_frmerge.wording.methods import method_of
from hf_frmerge.wording.numbers import counted, number, percent
from hf_frmerge.wording.verdicts import Verdict, graded

if TYPE_CHECKING:
    from hf_frmerge.merging.planning.corrections import CalibrationRecord

WITHOUT_DATA = (
    "No data was used. Fitted to what its experts compute on a few prompts, a merge keeps more of what they learned: "
    "--calibration self lets language models write them, --calibration EXPERT=FILE takes yours."
)
"""Hint at the end of a merge without calibration."""

_SOURCES = {
    "self": "which the experts wrote themselves",
    "self:chat": "which the experts wrote themselves, as a user of a chat would",
    "file": "from files",
    "dataset": "from datasets",
}
_FORMS = {
    "table": "coefficients of the experts for every row",
    "low_rank": "factors of rank {rank} for every linear layer",
    "dense": "a number for every weight of the linear layers",
}

_FISHER = {
    "diagonal": "how much the experts' predictions depend on each weight (diagonal Fisher information)",
    "kfac": "how much the experts' predictions depend on a layer's weights together (Kronecker factors of the Fisher "
    "information)",
}


def fitted_how(record: CalibrationRecord | None) -> str | None:
    """Return what completes "the experts were combined by ..., "; `None` if prompts had no part in the merge."""
    if record is not None and record.fisher is not None:
        return "with lengths and angles measured by how much the experts' predictions depend on what was merged"
    if record is None or not record.is_fitted:
        return None
    if record.refinement is not None and record.is_refined and record.refinement.began_from == "start":
        return "then trained to predict what they predict on a few prompts"
    fitted = "then fitted, layer by layer, to what they compute on a few prompts"
    return f"{fitted}, and refined all layers together" if record.is_refined else fitted


def calibration_verdict(record: CalibrationRecord) -> Verdict:
    """
    State what a merge was fitted to, and how close it came to its experts on prompts held out from the fit.

    How its start was chosen, and how far it is from the base on text of no expert, is said behind it.
    """
    verdict = _fit(record)
    return replace(verdict, text=" ".join([verdict.text, *_start(record), *_neutral(record)]))


def _start(record: CalibrationRecord) -> list[str]:
    if record.starts is None:
        return []
    of_starts = ", ".join(f"{label} {number(mean_known(row))}" for label, row in record.starts.items())
    return [f"It started from {nearest_start(record.starts)}, the nearest without data ({of_starts} rad²)."]


def _neutral(record: CalibrationRecord) -> list[str]:
    if record.neutral is None:
        return []
    prompts, distance, nats = record.neutral.prompts, record.neutral.distance, record.neutral.nats
    return [
        f"On {prompts} prompts that the base wrote, which are no expert's, its predictions are {number(distance)} "
        f"rad² ({number(nats)} nats a token) from the base's."
    ]


def _fit(record: CalibrationRecord) -> Verdict:
    prompts = f"{sum(record.prompts):,} prompts, {_SOURCES.get(record.source, 'of another origin')}"
    others = f"{sum(record.held_out):,} others"
    outputs, distance = ("predictions", "squared Fisher–Rao distance")
    if not record.is_judged_by_predictions:
        outputs, distance = ("hidden states", "squared angle")
    before, after = record.mean_distance("start"), record.mean_distance(record.written)
    if record.fisher is not None:
        plain, weighted = (record.options[f"{kind}_tensors"] for kind in ("plain", "weighted"))
        rest = f"; {counted(plain, 'tensor')} of {plain + weighted:,}, without such information, kept plain ones"
        return Verdict(
            graded((before - after) / before if before else 0.0, 0.25, 0.0),
            "Measured by Fisher information",
            f"Lengths and angles of what was merged count by {_FISHER[record.fisher]}, on {prompts}"
            f"{rest if plain else ''}. On {others} the {distance} of its {outputs} to the experts' is {number(after)} "
            f"rad², where plain lengths and angles give {number(before)} rad².",
        )
    if record.method is not None:
        gain = (before - after) / before if before else 0.0
        return Verdict(
            graded(gain, 0.25, 0.0),
            "Compared with a plain average",
            f"The experts were combined by {method_of(record.method).title}, judging by what they do on {prompts}. On "
            f"{others} the {distance} of the merge's {outputs} to theirs is {number(after)} rad², where a plain "
            f"average of their weights has {number(before)} rad².",
        )
    if not record.is_fitted:
        best = min(record.mean_distance(form) for form in record.distances if form not in ("start", "refined"))
        neither = f" {_refinement(record)} came no closer either." if record.refinement is not None else ""
        return Verdict(
            "watch",
            "Fitted to the experts, without gain",
            f"The merge was fitted to {prompts}, but on {others} its {outputs} came no closer to the experts': their "
            f"{distance} is {number(before)} rad² without the fit and {number(best)} rad² with it.{neither} So "
            "what was written is the merge without it. More prompts, or prompts that are closer to what the experts "
            "were trained on, may help.",
        )
    gain = (before - after) / before
    return Verdict(
        graded(gain, 0.5, 0.1),
        "Fitted to the experts",
        f"The merge was fitted to what its experts compute on {prompts}. On {others} the {distance} of its {outputs} "
        f"to the experts' is {number(after)} rad², where the merge without data has {number(before)} rad²"
        f"{_parts(record, gain)} {_forms(record)}",
    )


def _forms(record: CalibrationRecord) -> str:
    """Say in which form the fit is written, and what each form keeps of the gain."""
    names = {form: name.format(rank=record.options["rank"]) for form, name in _FORMS.items()}
    written = f"It is written as {names[record.form]}"
    if record.is_refined:  # another step than those that the forms are of
        return f"{written}."
    start = record.mean_distance("start")
    gains = {form: start - record.mean_distance(form) for form in names if form in record.distances}
    kept = [f"{names[form]} {percent(max(gain / max(gains.values()), 0.0))}" for form, gain in gains.items()]
    return f"{written}. What each form keeps of the best one's gain: {', '.join(kept)}."


def _parts(record: CalibrationRecord, gain: float) -> str:
    """Say what of the gain is the fit's, and what the refinement's."""
    if record.refinement is None:
        return f": the fit takes {percent(gain)} of it away."
    if not record.is_refined:
        return f": the fit takes {percent(gain)} of it away. {_refinement(record)} came no closer, and was left out."
    if record.refinement.began_from == "start":
        return f": the refinement takes {percent(gain)} of it away, where the fit of single layers gained nothing."
    fit = record.mean_distance(record.refinement.began_from)
    return f", and the fit alone {number(fit)} rad²: fit and refinement take {percent(gain)} of it away."


def _refinement(record: CalibrationRecord) -> str:
    assert record.refinement is not None
    return f"A refinement of all layers together, of {counted(record.refinement.steps, 'step')},"
