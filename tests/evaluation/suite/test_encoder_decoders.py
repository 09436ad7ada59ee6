"""Encoder-decoders read pairs of texts: against transformers' own loss and a float64 pass of each pair by itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click_runner import click_runner
from peft import LoraConfig, get_peft_model
from scipy.special import log_softmax
from tiny_models import word_tokenizer
from transformers import (
    AutoModelForSeq2SeqLM,
    BartConfig,
    BartForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_frmerge.cli.main import main
from hf_frmerge.errors import ArgumentError
from hf_frmerge.evaluation.record import MERGED, EvaluationRecord
from hf_frmerge.evaluation.suite.settings import ModelSet, RunSettings, SuiteOptions
from hf_frmerge.evaluation.suite.suite import evaluate_suite
from hf_frmerge.evaluation.text.forward import evaluate_causal_lm

WORDS = [f"w{number}" for number in range(30)]
TOKENIZER = word_tokenizer(WORDS, pad_token="<pad>", eos_token="</s>")
VOCABULARY = len(TOKENIZER)
ROLES: Any = {"base": "base", "math": "expert", "code": "expert", MERGED: "merged"}
PAIRS = [
    {"input_ids": [5, 9, 12, 4, 2], "labels": [7, 7, 3]},
    {"input_ids": [8, 2], "labels": [-100, 20, 11, 4, 2]},
    {"input_ids": [30, 6, 6, 6, 6, 6], "labels": [9]},
]
CLASSES: dict[str, Any] = {
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=1,
            pad_token_id=1, dropout_rate=0.3,
        )
    ),
    "bart": lambda: BartForConditionalGeneration(
        BartConfig(
            vocab_size=VOCABULARY, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=32,
            decoder_start_token_id=2, pad_token_id=1, eos_token_id=2, bos_token_id=3, forced_eos_token_id=2,
        )
    ),
}  # fmt: skip


def save_family(root: Path, kind: str) -> dict[str, str]:
    for seed, name in enumerate(ROLES):
        torch.manual_seed(0)
        model = CLASSES[kind]()
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
        model.save_pretrained(root / name)
        TOKENIZER.save_pretrained(root / name)
    return {name: str(root / name) for name in ROLES}


@pytest.fixture(params=CLASSES)
def family(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, str]:
    return save_family(tmp_path, request.param)


def evaluate(specs: dict[str, str], cache: Path, rows: list[Any], **options: Any) -> EvaluationRecord:
    models = ModelSet(specs, {name: ROLES[name] for name in specs}, base_model=None)
    wanted = SuiteOptions(top_k=0, dtype="float32", batch_size=2, **options)
    return evaluate_suite(models, {"code": rows}, wanted, RunSettings(cache_dir=cache))


def naive(folder: str) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities of every target by the model's own shifted labels, a pair at a time, and the targets."""
    model = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float64).eval()
    log_p, targets = [], []
    for pair in PAIRS:
        labels = torch.tensor([pair["labels"]])
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([pair["input_ids"]]), labels=labels).logits[0].numpy()
        kept = labels[0].numpy() != -100
        log_p.append(log_softmax(logits, axis=-1)[kept])
        targets.append(labels[0].numpy()[kept])
    return np.concatenate(log_p), np.concatenate(targets)


def test_losses_distances_and_recovery_are_the_naive_ones(family: dict[str, str], tmp_path: Path) -> None:
    record = evaluate(family, tmp_path / "cache", PAIRS)
    exact = {name: naive(folder) for name, folder in family.items()}
    losses = {}
    for score in record.scores:
        log_p, targets = exact[score.model]
        losses[score.model] = -np.take_along_axis(log_p, targets[:, None], 1).mean()
        assert (score.n_tokens, score.n_samples) == (len(targets), len(PAIRS))
        assert score.metrics["loss"] == pytest.approx(losses[score.model], rel=1e-5)
        assert score.metrics["token_accuracy"] == np.mean(log_p.argmax(-1) == targets)
    for row in record.distances:
        q, p = (np.exp(exact[name][0]) for name in (row.model, row.other))
        expected = 2 * np.arccos(np.minimum(np.sqrt(p * q).sum(-1), 1))
        assert row.fisher_rao.mean == pytest.approx(expected.mean(), abs=1e-5)
        assert expected.mean() > 0.05
    shares = {row.expert: row.share for row in record.recovery}
    gain = losses["base"] - losses["code"]
    expected_share = None if gain <= 0 else pytest.approx((losses["base"] - losses[MERGED]) / gain, rel=1e-3)
    assert shares["code"] == expected_share
    assert record.worst_tokens and record.generations == []
    assert {row.model for row in record.layers} == set(ROLES)
    torch.manual_seed(1)
    again = evaluate(family, tmp_path / "cache", PAIRS)  # from the cache
    assert again == record
    other = evaluate(family, tmp_path / "cache", [{**pair, "input_ids": pair["input_ids"][::-1]} for pair in PAIRS])
    assert other.scores != record.scores, "the sources are a part of the keys"


