"""Classifiers of images: against plain forward passes of transformers in float64, from folders, tables and pixels."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from click_runner import click_runner
from PIL import Image
from scipy.special import log_softmax
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from hf_frmerge.cli.main import main
from hf_frmerge.errors import ArgumentError
from hf_frmerge.evaluation.record import EvaluationRecord, load_record
from hf_frmerge.evaluation.suite.merge_evaluation import evaluate_merge
from hf_frmerge.evaluation.suite.settings import ModelSet, RunSettings, SuiteOptions
from hf_frmerge.evaluation.text.datasets import read_texts

LABELS = ["cat", "dog", "owl"]
NAMES = {"id2label": dict(enumerate(LABELS)), "label2id": {name: i for i, name in enumerate(LABELS)}}
SMALL = {"image_size": 16, "patch_size": 8, "num_channels": 3}
KINDS: dict[str, Any] = {
    "vit": lambda: ViTForImageClassification(
        ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, **SMALL, **NAMES)
    ),
    "swin": lambda: SwinForImageClassification(
        SwinConfig(**{**SMALL, "patch_size": 2}, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4, **NAMES)
    ),
    "resnet": lambda: ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", **NAMES)
    ),
}


def save_family(root: Path, kind: str) -> dict[str, str]:
    specs = {}
    for seed, name in enumerate(("merged", "a", "b")):
        torch.manual_seed(seed)
        model = KINDS[kind]()
        with torch.no_grad():  # as they are made, classifiers hardly tell one image from another
            for parameter in model.parameters():
                parameter.mul_(3)
        model.save_pretrained(root / name)
        ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(root / name)
        specs[name] = str(root / name)
    return specs


def pictures(root: Path, n: int = 9) -> Path:
    """Folders of pictures for the labels: in colour, grey, and with a palette."""
    generator = np.random.default_rng(3)
    for number in range(n):
        folder = root / LABELS[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(generator.integers(0, 256, (20, 14, 3), dtype=np.uint8))
        picture.convert(("RGB", "L", "P")[number // 3 % 3]).save(folder / f"{number}.png")
    (root / ".hidden").mkdir()
    return root


def naive(folder: str, root: Path) -> tuple[np.ndarray, list[int], list[np.ndarray]]:
    """Log-probabilities and labels one image at a time, in float64, and the hidden states of every layer, (n, d)."""
    model = AutoModelForImageClassification.from_pretrained(folder, dtype=torch.float64).eval()
    processor = AutoImageProcessor.from_pretrained(folder)
    rows, labels, layers = [], [], dict[int, list[np.ndarray]]()
    for label in sorted(LABELS):
        for file in sorted((root / label).iterdir()):
            pixels = processor(Image.open(file).convert("RGB"), return_tensors="pt")["pixel_values"].double()
            with torch.no_grad():
                output = model(pixels, output_hidden_states=True)
            rows.append(log_softmax(output.logits[0].numpy()))
            labels.append(model.config.label2id[label])
            for number, states in enumerate(output.hidden_states):
                places = states[0].flatten(1).T if states.dim() == 4 else states[0]
                layers.setdefault(number, []).append(places.numpy())
    return np.stack(rows), labels, [np.concatenate(layers[number]) for number in layers]


def evaluate(specs: dict[str, str], rows: Any, **options: Any) -> EvaluationRecord:
    roles: Any = {name: "merged" if name == "merged" else "expert" for name in specs}
    models = ModelSet(specs, roles, processing_class=options.pop("processing_class", None))
    return evaluate_merge(models, {"zoo": rows}, SuiteOptions(dtype="float32", **options), RunSettings())


@pytest.mark.parametrize("kind", KINDS)
def test_scores_distances_and_layers_are_the_naive_ones(tmp_path: Path, kind: str) -> None:
    specs, root = save_family(tmp_path, kind), pictures(tmp_path / "zoo")
    record = evaluate(specs, read_texts(root), batch_size=4)
    found = {name: naive(folder, root) for name, folder in specs.items()}
    for score in record.scores:
        log_probs, labels, _ = found[score.model]
        assert score.n_samples == 9
        assert score.metrics["loss"] == pytest.approx(-log_probs[range(9), labels].mean(), rel=1e-4)
        assert score.metrics["accuracy"] == (log_probs.argmax(1) == labels).mean()
    distances = {(row.model, row.other): row for row in record.distances}
    assert set(distances) == {("merged", "a"), ("merged", "b"), ("b", "a")}
    for (model, other), row in distances.items():
        overlap = np.exp((found[model][0] + found[other][0]) / 2).sum(1)
        assert row.fisher_rao.mean == pytest.approx(2 * np.arccos(overlap.clip(max=1)).mean(), rel=1e-3)
    for layer in record.layers:
        states = found[layer.model][2][layer.layer]
        assert layer.activation_variance == pytest.approx(states.var(axis=0).mean(), rel=1e-4)
    assert len(record.layers) == 3 * len(found["a"][2])


def test_tables_pixels_and_streams_give_the_same(tmp_path: Path) -> None:
    specs, root = save_family(tmp_path, "vit"), pictures(tmp_path / "zoo")
    rows = read_texts(root)
    wanted = evaluate(specs, rows).to_dict()
    table = datasets.Dataset.from_list([dict(row) for row in rows])
    decoded = table.cast_column("image", datasets.Image())
    decoded.to_parquet(tmp_path / "zoo.parquet")
    processor = AutoImageProcessor.from_pretrained(specs["a"])
    pixels = [
        {
            "pixel_values": processor(Image.open(row["image"]).convert("RGB"), return_tensors="pt")["pixel_values"][0],
            "label": row["label"],
        }
        for row in rows
    ]
    for variant in (decoded, decoded.to_iterable_dataset(), read_texts(tmp_path / "zoo.parquet"), pixels):
        assert evaluate(specs, variant).to_dict() == wanted


def test_labels_are_told_by_name_whatever_their_order(tmp_path: Path) -> None:
    specs, root = save_family(tmp_path, "vit"), pictures(tmp_path / "zoo")
    wanted = evaluate(specs, read_texts(root))
    turned = [2, 0, 1]
    model = ViTForImageClassification.from_pretrained(specs["b"])
    with torch.no_grad():
        model.classifier.weight.copy_(model.classifier.weight[turned].clone())
        model.classifier.bias.copy_(model.classifier.bias[turned].clone())
    model.config.id2label = {row: LABELS[old] for row, old in enumerate(turned)}
    model.config.label2id = {name: row for row, name in model.config.id2label.items()}
    model.save_pretrained(specs["b"])
    actual = evaluate(specs, read_texts(root))
    assert [score.metrics for score in actual.scores] == [
        {name: pytest.approx(value) for name, value in score.metrics.items()} for score in wanted.scores
    ]
    assert [row.fisher_rao.mean for row in actual.distances] == [
        pytest.approx(row.fisher_rao.mean) for row in wanted.distances
    ]


def test_the_commands_merge_and_measure(tmp_path: Path) -> None:
    specs, root = save_family(tmp_path, "vit"), pictures(tmp_path / "zoo")
    out = tmp_path / "out"
    merge = ["merge", specs["a"], specs["b"], "--method", "linear", "--output-dir", str(out), "--disable-tqdm"]
    result = click_runner().invoke(main, merge)
    assert result.exit_code == 0, result.output
    result = click_runner().invoke(main, ["evaluate", str(out), "--data", f"zoo={root}", "--card"])
    assert result.exit_code == 0, result.output
    assert "Accuracy (higher is better), 9 samples" in result.output
    record = load_record(out)
    assert record is not None
    log_probs, labels, _ = naive(str(out), root)
    (score,) = [score for score in record.scores if score.model == "merged"]
    assert score.metrics["accuracy"] == (log_probs.argmax(1) == labels).mean()
    assert "9 samples (zoo)" in (out / "README.md").read_text()
    page = tmp_path / "page.html"
    assert click_runner().invoke(main, ["report", str(out), "--output", str(page)]).exit_code == 0
    assert "Accuracy" in page.read_text()


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([{"text": "a cat", "label": "cat"}], "needs a column `image` or `pixel_values`, found"),
        ([{"image": "no/such.png", "label": "cat"}], "has no image in no/such.png"),
        ([{"image": {"bytes": b"no picture", "path": None}, "label": "cat"}], "has no image in its bytes"),
        ([{"image": np.zeros((8, 8, 3), np.uint8)}], "needs a column `label`"),
        ([{"image": np.zeros((8, 8, 3), np.uint8), "label": "cow"}], "has the label 'cow', but the classifier knows"),
    ],
)
def test_rows_that_do_not_fit_are_named(tmp_path: Path, rows: list[Any], says: str) -> None:
    specs = save_family(tmp_path, "vit")
    with pytest.raises(ArgumentError, match=says):
        evaluate(specs, rows)


def test_processors_are_needed_and_have_to_agree(tmp_path: Path) -> None:
    specs = save_family(tmp_path, "vit")
    rows = [{"image": np.full((8, 8, 3), 200, np.uint8), "label": "owl"}]
    settings = tmp_path / "b/preprocessor_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"image_mean": [0.1, 0.2, 0.3]}))
    with pytest.raises(ArgumentError, match="'b' prepares them differently than 'merged': image_mean"):
        evaluate(specs, rows)
    own = AutoImageProcessor.from_pretrained(specs["a"])
    assert evaluate(specs, rows, processing_class=own).scores  # as the message says
    for name in specs:
        (tmp_path / name / "preprocessor_config.json").unlink()
    with pytest.raises(ArgumentError, match=r"no preprocessor_config\.json beside the model"):
        evaluate(specs, rows)
    own.save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other/preprocessor_config.json", tmp_path / "merged")
    assert evaluate(specs, rows).scores


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty/cat").mkdir(parents=True)
    with pytest.raises(ArgumentError, match="is a folder without images"):
        read_texts(tmp_path / "empty")
