"""`frmerge search` and what it prints; the commands it ends with make the merges of its table."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from comparison_family import Family

from hf_frmerge.comparison.texts import split_texts
from hf_frmerge.evaluation.models.merged import tokenizer_of
from hf_frmerge.search.record import RECORD_FILE

Run = Callable[..., Result]


def command(family: Family, *options: str) -> list[str]:
    data = [word for name, file in family.files.items() for word in ("--data", f"{name}={file}")]
    return ["search", *family.experts, "--base-model", family.base, *data, "--max-tokens", "0", *options]


@pytest.mark.parametrize("options", [("--evaluations", "6", "--scales", "0.8,1.3"), ("--by", "greedy")], ids=str)
def test_the_commands_at_the_end_make_the_merges_of_the_table(
    family: Family, frmerge: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    result = frmerge(*command(family, *options))
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "search" / RECORD_FILE).read_text())
    printed = result.stdout.strip().splitlines()[-len(record["chosen"]) :]
    assert [shlex.split(line) for line in printed] == [row["command"] for row in record["chosen"]]
    data = []
    for name, file in family.files.items():
        text = Path(file).read_text()
        split = split_texts(name, [text], tokenizer_of(family.base), max_tokens=0, seed=42, reads="text")["test"]
        rows = tmp_path / f"{name}.jsonl"
        rows.write_text("".join(json.dumps({"text": row}) + "\n" for row in split.rows))
        data += ["--data", f"{name}={rows}"]
    text = " ".join(result.stdout.split())
    for row in record["chosen"][:2]:
        assert frmerge(*row["command"][1:]).exit_code == 0
        folder = row["command"][-1]
        evaluated = json.loads(frmerge("evaluate", folder, *data, "--json").stdout)
        kept = {one["expert"]: one["share"] for one in evaluated["recovery"] if one["model"] == "merged"}
        assert row["by_place"] == pytest.approx(kept, abs=1e-6)
        for share in (row["score"], *kept.values()):
            assert f"{share:.1%}".replace("-", "−") in text
    assert "nothing was chosen on" in text and "beside" not in text
    assert f"{len(record['tried'])} merges by linear were measured on others" in text


def test_json_is_the_record(family: Family, frmerge: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = frmerge(*command(family, "--by", "greedy", "--json"))
    assert json.loads(result.stdout) == json.loads((tmp_path / "search" / RECORD_FILE).read_text())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--scales", "1;2"], "--scales takes numbers with commas"),
        (["--evaluations", "3"], "Measure 6 or more, best 12"),
        (["--by", "greedy", "--scales", "1,2"], "are one positive number"),
        (["--method", "tiez"], "Did you mean 'ties'"),
        (["--by", "gready"], "'gready' is not one of"),
        (["--data", "none.txt"], "'none.txt' is not a file"),
    ],
)
def test_mistakes_end_with_a_sentence(
    family: Family, frmerge: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = frmerge(*command(family), *wrong)
    assert result.exit_code == 2 and message in " ".join(result.stderr.split())
    assert not (tmp_path / "search").exists()


def test_a_method_that_needs_prompts_is_compared_as_the_message_says(
    family: Family, frmerge: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refused = frmerge(*command(family, "--method", "regmean"))
    assert refused.exit_code != 0 and "`frmerge compare --calibration` has it beside others" in refused.output
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        "".join(json.dumps({"text": f"the room of {word}"}) + "\n" for word in family.files for _ in range(32))
    )
    words = ["compare", *command(family)[1:], "--scales", "1", "--method", "linear", "--method", "regmean"]
    words += ["--calibration", str(prompts), "--json"]
    compared = frmerge(*words, "--max-calibration-length", "8")
    assert compared.exit_code == 0, compared.output
    labels = {row["method"] for row in json.loads(compared.stdout)["methods"]}
    assert labels == {"karcher", "linear", "regmean"}
