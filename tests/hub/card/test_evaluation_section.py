"""Tables and sentences of the card against the numbers of the record, and text that would like to be markup."""

from __future__ import annotations

import html
import math
import re
from dataclasses import replace

import pytest
from evaluation_records import make_record
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from hf_frmerge.evaluation.record import EvaluationRecord, Score, WorstToken
from hf_frmerge.hub.card.evaluation_section import evaluation_section
from hf_frmerge.hub.card.markdown import MarkdownTable, bold, escape
from hf_frmerge.hub.card.metric_tables import metric_tables
from hf_frmerge.hub.card.model_index import model_index


def cells(table: MarkdownTable | None) -> list[list[str]]:
    """What a reader sees, cell by cell, after the Markdown was rendered."""
    assert table is not None
    page = MarkdownIt("commonmark").enable("table").render(str(table))
    rows = re.findall(r"<tr>(.*?)</tr>", page, re.DOTALL)
    return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL) for row in rows]


def perplexities(merged: tuple[float, float]) -> list[Score]:
    rows = {"a": (10.0, 20.0), "b": (30.0, 12.0), "merged": merged}
    return [Score(m, d, {"perplexity": v, "loss": 1}) for m, pair in rows.items() for d, v in zip("xy", pair)]


def test_the_best_of_a_column_is_bold() -> None:
    (table,) = metric_tables(perplexities((11.0, 15.0)))
    assert cells(table.table) == [
        ["", "x", "y"],
        ["a", "<strong>10.00</strong>", "20.00"],
        ["b", "30.00", "<strong>12.00</strong>"],
        ["<strong>this model</strong>", "11.00", "15.00"],
    ]


def test_standard_errors_stand_beside_what_they_are_of() -> None:
    scores = [Score("merged", "quiz", {"acc": 0.75, "acc_stderr": 0.0217, "mood": 2.0, "mood_stderr": math.nan})]
    accuracy, mood = metric_tables(scores)
    assert (accuracy.metric.title, cells(accuracy.table)[1][1]) == ("Accuracy", "0.750 ± 0.022")
    assert (mood.metric.title, cells(mood.table)[1][1]) == ("Mood", "2.000")
    (index,) = model_index(EvaluationRecord(scores=scores), "m", None)
    first, second = (score for result in index["results"] for score in result["metrics"])
    assert (first["type"], first["value"], second["type"]) == ("accuracy", 0.75, "mood")


def test_every_part_shows_the_record() -> None:
    record = make_record()
    actual = evaluation_section(record)
    how = "in bfloat16, in blocks of 256 tokens"
    assert actual.measured_on == f"Measured on 2,000 tokens (math 1,000, code 1,000), {how}."
    assert actual.summary is not None and "70% of what expert-math gained on math" in actual.summary
    assert cells(actual.recovery)[1:] == [
        ["expert-math", "math", "1.000", "0.700", "<strong>70%</strong>"],
        ["expert-code", "code", "1.000", "0.500", "<strong>50%</strong>"],
    ]
    assert cells(actual.distances) == [
        ["Text", "to expert-math", "to expert-code", "between experts"],
        ["math", "0.300 (80%)", "0.500 (80%)", "0.900"],
        ["code", "0.300 (80%)", "0.500 (80%)", "0.900"],
    ]
    assert actual.distance_note is not None and "0.004 rad" in actual.distance_note and "128" in actual.distance_note
    assert cells(actual.objectives)[1] == ["math", "0.2500", "0.2000", "0.200"]
    layers = cells(actual.layers)
    assert layers[-2] == ["4", "60.0%", "60.0%"]
    assert layers[-1] == ["mean of all 7", "94.3%", "94.3%"]  # (6 + 0.6) / 7
    assert len(layers) == 1 + 3 + 1
    (prompt, table), *_ = actual.generations
    assert prompt == "2 + 2" and cells(table)[-1][0] == "<strong>this model</strong>"
    assert any("layer is 4, with 60% of" in line for line in actual.verdicts)
    assert any("those of expert-code on code, by 0.500 rad" in line for line in actual.verdicts)
    worst = cells(actual.worst_tokens)
    text = "…0 &lt;b&gt;times&lt;/b&gt; | two is <b>four</b>"
    assert worst[1] == [text, "expert-math", "four (90%)", "4 (5%)", "2.90"]
    assert [row[-1] for row in worst[1:]] == ["2.90", "2.90", "2.80", "2.80", "2.70"]


