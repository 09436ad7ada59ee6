"""Patterns of adapters: those that people write are taken, those that take for ever are refused."""

from __future__ import annotations

import re
import time

import pytest

from hf_frmerge.checkpoints.adapters.patterns import check_pattern
from hf_frmerge.errors import CheckpointError


@pytest.mark.parametrize(
    "pattern",
    [
        "q_proj",
        r"^model\.layers\.0\.self_attn\.q_proj",
        r".*layers\.(0|1|2|3)\..*(q|k|v)_proj",
        r"layers\.\d+\.mlp\.experts\.\d+\.(?:up|down)_proj",
        "|".join(f"layers.{index}.q_proj" for index in range(100)),
        r"[a-z*+?(]+\.\*",
    ],
)
def test_patterns_of_people_are_taken_and_fast(pattern):
    check_pattern(pattern, "rank_pattern", "x")
    start = time.process_time()
    for layer in range(100):
        re.match(rf"(.*\.)?({pattern})$", f"model.layers.{layer}.self_attn.some_long_name_of_a_module.v_projection")
    assert time.process_time() - start < 1


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+$",
        "(a|a)*b",
        "(?:a*)*b",
        "(a?){40}a{40}",
        ".*" * 20 + "x",
        "a?" * 30 + "a" * 30,
        "(a|a)" * 40,
        "(?P<n>a+)+",
        "x" * 20_000,
    ],
)
def test_patterns_that_take_for_ever_are_refused(pattern):
    with pytest.raises(CheckpointError, match="could take for ever"):
        check_pattern(pattern, "rank_pattern", "x")


@pytest.mark.parametrize("pattern", ["(", "[", "*", "a{99999999999999999999}", "(?P<1>a)"])
def test_what_is_no_pattern_is_refused(pattern):
    with pytest.raises(CheckpointError, match="no regular expression"):
        check_pattern(pattern, "alpha_pattern", "x")
