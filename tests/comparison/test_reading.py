"""Classifiers of images in comparisons and searches, against plain forward passes; models that cannot be compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click_runner import click_runner
from PIL import Image
from scipy.special import log_softmax
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    BertConfig,
    BertModel,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from hf_frmerge import FisherRaoMerger, MergingArguments, WeightSearch
from hf_frmerge.cli.main import main
from hf_frmerge.comparison.comparison import MergeComparison
from hf_frmerge.comparison.texts import digest_of, split_texts
from hf_frmerge.errors import ArgumentError
from hf_frmerge.evaluation.comparison_record import load_comparison
from hf_frmerge.evaluation.text.datasets import read_texts

LABELS = ["cat", "dog", "owl"]


def save_classifier(folder: Path, seed: int, size: int = 16) -> str:
    torch.manual_seed(seed)
    names = {"id2label": dict(enumerate(LABELS)), "label2id": {name: i for i, name in enumerate(LABELS)}}
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, image_size=16, patch_size=8,
        **names,
    )  # fmt: skip
    model = ViTForImageClassification(config)
    with torch.no_grad():  # as they are made, classifiers hardly tell one image from another
        for parameter in model.parameters():
            parameter.mul_(3)
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": size, "width": size}).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    generator = np.random.default_rng(3)
    for number in range(24):
        folder = tmp_path / "zoo" / LABELS[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (20, 14, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    return tmp_path / "zoo"


@pytest.fixture
def experts(tmp_path: Path) -> list[str]:
    return [save_classifier(tmp_path / name, seed) for seed, name in enumerate("ab")]


def naive_loss(folder: str, rows: Any) -> float:
    model = AutoModelForImageClassification.from_pretrained(folder, dtype=torch.float64).eval()
    processor = AutoImageProcessor.from_pretrained(folder)
    losses = []
    for row in rows:
        pixels = processor(Image.open(row["image"]).convert("RGB"), return_tensors="pt")["pixel_values"].double()
        with torch.no_grad():
            losses.append(-log_softmax(model(pixels).logits[0].numpy())[model.config.label2id[row["label"]]])
    return float(np.mean(losses))


def test_classifiers_of_images_are_compared_by_their_labels(tmp_path: Path, zoo: Path, experts: list[str]) -> None:
    out = tmp_path / "comparison"
    command = ["compare", *experts, "--data", f"zoo={zoo}", "--method", "linear", "--method", "karcher"]
    result = click_runner().invoke(main, [*command, "--output-dir", str(out), "--device", "cpu"])
    assert result.exit_code == 0, result.output
    record = load_comparison(out)
    test = split_texts("zoo", read_texts(zoo), None, max_tokens=0, seed=42, reads="images")["test"]
    assert record.texts["test"]["zoo"] == {"texts": 18, "predictions": 18}
    assert len(record.methods) == 2
    for row in record.methods:
        merged = str(tmp_path / row.method)
        FisherRaoMerger(experts, MergingArguments(merged, method=row.method, **row.options)).merge()
        assert row.by_place["zoo"] == pytest.approx(-naive_loss(merged, test.rows), rel=1e-4)


def test_weights_of_classifiers_of_images_are_searched(tmp_path: Path, zoo: Path, experts: list[str]) -> None:
    args = MergingArguments(output_dir=str(tmp_path / "search"), space="weights")
    record = WeightSearch(experts, {"zoo": read_texts(zoo)}, by="greedy", args=args).run()
    rows = split_texts("zoo", read_texts(zoo), None, max_tokens=0, seed=42, reads="images")["test"].rows
    for chosen in record.chosen:
        merged = str(tmp_path / "merged")
        options = MergingArguments(merged, method="linear", space="weights", overwrite=True)
        FisherRaoMerger(experts, options, list(chosen.weights)).merge()
        assert chosen.by_place["zoo"] == pytest.approx(-naive_loss(merged, rows), rel=1e-4)


def test_images_are_known_by_their_pixels(tmp_path: Path, zoo: Path) -> None:
    def digest(rows: Any) -> str:
        return digest_of({"zoo": split_texts("zoo", rows, None, max_tokens=0, seed=1, reads="images")["test"]})

    rows: Any = read_texts(zoo)
    opened = [{**row, "image": Image.open(row["image"])} for row in rows]
    assert digest(rows) == digest(opened)
    last = Path(rows[-1]["image"])
    for place, row in enumerate(rows):  # a row of the test part, whichever it is
        Image.new("RGB", (14, 20), (place, 0, 0)).save(row["image"])
    assert last.exists() and digest(rows) != digest(opened)


def test_experts_that_prepare_images_differently_are_refused(tmp_path: Path, zoo: Path, experts: list[str]) -> None:
    other = save_classifier(tmp_path / "c", 3, size=8)
    with pytest.raises(ArgumentError, match=r"prepares them differently.*size in preprocessor_config.json"):
        MergeComparison(
            [experts[0], other], {"zoo": read_texts(zoo)}, args=MergingArguments(str(tmp_path / "o"))
        ).run()


@pytest.mark.parametrize("command", ["compare", "search"])
def test_models_that_predict_nothing_are_refused_with_what_measures_them(tmp_path: Path, command: str) -> None:
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        config = BertConfig(
            vocab_size=24, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
        )
        BertModel(config).save_pretrained(tmp_path / name)
    data = tmp_path / "texts.jsonl"
    data.write_text("".join(f'{{"input_ids": [{n}, {n + 1}, 2]}}\n' for n in range(8)))
    experts = [str(tmp_path / "a"), str(tmp_path / "b")]
    result = click_runner().invoke(main, [command, *experts, "--data", str(data), "--output-dir", str(tmp_path / "o")])
    assert result.exit_code == 2
    assert "The experts are BertModel, which predicts neither a next token nor a label" in result.stderr
    assert "`frmerge evaluate` says" in " ".join(result.stderr.split())
