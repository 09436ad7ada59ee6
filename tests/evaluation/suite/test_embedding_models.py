"""Embeddings of sentence-transformers folders: their cosines, against single texts in float64 and poolings by hand."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click_runner import click_runner
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, PreTrainedTokenizerFast

from hf_frmerge.cli.main import main
from hf_frmerge.errors import ArgumentError, CheckpointError
from hf_frmerge.evaluation.record import EvaluationRecord
from hf_frmerge.evaluation.suite.merge_evaluation import evaluate_merge
from hf_frmerge.evaluation.suite.settings import ModelSet, RunSettings, SuiteOptions

WORDS = [f"w{i}" for i in range(20)]
TEXTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9 w10 w11 w12", "w3 w2", "w19 w18 w17 w1 w1"]
POOLINGS = {
    "cls": lambda states: states[0],
    "mean": lambda states: states.mean(0),
    "max": lambda states: states.max(0),
    "lasttoken": lambda states: states[-1],
}


def save_embedder(folder: Path, seed: int, side: str = "right", steps: tuple[str, ...] = (), **settings: Any) -> None:
    """A BERT, laid out as sentence-transformers does; `settings` are those of its pooling."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=24, max_position_embeddings=16, **sizes)).save_pretrained(folder)
    vocabulary = {word: place for place, word in enumerate(["<pad>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", padding_side=side, model_max_length=16
    ).save_pretrained(folder)
    paths = {"Transformer": "", "Pooling": "1_Pooling", **{step: f"2_{step}" for step in (*steps, "Normalize")}}
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"st.{kind}"} for i, (kind, path) in enumerate(paths.items())
    ]
    write(folder, "modules.json", modules)
    write(folder, "1_Pooling/config.json", {"word_embedding_dimension": 16, **settings})


def write(folder: Path, name: str, content: Any) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(content))


def save_family(root: Path, **settings: Any) -> dict[str, str]:
    names = ("merged", "a", "b")
    for seed, name in enumerate(names):
        save_embedder(root / name, seed, **settings)
    return {name: str(root / name) for name in names}


def naive(folder: str, pool: Any, texts: list[str] = TEXTS) -> np.ndarray:
    """Embeddings of single texts, without padding, in float64."""
    model = AutoModel.from_pretrained(folder, dtype=torch.float64).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        rows = [pool(model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].numpy()) for text in texts]
    return np.stack([row / np.linalg.norm(row) for row in rows])


def evaluate(specs: dict[str, str], rows: Any, cache: Path, **options: Any) -> EvaluationRecord:
    roles: Any = {name: "merged" if name == "merged" else "expert" for name in specs}
    return evaluate_merge(
        ModelSet(specs, roles), {"texts": rows}, SuiteOptions(dtype="float32", **options), RunSettings(cache_dir=cache)
    )


def cosines(record: EvaluationRecord) -> dict[tuple[str, str], float]:
    return {
        (score.model, name.removeprefix("embedding_cosine_")): value
        for score in record.scores
        for name, value in score.metrics.items()
    }


def check(record: EvaluationRecord, specs: dict[str, str], pool: Any, texts: list[str] = TEXTS) -> None:
    found = {name: naive(folder, pool, texts) for name, folder in specs.items()}
    measured = cosines(record)
    assert set(measured) == {("merged", "a"), ("merged", "b"), ("a", "b"), ("b", "a")}
    for (one, other), value in measured.items():
        wanted = np.mean([x @ y for x, y in zip(found[one], found[other])])
        assert value == pytest.approx(wanted, abs=1e-6) and abs(wanted) < 0.99


