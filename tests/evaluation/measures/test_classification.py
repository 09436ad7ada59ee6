"""Classifiers, on real tiny BERTs: against Trainer, torch and scipy, on datasets and streams, padded or not."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from tiny_models import save_classifier_family
from transformers import (
    AutoTokenizer,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    EvalPrediction,
    Trainer,
    TrainingArguments,
)

from hf_frmerge.errors import ArgumentError
from hf_frmerge.evaluation.measures.classification import classification_metrics, predict_classes
from hf_frmerge.evaluation.suite.classifier_suite import evaluate_classifiers
from hf_frmerge.evaluation.suite.settings import ModelSet, RunSettings, SuiteOptions

WORDS = [f"w{i}" for i in range(30)]
LABELS = ["no", "maybe", "yes"]


def samples(n: int = 23) -> datasets.Dataset:
    generator = np.random.default_rng(0)
    texts = [" ".join(generator.choice(WORDS, generator.integers(1, 12))) for _ in range(n)]
    return datasets.Dataset.from_dict({"text": texts, "label": generator.integers(0, 3, n).tolist()})


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("classifiers")
    save_classifier_family(root, WORDS, 0.25)
    return root


@pytest.fixture(scope="module")
def model(family: Path) -> BertForSequenceClassification:
    return BertForSequenceClassification.from_pretrained(family / "math")


@pytest.fixture(scope="module")
def tokenizer(family: Path) -> Any:
    return AutoTokenizer.from_pretrained(family / "math")


def logits_one_by_one(model: Any, tokenizer: Any, rows: Any) -> np.ndarray:
    """No batch, no padding."""
    model.eval()
    with torch.no_grad():
        return np.stack([model(**tokenizer(row["text"], return_tensors="pt")).logits[0].numpy() for row in rows])


def test_every_row_once_in_order_whatever_the_batches(model: Any, tokenizer: Any) -> None:
    rows = samples()
    expected = logits_one_by_one(model, tokenizer, rows)
    for batch_size in (1, 4, 23, 50):
        actual = predict_classes(model, rows, tokenizer, batch_size=batch_size)
        assert np.allclose(actual.predictions, expected, atol=1e-5)
        assert actual.label_ids.tolist() == rows["label"]


def test_streams_lists_tokens_and_names_of_labels_give_the_same(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    rows = samples()
    expected = predict_classes(model, rows, tokenizer).predictions
    rows.to_json(tmp_path / "rows.jsonl")
    streamed = datasets.load_dataset("json", data_files=str(tmp_path / "rows.jsonl"), split="train", streaming=True)
    tokenised = rows.map(lambda row: tokenizer(row["text"])).rename_column("label", "labels")
    variants = [
        rows.to_iterable_dataset(num_shards=3),
        streamed,
        list(rows),
        tokenised,
        tokenised.with_format("torch"),
        [{"text": row["text"], "label": LABELS[row["label"]]} for row in rows],
    ]
    for variant in variants:
        actual = predict_classes(model, variant, tokenizer, batch_size=8)
        assert np.allclose(actual.predictions, expected, atol=1e-5)
        assert actual.label_ids.tolist() == rows["label"]
    for variant in (rows, streamed):  # two workers would read a stream twice
        actual = predict_classes(model, variant, tokenizer, batch_size=8, num_workers=2)
        assert np.allclose(actual.predictions, expected, atol=1e-5)


def test_accuracy_and_loss_are_those_of_trainer(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    rows = samples(24)

    def accuracy(prediction: EvalPrediction) -> dict[str, float]:
        return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    trainer = Trainer(
        model,
        TrainingArguments(output_dir=str(tmp_path), use_cpu=True, per_device_eval_batch_size=4, disable_tqdm=True),
        data_collator=DataCollatorWithPadding(tokenizer),
        eval_dataset=rows.map(lambda row: tokenizer(row["text"]), remove_columns="text"),
        compute_metrics=accuracy,
    )
    theirs = trainer.evaluate()
    ours = classification_metrics(predict_classes(model, rows, tokenizer, batch_size=5))
    assert ours["accuracy"] == theirs["eval_accuracy"]
    assert 0.1 < ours["accuracy"] < 0.9, "a test on samples that are all right or all wrong would show little"
    assert ours["loss"] == pytest.approx(theirs["eval_loss"], rel=1e-6)


def test_the_record_holds_scores_recovery_distances_and_collapse(family: Path, tokenizer: Any) -> None:
    rows = samples()
    roles = {"base": "base", "math": "expert", "code": "expert", "merged": "merged"}
    folders = {name: str(family / ("base" if name == "merged" else name)) for name in roles}
    asked: list[str] = []
    record = evaluate_classifiers(
        ModelSet(folders, roles, weights={"math": 3, "code": 1}, processing_class=tokenizer),
        {"math": rows, "other": rows.select(range(9))},
        SuiteOptions(batch_size=4),
        RunSettings(on_model=asked.append),
    )
    assert asked == list(roles)
    log_probs = {}
    for name in ("base", "math", "code"):
        live = BertForSequenceClassification.from_pretrained(family / name)
        log_probs[name] = log_softmax(logits_one_by_one(live, tokenizer, rows).astype(np.float64), axis=-1)
    scores = {(score.model, score.domain): score for score in record.scores}
    labels = np.array(rows["label"])
    for name, values in log_probs.items():
        score = scores[name, "math"]
        assert score.metrics["loss"] == pytest.approx(-values[np.arange(23), labels].mean(), rel=1e-5)
        assert score.metrics["accuracy"] == (values.argmax(-1) == labels).mean()
        assert (score.n_samples, scores[name, "other"].n_samples) == (23, 9)

    # The merged model is the base here.
    [distance] = [d for d in record.distances if (d.model, d.other, d.domain) == ("merged", "code", "math")]
    p, q = np.exp(log_probs["code"]), np.exp(log_probs["base"])
    naive = 2 * np.arccos(np.minimum(np.sqrt(p * q).sum(-1), 1))
    assert distance.fisher_rao.mean == pytest.approx(naive.mean(), rel=1e-4)
    assert distance.kl_other_model == pytest.approx((p * (np.log(p) - np.log(q))).sum(-1).mean(), rel=1e-4)
    assert distance.top1_agreement == (p.argmax(-1) == q.argmax(-1)).mean()
    assert (distance.n_tokens, distance.error) == (23, 0.0)
    to_math = next(d for d in record.distances if (d.model, d.other, d.domain) == ("merged", "math", "math"))
    [goal] = [goal for goal in record.objectives if goal.domain == "math"]
    assert goal.value == pytest.approx(0.75 * to_math.mean_squared + 0.25 * distance.mean_squared, rel=1e-9)
    assert goal.lowest < goal.value
    kept = {row.expert: row for row in record.recovery}
    assert kept["math"].domain == "math" and kept["math"].kept == 0

    states = np.concatenate([hidden_states(family / "base", tokenizer, row["text"]) for row in [*rows, *rows][:32]])
    [last] = [row for row in record.layers if (row.model, row.layer) == ("merged", 2)]
    assert last.activation_variance == pytest.approx(states.var(axis=0).mean(), rel=1e-4)
    assert {ratio.layer for ratio in record.collapse()} == {0, 1, 2}


def hidden_states(folder: Path, tokenizer: Any, text: str) -> np.ndarray:
    model = BertForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        output = model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True)
    return output.hidden_states[-1][0].double().numpy()


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([{"text": "w1"}], r"Row 0 .* needs a column `label` or `labels`, found \['text'\]"),
        ([{"text": "w1", "label": 3}], "has the label 3, but the classifier knows no, maybe, yes"),
        ([{"text": "w1", "label": "perhaps"}], "has the label 'perhaps', but the classifier knows no, maybe, yes"),
        ([{"sentence": "w1", "label": 1}], "needs a column `text`"),
        ([], "has no rows"),
    ],
)
def test_rows_that_do_not_fit_are_named(model: Any, tokenizer: Any, rows: Any, sentence: str) -> None:
    with pytest.raises(ArgumentError, match=sentence):
        predict_classes(model, rows, tokenizer)


def test_ragged_rows_need_a_padding_token(model: Any) -> None:
    rows = [{"input_ids": [3, 4], "label": 0}, {"input_ids": [3, 4, 5], "label": 0}]
    with pytest.raises(ArgumentError, match=r"different lengths.*batch size of 1"):
        predict_classes(model, rows, None, batch_size=2)
    assert predict_classes(model, rows, None, batch_size=1).predictions.shape == (2, 3)


def test_other_heads_are_refused(model: Any, tokenizer: Any) -> None:
    config = copy.deepcopy(model.config)
    config.num_labels = 1
    regression = BertForSequenceClassification(config)
    with pytest.raises(ArgumentError, match=r"choose one label.*num_labels=1"):
        predict_classes(regression, samples(), tokenizer)


def turn(source: Path, target: Path, order: list[int]) -> None:
    """Save a classifier with the rows of its head, and the names of its classes, in another order."""
    turned = BertForSequenceClassification.from_pretrained(source)
    with torch.no_grad():
        for parameter in turned.classifier.parameters():
            parameter.copy_(parameter[order].clone())
    turned.config.id2label = {row: LABELS[old] for row, old in enumerate(order)}
    turned.config.label2id = {label: row for row, label in turned.config.id2label.items()}
    turned.save_pretrained(target)


def test_the_order_of_the_classes_does_not_matter(family: Path, tokenizer: Any, tmp_path: Path) -> None:
    turn(family / "code", tmp_path / "turned", [2, 0, 1])
    rows = samples()
    named = [{"text": row["text"], "label": LABELS[row["label"]]} for row in rows]
    records = []
    for code in (family / "code", tmp_path / "turned"):
        for data in (rows, named):
            specs = {"math": str(family / "math"), "code": str(code), "merged": str(family / "base")}
            roles = {"math": "expert", "code": "expert", "merged": "merged"}
            records.append(evaluate_classifiers(ModelSet(specs, roles, processing_class=tokenizer), {"data": data}))
    first, *others = records
    for other in others:
        assert [score.metrics for score in other.scores] == [score.metrics for score in first.scores]
        assert other.distances == first.distances


def test_other_classes_are_not_compared(family: Path, tokenizer: Any, tmp_path: Path) -> None:
    other = BertForSequenceClassification.from_pretrained(family / "code")
    other.config.id2label = dict(enumerate(["red", "green", "blue"]))
    other.save_pretrained(tmp_path)
    models = ModelSet({"math": str(family / "math"), "code": str(tmp_path)}, {"math": "expert", "code": "expert"})
    models = dataclasses.replace(models, processing_class=tokenizer)
    with pytest.raises(ArgumentError, match="different classes: no, maybe, yes and red, green, blue"):
        evaluate_classifiers(models, {"data": samples()})
