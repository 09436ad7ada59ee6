"""Evaluation data in files of every kind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hf_frmerge.errors import ArgumentError
from hf_frmerge.evaluation.text.datasets import read_texts


def test_texts_of_every_kind(tmp_path: Path) -> None:
    rows = [{"text": "one two"}, {"text": "three"}]
    (tmp_path / "a.txt").write_text("one\ntwo\n", encoding="utf-8")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "a.csv").write_text("text\none two\nthree\n")
    assert list(read_texts(tmp_path / "a.txt")) == ["one\ntwo\n"]
    assert list(read_texts(tmp_path / "a.jsonl")) == list(read_texts(tmp_path / "a.csv")) == rows
    with pytest.raises(ArgumentError, match=r"b\.txt.*not a file"):
        read_texts(tmp_path / "b.txt")
    (tmp_path / "latin.txt").write_bytes("Ägypten".encode("latin-1"))
    with pytest.raises(ArgumentError, match="not UTF-8"):
        read_texts(tmp_path / "latin.txt")


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("empty.jsonl", "", "it is empty"),
        ("broken.jsonl", '{"text": "a"}\n{"text": \n', "JSON parse error"),
        ("broken.csv", 'text\n"a', "EOF inside string"),
        ("broken.parquet", "text", "Parquet file size is 4 bytes"),
    ],
)
def test_broken_tables_are_named_with_the_reason(tmp_path: Path, name: str, content: str, reason: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ArgumentError, match=rf"{name}' cannot be read as .*{reason}"):
        read_texts(tmp_path / name)