@pytest.mark.parametrize("mode", POOLINGS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_cosines_are_the_naive_ones(tmp_path: Path, mode: str, side: str) -> None:
    if side == "right":
        # One flag for each, as older versions write it.
        flag = {"cls": "cls_token", "mean": "mean_tokens", "max": "max_tokens"}.get(mode, mode)
        settings = {f"pooling_mode_{flag}": True, "pooling_mode_other": False}
    else:
        settings = {"pooling_mode": mode}
    specs = save_family(tmp_path, side=side, **settings)
    if side == "left":  # BERT counts its places from the first, padding or not: one text at a time
        record = evaluate(specs, [{"text": text} for text in TEXTS], tmp_path / "cache", batch_size=1)
    else:
        record = evaluate(specs, [{"text": text} for text in TEXTS], tmp_path / "cache", batch_size=3)
    check(record, specs, POOLINGS[mode])
    assert record.layers and {score.n_samples for score in record.scores} == {5}


def test_one_model_alone_is_compared_with_nothing(tmp_path: Path) -> None:
    specs = save_family(tmp_path)
    record = evaluate({"merged": specs["merged"]}, TEXTS, tmp_path / "cache")
    assert record.layers and not record.scores


def test_lines_tokens_and_generators_give_the_same(tmp_path: Path) -> None:
    specs = save_family(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(specs["a"])
    variants: list[Any] = [
        ["\n".join([*TEXTS, ""])],
        [{"input_ids": tokenizer(text)["input_ids"]} for text in TEXTS],
        ({"text": text} for text in TEXTS),
    ]
    for number, rows in enumerate(variants):
        check(evaluate(specs, rows, tmp_path / f"cache{number}"), specs, POOLINGS["mean"])


def test_prompt_case_and_longest_input_are_those_of_the_folder(tmp_path: Path) -> None:
    specs = save_family(tmp_path)
    general = {"prompts": {"query": "W0 w13 ", "other": "w5"}, "default_prompt_name": "query"}
    write(tmp_path / "merged", "config_sentence_transformers.json", general)
    write(tmp_path / "merged", "sentence_bert_config.json", {"max_seq_length": 4, "do_lower_case": True})
    record = evaluate(specs, [text.upper() for text in TEXTS], tmp_path / "cache")
    check(record, specs, POOLINGS["mean"], [" ".join(f"w0 w13 {text}".split()[:4]) for text in TEXTS])


def test_the_commands_merge_and_measure(tmp_path: Path) -> None:
    specs, out = save_family(tmp_path), tmp_path / "out"
    merge = ["merge", specs["a"], specs["b"], "--method", "linear", "--output-dir", str(out), "--disable-tqdm"]
    assert click_runner().invoke(main, merge).exit_code == 0
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    command = ["evaluate", str(out), "--data", f"texts={tmp_path / 'texts.txt'}", "--card", "--block-size", "8"]
    result = click_runner().invoke(main, [*command, "--no-cache", "--fail-on", "embedding_cosine_a<0.1"])
    assert result.exit_code == 0, result.output
    wanted = float(np.mean((naive(str(out), POOLINGS["mean"]) * naive(specs["a"], POOLINGS["mean"])).sum(1)))
    title = "Mean cosine of embeddings to those of a"
    assert f"{title}, 5 samples" in " ".join(result.output.split()) and f"{wanted:.4f}" in result.output
    assert title in (out / "README.md").read_text() and f"{wanted:.4f}" in (out / "README.md").read_text()
    page = tmp_path / "page.html"
    assert click_runner().invoke(main, ["report", str(out), "--output", str(page)]).exit_code == 0
    assert title in page.read_text() and f"{wanted:.4f}" in page.read_text()
    failed = click_runner().invoke(main, [*command, "--no-cache", "--fail-on", "embedding_cosine_a<1.1"])
    assert failed.exit_code == 1


def test_other_steps_are_told_and_other_poolings_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    specs = save_family(tmp_path, steps=("Dense",))
    with caplog.at_level(logging.WARNING):
        record = evaluate(specs, TEXTS, tmp_path / "cache")
    assert "they are made in steps that are not measured (Transformer, Pooling, Dense)" in caplog.text
    assert record.layers and not record.scores
    plain = save_family(tmp_path / "plain", pooling_mode="mean")
    write(tmp_path / "plain/b", "1_Pooling/config.json", {"word_embedding_dimension": 16, "pooling_mode": "cls"})
    with pytest.raises(CheckpointError, match=r"1_Pooling/config\.json differs in pooling_mode"):
        evaluate(plain, TEXTS, tmp_path / "cache")
    own = {"word_embedding_dimension": 16, "pooling_mode": "mean", "include_prompt": False}
    write(tmp_path / "plain/b", "1_Pooling/config.json", own)
    with pytest.raises(CheckpointError, match=r"1_Pooling/config\.json differs in include_prompt"):
        evaluate(plain, TEXTS, tmp_path / "cache")


def test_a_tokenizer_has_to_pad(tmp_path: Path) -> None:
    specs = save_family(tmp_path)
    settings = tmp_path / "merged/tokenizer_config.json"
    settings.write_text(json.dumps({k: v for k, v in json.loads(settings.read_text()).items() if k != "pad_token"}))
    with pytest.raises(ArgumentError, match="has no padding token: set `pad_token`"):
        evaluate(specs, TEXTS, tmp_path / "cache")
