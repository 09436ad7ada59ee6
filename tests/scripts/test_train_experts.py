"""Texts that the experts of the benchmarks are trained and measured on."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.tiny_models import word_tokenizer

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> tuple[ModuleType, ModuleType]:
    monkeypatch.syspath_prepend(SCRIPTS)
    import expert_texts
    import train_experts

    for module in ("expert_texts", "train_experts"):
        monkeypatch.delitem(sys.modules, module)
    return train_experts, expert_texts


def test_no_document_is_in_two_parts_or_in_training(scripts: tuple[ModuleType, ModuleType]) -> None:
    train_experts, _ = scripts
    documents = {f"d{number}": " ".join([f"w{number}"] * 3000) for number in range(60)}
    tokenizer = word_tokenizer([f"w{number}" for number in range(60)])
    train, parts = train_experts.split_documents(documents, tokenizer, seed=0)
    words = {part: [set(row.split()) for row in rows] for part, rows in parts.items()} | {
        "train": [set(train.split())]
    }
    everywhere = [word for sets in words.values() for found in sets for word in found]
    assert len(everywhere) == len(set(everywhere)) == 60
    sizes = {part: sum(len(row.split()) for row in rows) for part, rows in parts.items()}
    assert sizes == train_experts.DOMAIN_PARTS
    again = train_experts.split_documents(documents, tokenizer, seed=0)
    assert again == (train, parts)
    assert train_experts.split_documents(documents, tokenizer, seed=1)[0] != train


def test_running_text_of_a_manual_page(scripts: tuple[ModuleType, ModuleType]) -> None:
    _, expert_texts = scripts
    page = (
        ".TH CP 1\n.SH BEZEICHNUNG\ncp \\- Dateien kopieren\n.PP\n"
        "\\fBKopieren\\fP von QUELLE nach ZIEL oder mehrere QUELLE(n) in\n\\fIVERZEICHNIS\\fP, mit \\-\\-backup.\n"
        ".SH ÜBERSETZUNG\nDie deutsche Übersetzung dieser Seite wurde von vielen fleißigen Menschen erstellt, danke.\n"
    )
    text = "Kopieren von QUELLE nach ZIEL oder mehrere QUELLE(n) in VERZEICHNIS, mit --backup."
    assert expert_texts.plain(page) == text


def test_rows_of_a_table_come_without_its_types_and_flags(
    scripts: tuple[ModuleType, ModuleType], tmp_path: Path
) -> None:
    _, expert_texts = scripts
    folder = tmp_path / "python/orangecontrib/text/datasets"
    folder.mkdir(parents=True)
    (folder / "a.tab").write_text('Category\tText\nd\tstring\nclass\t\n\nx\t"one ""two"""\ny\tthree\n')
    (folder / "b.tab").write_text("Category\tText\nd\tstring\n\tinclude=True\n\nz\tfour\n")
    assert expert_texts.labelled(tmp_path, "a", "b") == [('one "two"', "x"), ("three", "y"), ("four", "z")]
