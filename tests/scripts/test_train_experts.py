"""Texts that the experts of the benchmarks are trained and measured on."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tiny_models import word_tokenizer

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> tuple[ModuleType, ModuleType]:
    monkeypatch.syspath_prepend(SCRIPTS)
    import expert_texts
    import train_experts

    for module in ("expert_texts", "expert_training", "small_models", "train_experts"):
        monkeypatch.delitem(sys.modules, module)
    return train_experts, expert_texts


def test_no_document_is_in_two_parts_or_in_training(scripts: tuple[ModuleType, ModuleType]) -> None:
    train_experts, _ = scripts
    documents = {f"d{number}": " ".join([f"w{number}"] * 3000) for number in range(60)}
    tokenizer = word_tokenizer([f"w{number}" for number in range(60)])
    to_train, parts = train_experts.split_documents(documents, tokenizer, seed=0)
    train = train_experts.training_text(to_train)
    words = {part: [set(row.split()) for row in rows] for part, rows in parts.items()} | {
        "train": [set(train.split())]
    }
    everywhere = [word for sets in words.values() for found in sets for word in found]
    assert len(everywhere) == len(set(everywhere)) == 60
    sizes = {part: sum(len(row.split()) for row in rows) for part, rows in parts.items()}
    assert sizes == train_experts.DOMAIN_PARTS
    again = train_experts.split_documents(documents, tokenizer, seed=0)
    assert again == (to_train, parts)
    assert train_experts.split_documents(documents, tokenizer, seed=1)[0] != to_train


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


def test_a_model_from_nothing_learns_its_mix_and_an_expert_more_of_its_own(
    scripts: tuple[ModuleType, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_experts, _ = scripts
    words = [f"w{number}" for number in range(10)]
    documents = {f"d{number}": " ".join(words) + f" {number}\n" for number in range(2_000)}
    monkeypatch.setattr(train_experts, "split_domain", lambda *_: (["".join(documents.values())], {"validation": []}))
    monkeypatch.setattr(train_experts, "SIZES", {"tiny": train_experts.SIZES["1m"].__class__(1, 16, 24, 2)})
    recipe = train_experts.Recipe(("one",), steps=30, warm_up=3, learning_rate=1e-2, length=32)
    monkeypatch.setattr(train_experts, "MIX_RECIPE", recipe)
    args = argparse.Namespace(seed=0, names=None, output_dir=tmp_path)
    train_experts.train_from_nothing(recipe, tmp_path, tmp_path / "tiny", args)

    def loss_of(folder: Path) -> float:
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        tokens = torch.tensor([tokenizer(documents["d7"]).input_ids])
        assert tokenizer.decode(tokens[0]) == documents["d7"]
        return model(input_ids=tokens, labels=tokens).loss.item()

    assert loss_of(tmp_path / "tiny" / "one") < loss_of(tmp_path / "tiny" / "base") < 0.8 * math.log(300)
    # One more expert of the suite gets the base of the others, even where training it again would not give the same.
    base, others = (tmp_path / "tiny" / name / "model.safetensors" for name in ("base", "one"))
    kept, args = base.read_bytes(), argparse.Namespace(seed=1, names=["two"], output_dir=tmp_path)
    train_experts.train_from_nothing(recipe, tmp_path, tmp_path / "tiny", args)
    assert base.read_bytes() == kept
    assert (tmp_path / "tiny" / "two" / "model.safetensors").read_bytes() != others.read_bytes()
    assert not (tmp_path / "tiny" / "untrained").exists()


def test_sizes_are_what_they_are_called(scripts: tuple[ModuleType, ModuleType], tmp_path: Path) -> None:
    train_experts, _ = scripts
    for name, size in train_experts.SIZES.items():
        train_experts.save_untrained(size, ["the rooms of the house"], tmp_path / name, seed=0)
        n_parameters = AutoModelForCausalLM.from_pretrained(tmp_path / name).num_parameters()
        assert n_parameters == size.parameters
        assert name.removesuffix("-mixture") == f"{n_parameters // 1_000_000}m"