@pytest.mark.parametrize(("n_tokens", "is_said"), [(576, True), (577, False), (None, False)])
def test_effective_ranks_of_too_few_tokens_are_called_so(n_tokens: int | None, is_said: bool) -> None:
    record = make_record(settings={"n_tokens": n_tokens, "n_features": 576})
    note = evaluation_section(record).layer_note
    assert (note is not None and "576 tokens are too few" in note) is is_said


def test_what_was_not_measured_is_not_spoken_of() -> None:
    actual = evaluation_section(EvaluationRecord(scores=[Score("merged", "x", {"accuracy": 0.5}, n_samples=8)]))
    assert actual.measured_on == "Measured on 8 samples (x)."
    auto = EvaluationRecord(scores=[Score("merged", "x", {}, n_tokens=9)], settings={"dtype": "auto"})
    assert evaluation_section(auto).measured_on == "Measured on 9 tokens (x)."
    auto.scores.append(Score("merged", "quiz", {"acc": 0.5}, n_samples=3))  # of a harness
    assert evaluation_section(auto).measured_on == "Measured on 9 tokens (x) and 3 samples (quiz)."
    parts = (actual.recovery, actual.distances, actual.objectives, actual.layers, actual.worst_tokens, actual.summary)
    assert parts == (None,) * 6 and actual.generations == actual.verdicts == []


def test_numbers_that_are_none_after_json() -> None:
    record = make_record()
    record.scores[0] = replace(record.scores[0], metrics={"loss": math.nan, "perplexity": math.inf})
    record.distances[0] = replace(record.distances[0], mean_squared=math.nan)
    record.layers[-1] = replace(record.layers[-1], effective_rank=math.nan)
    actual = evaluation_section(EvaluationRecord.from_dict(record.to_dict()))
    assert cells(actual.metrics[0].table)[1] == ["base", "–", "12.18"]


HOSTILE = [
    "<img src=x onerror=alert(1)>",
    "[click](javascript:alert(1))",
    "a | b | c",
    "`code` **bold** _it_ ~~gone~~ # head",
    "www.example.com http://example.com a@b.example",
    "&lt;b&gt; \\| \\",
    "line\nbreak\ttab\r\n",
    "$x^2$ \\(y\\) @ann #1 :smile: {{ x }} {% y %}",
    "\u202eright to left",
    "full\u3000width",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_text_from_data_is_shown_as_it_is(text: str) -> None:
    marks = {"\n": "⏎", "\r": "␍", "\t": "⇥", "\u202e": "⟨U+202E⟩", "\u3000": " "}
    shown = "".join(marks.get(char, char) for char in text)
    row = cells(MarkdownTable(("a", "b"), ((escape(text), "1"),)))[1]
    assert [html.unescape(part) for part in row] == [shown, "1"]
    assert "<" not in row[0]
    assert "<a " not in MarkdownIt("gfm-like", {"linkify": False}).render(escape(text))


@settings(deadline=None, max_examples=200)
@given(st.text(alphabet=[*map(chr, range(32, 127)), "é", "漢", "\u200c"], min_size=1).filter(str.strip))
def test_any_text_is_shown_as_it_is(text: str) -> None:
    row = cells(MarkdownTable(("a", "b"), ((escape(text), "1"),)))[1]
    assert [html.unescape(shown).strip() for shown in row] == [text.strip(), "1"]


def test_bold_keeps_spaces_outside_and_long_text_is_cut() -> None:
    assert bold(" four") == " <b>four</b>" and bold("  ") == "  " and bold("x") == "<b>x</b>"
    assert escape("abcdef", 3) == "abc…" and escape("abc", 3) == "abc"


def test_a_token_that_is_only_white_space_is_named() -> None:
    token = WorstToken("e", "x", "a", "\n", 1.0, "\n", "", 0.5, 0.25)
    (row,) = cells(evaluation_section(EvaluationRecord(worst_tokens=[token])).worst_tokens)[1:]
    assert row[0] == "…a<b>⏎</b>" and row[2:4] == ["white space (50%)", "nothing (25%)"]
