"""Classifiers whose labels are in another order: which rows belong together, and what has no mean."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

from hf_frmerge.checkpoints.alignment.align import align
from hf_frmerge.checkpoints.alignment.class_order import class_names, row_order
from hf_frmerge.errors import CheckpointError
from hf_frmerge.merging.arguments.merging_arguments import MergingArguments
from hf_frmerge.merging.engine.engine import StepObserver
from hf_frmerge.merging.engine.processes import Processes
from hf_frmerge.merging.planning.build_plan import build_plan
from hf_frmerge.merging.run import run_merge
from hf_frmerge.provenance.verify import verify

CONFIG = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
LABELS = ["no", "maybe", "yes"]
ORDER = [2, 0, 1]
IDS = torch.arange(12).view(1, -1)


def save(folder: Path, labels: list[str], seed: int = 1, order: list[int] | None = None) -> Any:
    """A classifier; with `order` the rows of its head are in another order."""
    config = BertConfig(**CONFIG, num_attention_heads=2, max_position_embeddings=16)
    config.id2label, config.label2id = dict(enumerate(labels)), {label: row for row, label in enumerate(labels)}
    torch.manual_seed(0)
    model = BertForSequenceClassification(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
        for parameter in model.classifier.parameters() if order else ():
            parameter.copy_(parameter[order].clone())
    model.save_pretrained(folder)
    return model.eval()


def merge(experts: list[Path], out: Path, base: Path | None = None, **options: Any) -> Any:
    plan = build_plan(
        list(map(str, experts)), MergingArguments(str(out), **options), None, str(base) if base else None
    )
    run_merge(plan, StepObserver(), Processes())
    return plan


@pytest.mark.parametrize("block", ["tensor", "row"])
@pytest.mark.parametrize("space", ["weights", "deltas"])
@pytest.mark.parametrize("method", ["karcher", "ties"])
def test_rows_are_matched_by_label(tmp_path: Path, method: str, space: str, block: str) -> None:
    if method == "ties" and (space, block) != ("deltas", "tensor"):
        pytest.skip("TIES knows one space and one block")
    for name, seed in (("base", 3), ("a", 1), ("b", 2)):
        save(tmp_path / name, LABELS, seed)
    save(tmp_path / "b-turned", [LABELS[row] for row in ORDER], 2, ORDER)
    base = tmp_path / "base" if space == "deltas" else None
    options = {"method": method, "space": space, **({} if method == "ties" else {"block": block})}
    merge([tmp_path / "a", tmp_path / "b"], tmp_path / "same", base, **options)
    plan = merge([tmp_path / "a", tmp_path / "b-turned"], tmp_path / "turned", base, **options)
    same, turned = (load_file(tmp_path / name / "model.safetensors") for name in ("same", "turned"))
    assert all(torch.equal(same[name], turned[name]) for name in same)
    assert class_names(json.loads((tmp_path / "turned/config.json").read_text())) == LABELS
    (note,) = [note for note in plan.notes if "orders its classes differently" in note]
    assert "classifier.weight, classifier.bias" in note or "classifier.bias, classifier.weight" in note
    assert verify(tmp_path / "turned").ok


def test_the_output_predicts_what_both_predict(tmp_path: Path) -> None:
    model = save(tmp_path / "a", LABELS)
    save(tmp_path / "b", [LABELS[row].upper() for row in ORDER], order=ORDER)
    merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(IDS).logits, model(IDS).logits)


def test_other_classes_are_refused_and_the_advice_works(tmp_path: Path) -> None:
    save(tmp_path / "a", LABELS)
    save(tmp_path / "b", ["red", "green", "blue"], seed=2)
    with pytest.raises(
        CheckpointError, match=r"classifiers of different classes \(no, maybe, yes; red.*mix the rows"
    ) as refused:
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    heads, one_head = re.findall(r"--(?:leave-out|take) '(.*?)'", str(refused.value))
    plan = merge([tmp_path / "a", tmp_path / "b"], tmp_path / "bare", leave_out=[heads])
    assert plan.steps and not any("classifier" in step.name for step in plan.steps)
    plan = merge([tmp_path / "a", tmp_path / "b"], tmp_path / "with", take=[one_head.replace("EXPERT", "2")])
    assert sorted(step.name for step in plan.steps if step.donor == 1) == ["classifier.bias", "classifier.weight"]
    labels = json.loads((tmp_path / "with/config.json").read_text())["id2label"]
    assert list(labels.values()) == ["red", "green", "blue"]
    # The other advice: the same names.
    config = json.loads((tmp_path / "a/config.json").read_text())
    other = json.loads((tmp_path / "b/config.json").read_text())
    other |= {key: config[key] for key in ("id2label", "label2id")}
    (tmp_path / "b/config.json").write_text(json.dumps(other))
    merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out")


def test_heads_of_other_sizes_are_told_apart_from_vocabularies(tmp_path: Path, open_folder_as: Any) -> None:
    save(tmp_path / "a", LABELS)
    save(tmp_path / "b", list("vwxyz"))
    with pytest.raises(CheckpointError, match="heads of classifiers with 3 and 5 labels, which have no mean"):
        align([open_folder_as(tmp_path / name) for name in "ab"])


def test_an_order_that_the_donor_does_not_tell_is_refused(tmp_path: Path, open_folder_as: Any) -> None:
    save(tmp_path / "base", ["LABEL_0", "LABEL_1", "LABEL_2"])
    save(tmp_path / "a", LABELS)
    save(tmp_path / "b", [LABELS[row] for row in ORDER])
    base, a, b = (open_folder_as(tmp_path / name, name) for name in ("base", "a", "b"))
    with pytest.raises(CheckpointError, match=r"config\.json of 'base', which the output gets, names none"):
        align([a, b], base)
    align([a, a], base)  # all that name their classes agree


def test_an_unknown_class_with_another_order_is_refused(tmp_path: Path, open_folder_as: Any) -> None:
    for name, labels in (("a", LABELS), ("b", [LABELS[row] for row in ORDER])):
        save(tmp_path / name, labels)
        config = json.loads((tmp_path / name / "config.json").read_text()) | {"architectures": ["Mine"]}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="nothing tells which of their tensors have a row for every class"):
        align([open_folder_as(tmp_path / name) for name in "ab"])


@pytest.mark.parametrize(
    ("wanted", "actual", "order"),
    [
        ("abc", "cab", (1, 2, 0)),
        ("abc", "ABC", (0, 1, 2)),
        ("abc", "abd", None),
        ("aab", "aba", None),
    ],
)
def test_the_row_of_every_class(wanted: str, actual: str, order: tuple[int, ...] | None) -> None:
    assert row_order(wanted, actual) == order


@pytest.mark.parametrize(
    ("config", "names"),
    [
        ({}, None),
        ({"id2label": {"0": "LABEL_0", "1": "LABEL_1"}}, None),
        ({"id2label": {"10": "k", "9": "j", "0": "a"}}, ["a", "j", "k"]),
        ({"id2label": {"0": "score"}}, None),
    ],
)
def test_names_of_classes_in_a_config(config: dict[str, Any], names: list[str] | None) -> None:
    assert class_names(config) == names
