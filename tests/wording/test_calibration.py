"""What is said about a fit, from its record."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hf_frmerge.merging.planning.corrections import CalibrationRecord
from hf_frmerge.wording.calibration import calibration_verdict

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
        "without data has 0.400 rad²: the fit takes 75% of it away. The correction is factors of rank 32 for every "
        "linear layer."
    )


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


def test_a_record_is_read_back_as_it_was() -> None:
    assert CalibrationRecord.from_dict({**RECORD.to_dict(), "of a later version": 1}) == RECORD