def test_activations_are_those_of_the_decoder(family: dict[str, str], tmp_path: Path) -> None:
    record = evaluate({"code": family["code"]}, tmp_path / "cache", PAIRS[:1])
    model = AutoModelForSeq2SeqLM.from_pretrained(family["code"], dtype=torch.float64).eval()
    with torch.no_grad():
        start = torch.tensor([[model.config.decoder_start_token_id, *PAIRS[0]["labels"]]])
        states = model(
            input_ids=torch.tensor([PAIRS[0]["input_ids"]]), decoder_input_ids=start, output_hidden_states=True
        ).decoder_hidden_states
    assert [row.activation_variance for row in record.layers] == pytest.approx(
        [float(state[0].var(0, correction=0).mean()) for state in states], rel=1e-5
    )


def test_text_and_target_are_tokenized_and_text_alone_is_split(family: dict[str, str]) -> None:
    model = AutoModelForSeq2SeqLM.from_pretrained(family["code"]).eval()
    words = [{"text": "w3 w4 w5", "target": "w9 w8"}, {"text": "w1", "labels": "w2"}]
    ids = [{"input_ids": TOKENIZER(row["text"])["input_ids"], "labels": TOKENIZER(t)["input_ids"]}
           for row, t in zip(words, ("w9 w8", "w2"))]  # fmt: skip
    assert evaluate_causal_lm(model, TOKENIZER, words) == evaluate_causal_lm(model, None, ids)
    split = [{"input_ids": [4, 5], "labels": [6, 7]}, {"input_ids": [8], "labels": [9, 10]}]
    whole = [{"input_ids": [4, 5, 6, 7, 8, 9, 10]}]
    assert evaluate_causal_lm(model, None, whole, block_size=4) == evaluate_causal_lm(model, None, split)
    loss = [model(input_ids=torch.tensor([pair["input_ids"]]), labels=torch.tensor([pair["labels"]])).loss.item()
            for pair in split]  # fmt: skip
    assert evaluate_causal_lm(model, None, split).loss == pytest.approx(np.mean(loss), rel=1e-5)


def test_adapters_and_the_command(tmp_path: Path) -> None:
    family = save_family(tmp_path, "t5")
    base = T5ForConditionalGeneration.from_pretrained(family["base"])
    for seed, name in enumerate(("x", "y")):
        torch.manual_seed(seed)
        adapter = get_peft_model(base, LoraConfig(r=2, target_modules=["q", "v"], init_lora_weights=False))
        adapter.save_pretrained(tmp_path / name)
        base = adapter.unload()
    out = tmp_path / "out"
    run = click_runner().invoke
    folders = [str(tmp_path / name) for name in ("x", "y")]
    options = ["--base-model", family["base"], "--adapter-output", "merged", "--output-dir", str(out)]
    assert run(main, ["merge", *folders, *options]).exit_code == 0
    rows = [{"text": "w3 w4 w5 w6", "target": "w7 w8"}, {"text": "w9 w2", "target": "w1"}]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    result = run(main, ["evaluate", str(out), "--data", str(tmp_path / "pairs.jsonl"), "--no-cache", "--json"])
    assert result.exit_code == 0, result.stderr
    scores = {score["model"]: score["metrics"]["loss"] for score in json.loads(result.stdout)["scores"]}
    assert scores.keys() == {"base", "x", "y", MERGED}
    merged = T5ForConditionalGeneration.from_pretrained(out).eval()
    assert scores[MERGED] == pytest.approx(evaluate_causal_lm(merged, TOKENIZER, rows).loss, rel=1e-5)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"input_ids": [3], "labels": [-100]}],
            "hold nothing to predict: an encoder-decoder needs a text and a column",
        ),
        ([{"input_ids": [3], "labels": [[4]]}], "needs text or a list of token ids in the column labels or target"),
        ([{"input_ids": [3], "labels": 4}], "needs text or a list of token ids"),
        ([{"input_ids": [3], "labels": [VOCABULARY]}], "belongs to another model"),
        ([{"input_ids": [VOCABULARY], "labels": [3]}], "belongs to another model"),
        ([{"labels": [3]}], "needs a column `text`"),
    ],
)
def test_rows_that_cannot_be_used(tmp_path: Path, rows: list[Any], message: str) -> None:
    family = save_family(tmp_path, "t5")
    with pytest.raises(ArgumentError, match=message):
        evaluate(family, tmp_path / "cache", rows)


def test_the_start_of_the_decoder_is_asked_for(tmp_path: Path) -> None:
    family = save_family(tmp_path, "t5")
    for folder in family.values():
        for name in ("config.json", "generation_config.json"):
            path = Path(folder) / name
            values = json.loads(path.read_text())
            values.pop("decoder_start_token_id", None)
            path.write_text(json.dumps(values))
    with pytest.raises(ArgumentError, match="does not say which token its decoder begins with"):
        evaluate(family, tmp_path / "cache", PAIRS)
    settings = Path(family["code"]) / "generation_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "decoder_start_token_id": 1}))
    assert evaluate({"code": family["code"]}, tmp_path / "cache", PAIRS).scores
    config = Path(family["math"]) / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "decoder_start_token_id": 2}))
    with pytest.raises(ArgumentError, match="The models do not read alike: 'code'"):
        evaluate({name: family[name] for name in ("math", "code")}, tmp_path / "cache", PAIRS)
