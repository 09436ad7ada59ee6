"""Methods that measure nothing: terminal, card and page say so, and claim nothing else."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click_runner import click_runner
from evaluation_records import make_record
from merge_reference import SHAPES, write_family
from safetensors.numpy import save_file

from hf_frmerge.cli.main import main
from hf_frmerge.evaluation.headlines import by_key, headlines, norm_headline
from hf_frmerge.evaluation.record import save_record

SENTENCES = {
    "ties": "Angles and lengths were not measured: a merge by TIES does not need them.",
    "given": "Angles and lengths were not measured: a merge by coefficients from a table does not need them.",
}


@pytest.fixture(scope="module", params=SENTENCES)
def merged(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp(request.param)
    base, experts = write_family(root)
    save_file({name: np.array([[0.5, 0.25, 0.125]]) for name in SHAPES}, root / "table.safetensors")
    chosen = ["--coefficients", str(root / "table.safetensors"), "--space", "deltas"]
    chosen = ["--method", "ties", "--density", "0.4"] if request.param == "ties" else chosen
    outputs = [root / "out", root / "again"]
    command = ["merge", *experts, "--base-model", base, *chosen, "--output-dir"]
    results = [click_runner().invoke(main, [*command, str(out)]) for out in outputs]
    assert [result.exit_code for result in results] == [0, 0], results[0].output
    return {
        "method": request.param,
        "sentence": SENTENCES[request.param],
        "terminal": results[0].output,
        "outputs": outputs,
    }


def words(text: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", text))


def test_terminal_card_and_page_say_so(merged: dict[str, Any]) -> None:
    out: Path = merged["outputs"][0]
    assert f"{len(SHAPES)} tensors merged" in words(merged["terminal"])
    assert merged["sentence"] in words(merged["terminal"])
    card = (out / "README.md").read_text()
    assert f"- {len(SHAPES)} tensors were merged" in card and f"- {merged['sentence']}" in card
    assert click_runner().invoke(main, ["report", str(out)]).exit_code == 0
    page = words((out / "merge_report.html").read_text())
    assert f"{len(SHAPES)} tensors merged." in page and merged["sentence"] in page
    assert "all tensors were copied" not in page
    has_table = (out / "merge_coefficients.safetensors").exists()
    assert ("merge_coefficients.safetensors" in page) == has_table
    assert ("Coefficient of each expert over its weight" in page) == has_table
    for said in (words(merged["terminal"]), card, page):
        assert "converged" not in said and "Two experts" not in said and "of the experts' length" not in said


def test_weights_are_shown_where_they_decide(merged: dict[str, Any]) -> None:
    """A table of coefficients takes their place, so card and page do not show them beside it."""
    out: Path = merged["outputs"][0]
    is_weighted = merged["method"] != "given"
    card = (out / "README.md").read_text()
    rows = [line.split(" | ") for line in card.splitlines() if line.endswith("|") and "fine-tuned model" in line]
    assert [row[1] for row in rows] == ["0.333333" if is_weighted else "–"] * 3
    assert click_runner().invoke(main, ["report", str(out)]).exit_code == 0
    assert ("(weight 0.333)" in words((out / "merge_report.html").read_text())) == is_weighted


def test_they_can_be_compared_verified_and_evaluated(merged: dict[str, Any]) -> None:
    out, again = map(str, merged["outputs"])
    diff = click_runner().invoke(main, ["diff", out, again])
    assert diff.exit_code == 0 and f"The same model, bit for bit: {len(SHAPES)} tensors." in words(diff.output)
    assert click_runner().invoke(main, ["verify", out]).exit_code == 0
    assert norm_headline(out) == []
    record = make_record()
    save_record(merged["outputs"][1], record)
    assert "norm_ratio" not in by_key([*headlines(record), *norm_headline(again)])
    assert click_runner().invoke(main, ["report", again]).exit_code == 0
    assert click_runner().invoke(main, ["card", again]).exit_code == 0
    assert merged["sentence"] in (merged["outputs"][1] / "README.md").read_text()
