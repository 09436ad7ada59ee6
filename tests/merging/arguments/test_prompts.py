"""What asks for prompts, or for a fit, says so before any model is looked for."""

from __future__ import annotations

import pytest

from hf_frmerge import FisherRaoMerger, MergingArguments
from hf_frmerge.errors import ArgumentError, CheckpointError

EXPERTS = ["./nowhere-a", "./nowhere-b"]


def merge(calibration: str | None = None, **options: object) -> None:
    FisherRaoMerger(EXPERTS, MergingArguments(output_dir="unused", **options), calibration_dataset=calibration).merge()


def test_a_refinement_needs_a_fit() -> None:
    with pytest.raises(ArgumentError, match=r"refine_steps \(--refine\) refines a merge that is fitted"):
        merge(refine_steps=2)
    for advice in ({"calibration": "self", "refine_steps": 2}, {}):
        with pytest.raises(CheckpointError, match="nowhere-a"):  # on to the models
            merge(**advice)


@pytest.mark.parametrize("method", ["regmean", "regmean++", "fisher"])
def test_what_a_method_computes_from_prompts_is_not_refined(method: str) -> None:
    with pytest.raises(ArgumentError, match=r"computes a merge of its own from the prompts\. Leave out one of them"):
        merge("self", method=method, refine_steps=2)
    for advice in ({"method": method}, {"refine_steps": 2}):
        with pytest.raises(CheckpointError, match="nowhere-a"):
            merge("self", **advice)
