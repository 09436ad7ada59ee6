"""The demo on tiny models in place of the real ones, and its conclusions on numbers made up for them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import Result
from comparison_records import make_comparison, make_method
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_frmerge.demo import run
from hf_frmerge.demo.run import METHODS, SCALES, conclusions
from hf_frmerge.evaluation.comparison_record import ComparisonRecord, Tried, load_comparison
from hf_frmerge.evaluation.record import load_record


@pytest.fixture
def tiny_demo(models, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    # Experts that write need a token that ends a text: one that the vocabulary has.
    base = Path(shutil.copytree(models.base, tmp_path_factory.mktemp("demo") / "base"))
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"eos_token": tokenizer.convert_ids_to_tokens(1)})
    tokenizer.save_pretrained(base)
    monkeypatch.setattr(run, "base_model_dir", lambda: base)
    monkeypatch.setattr(run, "expert_dirs", lambda: {"one": Path(models.adapter), "two": Path(models.adapter_2)})
    text = (Path(models.text).read_text() + "\n") * 8  # a comparison takes a few passages
    monkeypatch.setattr(run, "load_texts", lambda: {"one": text, "two": text.upper()})
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)  # for the tests beside this one


def test_the_demo_merges_measures_compares_and_reloads(
    frmerge: Callable[..., Result], tiny_demo: None, tmp_path: Path
) -> None:
    output = tmp_path / "demo"
    done = frmerge("demo", "--output-dir", output)
    assert done.exit_code == 0, done.stderr
    assert "What the numbers say" in done.stdout and run.PROMPT in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo", "demo-comparison"]

    compared = load_comparison(tmp_path / "demo-comparison")
    methods = {method.replace(",", " ") for method in METHODS}
    assert {row.label for row in compared.methods} == {*methods, "demo (as it is)"}
    assert {one.scale for row in compared.methods for one in row.tried} == {*SCALES, None}
    assert all(f"{run.BASE} " in done.stdout and f"{label} " in done.stdout for label in methods)
    assert (tmp_path / "demo-comparison" / "comparison.html").stat().st_size > 20_000

    assert frmerge("verify", output).exit_code == 0
    card = (output / "README.md").read_text()
    assert "**this model**" in card and "tsv_m" not in card
    assert "Fisher–Rao distances in radians" in done.stdout and "effective rank" in done.stdout
    record = load_record(output)
    assert record is not None and list(record.models.values()) == ["base", "expert", "expert", "merged"]
    assert record.objectives and record.collapse() and record.worst_tokens and record.generations
    assert (output / "merge_report.html").stat().st_size > 50_000
    tokenizer, model = AutoTokenizer.from_pretrained(output), AutoModelForCausalLM.from_pretrained(output)
    tokens = torch.tensor([tokenizer("the house of wisdom " * 32)["input_ids"]])
    assert model(tokens, labels=tokens).loss.isfinite()

    again = frmerge("demo", "--output-dir", output)
    assert again.exit_code == 0, again.stderr  # the output of an earlier demo is replaced


def test_the_demo_does_not_touch_a_folder_that_is_not_its_own(
    frmerge: Callable[..., Result], tiny_demo: None, tmp_path: Path
) -> None:
    (tmp_path / "letters.txt").write_text("dear")
    refused = frmerge("demo", "--output-dir", tmp_path)
    assert refused.exit_code == 2 and "not empty" in refused.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["letters.txt"]


def compared(**scores: float) -> ComparisonRecord:
    """A comparison of the demo's methods, which keep 0.7 but for those named here; one standard error is 0.03."""
    names = {"karcher": "karcher", "nre": "nre", "linear": "linear", "weights": "karcher space=weights"}
    rows = [
        make_method(label, scores.get(name, 0.7), best=0.9, tried=[Tried(1.0, None, 0.5), Tried(1.4, None, 0.6)])
        for name, label in names.items()
    ]
    rows[3] = replace(rows[3], scale=None)
    return make_comparison(methods=rows)


def test_conclusions_follow_from_the_numbers() -> None:
    same = " ".join(conclusions(compared(karcher=0.71, nre=0.72)))
    assert "karcher × 1 71.0%, nre × 1 72.0% (norm-rescaled average), linear × 1 70.0% (plain average)" in same
    assert "They differ by 2.0 points, no more than the text can tell." in same
    assert "At scale 1" in same and "karcher 50.0%, nre 50.0%, linear 50.0%" in same
    apart = " ".join(conclusions(compared(karcher=0.6, weights=0.65)))
    assert "They differ by 10.0 points, more than the standard error of the text." in apart
    assert "karcher space=weights 65.0%." in apart
