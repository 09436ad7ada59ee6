"""Prompts of experts as users name them."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_frmerge.errors import ArgumentError
from hf_frmerge.merging.arguments.calibration import SELF, SELF_CHAT, parse_calibration
from hf_frmerge.merging.arguments.expert_arguments import ExpertArguments

EXPERTS = ["org/math", "org/math=2", "./code/"]


@pytest.mark.parametrize(
    ("items", "expected"),
    [
        (["all.jsonl"], "all.jsonl"),
        (["self"], SELF),
        (["self:chat"], SELF_CHAT),
        (["org/math=math.jsonl"], {"org/math": "math.jsonl"}),
        (["./code/=c.txt", "org/math=m.txt"], {"./code/": "c.txt", "org/math": "m.txt"}),
        (["org/math=2=m.txt"], {"org/math=2": "m.txt"}),  # the longer name of an expert
        (["org/math=lr=1/m.txt"], {"org/math": "lr=1/m.txt"}),
    ],
)
def test_items_name_experts_and_files(items: list[str], expected: object) -> None:
    assert parse_calibration(items, EXPERTS) == expected
    assert ExpertArguments(EXPERTS, calibration=items).calibration_dataset == expected


def test_a_mapping_is_the_same_as_its_items() -> None:
    by_expert = {"./code/": "c.txt", "org/math": "m.txt"}
    assert ExpertArguments(EXPERTS, calibration=by_expert).calibration_dataset == by_expert  # type: ignore[arg-type]
    assert ExpertArguments(EXPERTS, calibration="self").calibration_dataset == SELF  # type: ignore[arg-type]
    assert ExpertArguments(EXPERTS).calibration_dataset is None


def test_the_name_of_a_file_may_hold_an_equals_sign(tmp_path: Path) -> None:
    file = tmp_path / "lr=1.txt"
    with pytest.raises(ArgumentError, match="none of the experts"):
        parse_calibration([str(file)], EXPERTS)
    file.touch()
    assert parse_calibration([str(file)], EXPERTS) == str(file)


@pytest.mark.parametrize(
    ("items", "sentence"),
    [
        (["org/maths=m.txt"], r"names 'org/maths', which is none of the experts .*Did you mean 'org/math'\?"),
        (["code=c.txt"], r"'org/math', 'org/math=2', './code/'\. Write an expert exactly as in the list"),
        (["org/math=a.txt", "org/math=b.txt"], "two files for 'org/math', 'a.txt' and 'b.txt'"),
        (["all.txt", "org/math=m.txt"], "'all.txt', which is for all experts, beside 1 more"),
        (["org/math=m.txt", "self"], "'self', which is for all experts, beside 1 more"),
        (["a.txt", "b.txt", "c.txt"], "'a.txt', which is for all experts, beside 2 more"),
    ],
)
def test_what_contradicts_itself_is_refused_with_the_remedy(items: list[str], sentence: str) -> None:
    with pytest.raises(ArgumentError, match=sentence):
        ExpertArguments(EXPERTS, calibration=items)
