"""Verdicts at the top of a report: what was merged, what is kept, and where the result is weak."""

from __future__ import annotations

from hf_frmerge.report.facts import MergeFacts
from hf_frmerge.wording.calibration import calibration_verdict, fitted_how
from hf_frmerge.wording.evaluation import N_NAMED, evaluation_verdicts
from hf_frmerge.wording.geometry import geometry_verdicts
from hf_frmerge.wording.methods import BLOCKS, POINTS, method_of
from hf_frmerge.wording.numbers import counted, listed
from hf_frmerge.wording.verdicts import Verdict


def verdicts(facts: MergeFacts) -> list[Verdict]:
    """Return the verdicts on a merge: what was merged, the evaluation, the fit to the experts, the geometry."""
    measured = evaluation_verdicts(facts.record) if facts.record is not None else []
    calibration = facts.manifest.calibration
    fitted = [calibration_verdict(calibration)] if calibration is not None else []
    return [_what_was_merged(facts), *measured, *fitted, *geometry_verdicts(facts.totals)]


def _what_was_merged(facts: MergeFacts) -> Verdict:
    """State models, weights, method and number of tensors."""
    manifest = facts.manifest
    kinds = {expert.kind for expert in manifest.experts}
    kind = {"full": "fine-tuned models", "adapter": "LoRA adapters"}[kinds.pop()] if len(kinds) == 1 else "models"
    block, points = BLOCKS[manifest.arguments["block"]], POINTS[manifest.space]
    copied = len(facts.tensors) - len(facts.merged_tensors)
    how = fitted_how(manifest.calibration)
    fitted = f", {how}" if how is not None else ""
    counts = f"{counted(len(facts.merged_tensors), 'tensor')} merged" + (f", {copied:,} copied" if copied else "")
    return Verdict(
        "fact",
        "What was merged",
        f"{len(facts.experts)} {kind}{_named(facts)}, by {method_of(manifest.method).title} of their {points}, "
        f"{block} at a time{fitted}. {counts}.",
    )


def _named(facts: MergeFacts) -> str:
    """Name the experts, if they are few, and their weights, if these decided anything."""
    weights, few = facts.manifest.weights, len(facts.experts) <= N_NAMED
    if not facts.manifest.is_weighted:
        return f", {listed(facts.experts)}" if few else ""
    if few:
        names = [f"{name} (weight {weight:.3g})" for name, weight in zip(facts.experts, weights)]
        return f", {listed(names)}"
    if min(weights) == max(weights):
        return f", of weight {weights[0]:.3g} each"
    return f", with weights of {min(weights):.3g} to {max(weights):.3g}"
