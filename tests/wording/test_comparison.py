"""Sentences about a comparison."""

from __future__ import annotations

from dataclasses import replace

from comparison_records import make_comparison

from hf_frmerge.wording.comparison import command_heading


def test_the_heading_of_the_command_says_what_it_makes() -> None:
    record = make_comparison()
    assert command_heading(record) == "The command that makes the best merge"
    ready = replace(record.best, label="theirs (as it is)", model="../theirs", seconds=None, n_prompts=0, scale=None)
    assert command_heading(replace(record, methods=[ready, *record.methods[1:]])) == (
        "The best is there already: ../theirs. The command that makes nre × 1, the next"
    )
    assert command_heading(replace(record, methods=[*record.methods, ready])) == command_heading(record)
