"""`frmerge compare` and what it prints; the command it ends with makes the merge of the table's first row."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from comparison_family import Family

from hf_frmerge.comparison.texts import split_texts
from hf_frmerge.evaluation.comparison_record import COMPARISON_FILE
from hf_frmerge.evaluation.models.merged import tokenizer_of

Run = Callable[..., Result]


@pytest.fixture
def compared(family: Family, frmerge: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Result:
    monkeypatch.chdir(tmp_path)
    return frmerge(*command(family))


def command(family: Family) -> list[str]:
    data = [word for name, file in family.files.items() for word in ("--data", f"{name}={file}")]
    tried = ["--method", "linear", "--method", "nre", "--method", "ties,density=0.5", "--scales", "0.7,1,1.4"]
    return ["compare", *family.experts, "--base-model", family.base, *data, *tried, "--max-tokens", "0"]


def test_the_command_at_the_end_makes_the_merge_of_the_first_row(
    compared: Result, family: Family, frmerge: Run, tmp_path: Path
) -> None:
    assert compared.exit_code == 0, compared.output
    last = compared.stdout.strip().splitlines()[-1]
    program, *arguments = shlex.split(last)
    assert program == "frmerge" and frmerge(*arguments).exit_code == 0
    best = json.loads((tmp_path / "comparison" / COMPARISON_FILE).read_text())["methods"][0]
    data = []
    for name, file in family.files.items():
        text = Path(file).read_text()
        split = split_texts(name, [text], tokenizer_of(family.base), max_tokens=0, seed=42, reads="text")["test"]
        rows = tmp_path / f"{name}.jsonl"
        rows.write_text("".join(json.dumps({"text": row}) + "\n" for row in split.rows))
        data += ["--data", f"{name}={rows}"]
    record = json.loads(frmerge("evaluate", "merged", *data, "--json").stdout)
    kept = {row["expert"]: row["share"] for row in record["recovery"] if row["model"] == "merged"}
    assert best["by_place"] == pytest.approx(kept, abs=1e-6)
    cells = re.search(rf"^ *{re.escape(best['label'])}(?: \*|  ) .*$", compared.stdout, re.MULTILINE)
    assert cells is not None
    for share in (best["score"], *kept.values()):
        assert f"{share:.1%}" in cells[0]


def test_the_table_says_what_it_is_of(compared: Result) -> None:
    text = " ".join(compared.stdout.split())
    assert re.search(r"Share of each expert's gain that is kept, on [\d,]+ predictions in \d+ texts", text)
    for part in (
        "is best here: it keeps",
        "ties density=0.5",
        "not told from the best",
        "red",
        "blue",
        "one standard",
    ):
        assert part in text
    assert "of the experts' gains on average" in text


def test_a_page_is_written_and_can_be_written_again(compared: Result, frmerge: Run, tmp_path: Path) -> None:
    page = tmp_path / "comparison" / "comparison.html"
    assert f"open in a browser: {Path('comparison') / 'comparison.html'}" in " ".join(compared.stdout.split())
    before = page.read_bytes()
    page.unlink()
    result = frmerge("report", "comparison", "--figures", "figures")
    assert result.exit_code == 0 and page.read_bytes() == before
    assert {file.stem for file in (tmp_path / "figures").iterdir()} == {
        "ranking", "experts", "trade_off", "scales", "cost",
    }  # fmt: skip


def test_json_is_the_record(family: Family, frmerge: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = frmerge(*command(family), "--json")
    assert json.loads(result.stdout) == json.loads((tmp_path / "comparison" / COMPARISON_FILE).read_text())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--scales", "1;2"], "--scales takes numbers with commas"),
        (["--weights", "a,b"], "--weights takes numbers with commas"),
        (["--method", "tiez"], "Did you mean 'ties'"),
        (["--data", "none.txt"], "'none.txt' is not a file"),
        (["--weights", "nam"], "Did you mean 'nan'"),
        (["--calibration", "none.txt"], "'none.txt' is not a file"),
    ],
)
def test_mistakes_end_with_a_sentence(family: Family, frmerge: Run, wrong: list[str], message: str) -> None:
    result = frmerge(*command(family), *wrong)
    assert result.exit_code == 2 and message in " ".join(result.stderr.split())


def test_a_merge_that_is_there_already_has_a_row(
    family: Family, frmerge: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(family.experts[0], tmp_path / "theirs")
    tried = ["--method", "linear", "--scales", "0.1"]  # by which next to nothing is kept
    data = [word for name, file in family.files.items() for word in ("--data", f"{name}={file}")]
    result = frmerge("compare", *family.experts, "--base-model", family.base, *data, *tried, "--also", "theirs")
    assert result.exit_code == 0, result.output
    text = " ".join(result.stdout.split())
    assert "theirs (as it is) is best here" in text
    heading = "The best is there already: theirs. The command that makes linear × 0.1, the next:"
    assert heading in text and heading in (tmp_path / "comparison" / "comparison.html").read_text()
    assert frmerge(*shlex.split(result.stdout.strip().splitlines()[-1])[1:]).exit_code == 0


def test_prompts_may_not_be_what_merges_are_measured_on(family: Family, frmerge: Run) -> None:
    file = family.files["red"]
    result = frmerge(*command(family), "--calibration", f"{family.experts[0]}={file}")
    assert result.exit_code == 2 and "cannot be compared on it" in result.stderr
