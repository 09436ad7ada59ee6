"""What is said about a fit, from its record."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from hf_frmerge.merging.planning.corrections import CalibrationRecord, NeutralRecord, RefinementRecord
from hf_frmerge.wording.calibration import calibration_verdict, fitted_how

RECORD = CalibrationRecord(
    prompts=(56, 56, 0),
    held_out=(8, 8, 0),
    tokens=16_384,
    source="self",
    digest="0" * 32,
    options={"rank": 32},
    form="low_rank",
    distances={"start": (0.3, 0.5, None), "low_rank": (0.1, 0.1, None), "dense": (0.1, 0.0999, None)},
    seconds=60.0,
)


def test_a_gain_is_stated_on_held_out_prompts() -> None:
    verdict = calibration_verdict(RECORD)
    assert verdict.level == "good"
    assert verdict.text == (
        "The merge was fitted to what its experts compute on 112 prompts, which the experts wrote themselves. On 16 "
        "others the squared Fisher–Rao distance of its predictions to the experts' is 0.100 rad², where the merge "
        "without data has 0.400 rad²: the fit takes 75% of it away. It is written as factors of rank 32 for every "
        "linear layer. What each form keeps of the best one's gain: factors of rank 32 for every linear layer 100%, a "
        "number for every weight of the linear layers 100%."
    )


def test_what_a_table_of_coefficients_keeps_is_stated() -> None:
    known = {**RECORD.distances, "table": (0.2, 0.24, None), "dense": (0.0, 0.0, None)}
    text = calibration_verdict(replace(RECORD, form="table", distances=known)).text
    assert "It is written as coefficients of the experts for every row. What each form keeps" in text
    assert "for every row 45%, factors of rank 32 for every linear layer 75%, a number for every weight" in text
    harmful = {**known, "table": (0.5, 0.5, None)}
    assert "for every row 0%" in calibration_verdict(replace(RECORD, distances=harmful)).text


@pytest.mark.parametrize(("after", "level"), [(0.19, "good"), (0.3, "watch"), (0.39, "bad")])
def test_a_small_gain_is_no_good_news(after: float, level: str) -> None:
    record = replace(RECORD, form="dense", distances={**RECORD.distances, "dense": (after, after, None)})
    assert calibration_verdict(record).level == level


def test_a_fit_without_gain_says_what_was_written() -> None:
    record = replace(RECORD, form="start", distances={**RECORD.distances, "low_rank": (0.5, 0.5, None)})
    record = replace(record, distances={**record.distances, "dense": (0.4, 0.6, None)})
    verdict = calibration_verdict(record)
    assert verdict.level == "watch"
    assert (
        "0.400 rad² without the fit and 0.500 rad² with it. So what was written is the merge without it"
        in verdict.text
    )


def test_a_merge_measured_by_fisher_information_is_compared_with_the_plain_one() -> None:
    options = {"fisher": "kfac", "fisher_labels": "sampled", "weighted_tensors": 210, "plain_tensors": 62}
    distances = {"start": (0.3, 0.5, None), "table": (0.2, 0.5, None)}
    record = replace(RECORD, form="table", options=options, distances=distances)
    verdict = calibration_verdict(record)
    assert verdict.level == "watch"
    assert verdict.text == (
        "Lengths and angles of what was merged count by how much the experts' predictions depend on a layer's weights "
        "together (Kronecker factors of the Fisher information), on 112 prompts, which the experts wrote themselves; "
        "62 tensors of 272, without such information, kept plain ones. On 16 others the squared Fisher–Rao distance "
        "of its predictions to the experts' is 0.350 rad², where plain lengths and angles give 0.400 rad²."
    )
    every = calibration_verdict(replace(record, options={**options, "plain_tensors": 0})).text
    assert "the experts wrote themselves. On 16 others" in every
    worse = replace(record, distances={**distances, "table": (0.5, 0.5, None)})
    assert calibration_verdict(worse).level == "bad"
    how = fitted_how(record)
    assert how is not None and "fitted" not in how and not record.is_fitted


REFINED = replace(
    RECORD,
    distances={**RECORD.distances, "refined": (0.05, 0.1, None)},
    refinement=RefinementRecord(steps=30, loss="kl", learning_rate=3e-4, began_from="low_rank", best_step=20),
)


def test_a_refinement_is_told_from_the_fit() -> None:
    assert calibration_verdict(REFINED).text.endswith(
        "On 16 others the squared Fisher–Rao distance of its predictions to the experts' is 0.0750 rad², where the "
        "merge without data has 0.400 rad², and the fit alone 0.100 rad²: fit and refinement take 81% of it away. It "
        "is written as factors of rank 32 for every linear layer."
    )
    assert fitted_how(REFINED) == (
        "then fitted, layer by layer, to what they compute on a few prompts, and refined all layers together"
    )


def test_a_refinement_without_gain_is_said() -> None:
    record = replace(REFINED, refinement=replace(REFINED.refinement, best_step=0))
    assert (
        "is 0.100 rad², where the merge without data has 0.400 rad²: the fit takes 75% of it away. A refinement of "
        "all layers together, of 30 steps, came no closer, and was left out." in calibration_verdict(record).text
    )
    assert fitted_how(record) == "then fitted, layer by layer, to what they compute on a few prompts"
    record = replace(record, form="start", distances={**record.distances, "low_rank": (0.5, 0.5, None)})
    assert "of 30 steps, came no closer either. So what was written" in calibration_verdict(record).text
    assert fitted_how(record) is None


def test_a_refinement_of_a_fit_without_gain_stands_alone() -> None:
    record = replace(REFINED, form="dense", refinement=replace(REFINED.refinement, began_from="start"))
    assert (
        "0.400 rad²: the refinement takes 81% of it away, where the fit of single layers gained nothing. It "
        "is written as a number for every weight" in calibration_verdict(record).text
    )
    assert fitted_how(record) == "then trained to predict what they predict on a few prompts"


def test_the_start_and_text_of_no_expert_are_told_behind_the_fit() -> None:
    neutral = NeutralRecord(prompts=8, tokens=1024, distance=0.0512, nats=0.0251)
    starts = {"linear": (0.5, 0.7, None), "nre": (0.3, 0.5, None), "karcher": (0.4, 0.4, None)}
    record = replace(RECORD, starts=starts, neutral=neutral)
    verdict = calibration_verdict(record)
    assert verdict.level == calibration_verdict(RECORD).level
    assert verdict.text == (
        f"{calibration_verdict(RECORD).text} It started from nre, the nearest without data (linear 0.600, nre 0.400, "
        "karcher 0.400 rad²). On 8 prompts that the base wrote, which are no expert's, its predictions are 0.0512 "
        "rad² (0.0251 nats a token) from the base's."
    )
    assert CalibrationRecord.from_dict(json.loads(json.dumps(record.to_dict()))) == record
    assert not {"starts", "neutral"} & RECORD.to_dict().keys()


def test_a_record_is_read_back_as_it_was() -> None:
    assert CalibrationRecord.from_dict({**REFINED.to_dict(), "of a later version": 1}) == REFINED
    assert "refinement" not in RECORD.to_dict()
    assert CalibrationRecord.from_dict({**RECORD.to_dict(), "of a later version": 1}) == RECORD
