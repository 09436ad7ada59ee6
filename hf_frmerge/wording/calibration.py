"""What is said about a calibration, and about a merge that had none."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_frmerge.wording.methods import method_of
from hf_frmerge.wording.numbers import number, percent
from hf_frmerge.wording.verdicts import Verdict, graded

if TYPE_CHECKING:
    from hf_frmerge.merging.planning.corrections import CalibrationRecord

WITHOUT_DATA = (
    "No data was used. Fitted to what its experts compute on a few prompts, a merge keeps more of what they learned: "
    "--calibration self lets language models write them, --calibration EXPERT=FILE takes yours."
)
"""Hint at the end of a merge without calibration."""

FITTED = "then fitted, layer by layer, to what they compute on a few prompts"
"""Completes "the experts were combined by ..."."""

_SOURCES = {"self": "which the experts wrote themselves", "file": "from files", "dataset": "from datasets"}
_FORMS = {
    "low_rank": "factors of rank {rank} for every linear layer",
    "dense": "a number for every weight of the linear layers",
}


def calibration_verdict(record: CalibrationRecord) -> Verdict:
    """State what a merge was fitted to, and how close it came to its experts on prompts held out from the fit."""
    prompts = f"{sum(record.prompts):,} prompts, {_SOURCES.get(record.source, 'of another origin')}"
    others = f"{sum(record.held_out):,} others"
    outputs, distance = ("predictions", "squared Fisher–Rao distance")
    if not record.is_judged_by_predictions:
        outputs, distance = ("hidden states", "squared angle")
    before, after = record.mean_distance("start"), record.mean_distance(record.form)
    if record.method is not None:
        gain = (before - after) / before if before else 0.0
        return Verdict(
            graded(gain, 0.25, 0.0),
            "Compared with a plain average",
            f"The experts were combined by {method_of(record.method).title}, judging by what they do on {prompts}. On "
            f"{others} the {distance} of the merge's {outputs} to theirs is {number(after)} rad², where a plain "
            f"average of their weights has {number(before)} rad².",
        )
    if not record.is_corrected:
        best = min(record.mean_distance(form) for form in record.distances if form != "start")
        return Verdict(
            "watch",
            "Fitted to the experts, without gain",
            f"The merge was fitted to {prompts}, but on {others} its {outputs} came no closer to the experts': their "
            f"{distance} is {number(before)} rad² without the fit and {number(best)} rad² with it. So what was "
            "written is the merge without it. More prompts, or prompts that are closer to what the experts were "
            "trained on, may help.",
        )
    gain = (before - after) / before
    return Verdict(
        graded(gain, 0.5, 0.1),
        "Fitted to the experts",
        f"The merge was fitted to what its experts compute on {prompts}. On {others} the {distance} of its {outputs} "
        f"to the experts' is {number(after)} rad², where the merge without data has {number(before)} rad²: the fit "
        f"takes {percent(gain)} of it away. The correction is "
        f"{_FORMS[record.form].format(rank=record.options['rank'])}.",
    )
