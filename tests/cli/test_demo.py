"""The demo on tiny models in place of the real ones, and its conclusions on numbers made up for them."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_frmerge.demo import run
from hf_frmerge.demo.run import BASE, FINAL, METHODS, SPACES, conclusions, merge_name
from hf_frmerge.evaluation.record import Score, load_record


@pytest.fixture
def tiny_demo(models, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    # Experts that write need a token that ends a text: one that the vocabulary has.
    base = Path(shutil.copytree(models.base, tmp_path_factory.mktemp("demo") / "base"))
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"eos_token": tokenizer.convert_ids_to_tokens(1)})
    tokenizer.save_pretrained(base)
    monkeypatch.setattr(run, "base_model_dir", lambda: base)
    monkeypatch.setattr(run, "expert_dirs", lambda: {"one": Path(models.adapter), "two": Path(models.adapter_2)})
    text = Path(models.text).read_text()
    monkeypatch.setattr(run, "load_texts", lambda: {"one": text, "two": text.upper()})
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)  # for the tests beside this one


def test_the_demo_merges_measures_writes_and_reloads(
    frmerge: Callable[..., Result], tiny_demo: None, tmp_path: Path
) -> None:
    output = tmp_path / "demo"
    done = frmerge("demo", "--output-dir", output)
    assert done.exit_code == 0, done.stderr
    for model in (BASE, "one", "two", *(merge_name(method, space) for method in METHODS for space in SPACES)):
        assert f"│ {model} " in done.stdout
    assert "What the numbers say" in done.stdout and run.PROMPT in done.stdout
    assert "Evaluating: 100%" in done.stderr and "20/20" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo"], "what lay between is gone"

    assert frmerge("verify", output).exit_code == 0
    card = (output / "README.md").read_text()
    assert "**this model**" in card and merge_name("nre", "weights") not in card
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


def sentences(**perplexity: float) -> str:
    """Conclusions when all merges score 20 but those named here, as in `karcher_deltas=19`, and the fitted one 19."""
    values = {merge_name(method, space): 20.0 for method in METHODS for space in SPACES} | {BASE: 30.0, FINAL: 19.0}
    values |= {merge_name(*name.split("_")): value for name, value in perplexity.items()}
    scores = [Score(name, "text", {"loss": math.log(value)}) for name, value in values.items()]
    return " ".join(conclusions(scores, {"deltas": 1.5, "weights": 0.08}))


def test_conclusions_follow_from_the_numbers() -> None:
    same = sentences()
    assert same.count("no difference worth the name") == 2
    assert "agree to 0.00%: at such angles all means are one" in same
    assert "Karcher is better by 10.0%" in sentences(karcher_deltas=18)
    assert "Karcher is worse by 10.0%" in sentences(karcher_deltas=22)
    assert "keeping it is worse by 5.0%" in sentences(linear_deltas=20 / 1.05)
    wide = sentences(nre_weights=19)
    assert "agree to 5.26%." in wide and "all means" not in wide
    assert "which the experts wrote themselves, a merge scores 19.00." in same
    assert "the fit is better by 5.0%. The base scores 30.00." in same
    assert "The best without data is nre of weights, 19.00: no difference worth the name" in wide
