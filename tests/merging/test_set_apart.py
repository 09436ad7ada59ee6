"""Tensors left out and tensors taken whole from one model, against float64 means of the others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click_runner import click_runner
from merge_reference import random_model, write_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, BertConfig, BertForMaskedLM, BertForSequenceClassification

from hf_frmerge import FisherRaoMerger, MergingArguments
from hf_frmerge.cli.main import main
from hf_frmerge.errors import ArgumentError, CheckpointError
from hf_frmerge.provenance.merge_again import reproduce
from hf_frmerge.provenance.verify import verify

SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2, "pad_token_id": 0, "max_position_embeddings": 20}


def save_classifier(folder: Path, labels: list[str], seed: int) -> str:
    torch.manual_seed(seed)
    config = BertConfig(**SIZES, id2label=dict(enumerate(labels)), label2id={n: i for i, n in enumerate(labels)})
    BertForSequenceClassification(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def classifiers(tmp_path: Path) -> tuple[str, str]:
    """Classifiers of three and of five labels."""
    return (
        save_classifier(tmp_path / "three", ["a", "b", "c"], 1),
        save_classifier(tmp_path / "five", ["v", "w", "x", "y", "z"], 2),
    )


def merge(experts: list[str], out: Path, base: str | None = None, **options: Any) -> dict[str, torch.Tensor]:
    FisherRaoMerger(experts, MergingArguments(str(out), method="linear", **options), base_model=base).merge()
    return load_file(out / "model.safetensors")


def mean(experts: tuple[str, str], name: str) -> torch.Tensor:
    one, two = (load_file(f"{expert}/model.safetensors")[name] for expert in experts)
    return ((one.double() + two.double()) / 2).to(one.dtype)


def accounts(out: Path) -> list[dict[str, Any]]:
    return json.loads((out / "merge_manifest.json").read_text())["report"]["accounts"]


def test_heads_of_other_sizes_are_left_out(classifiers: tuple[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    merged = merge(list(classifiers), out, leave_out=["^classifier"])
    stored = load_file(f"{classifiers[0]}/model.safetensors")
    assert merged.keys() == {name for name in stored if not name.startswith("classifier")}
    assert all(torch.equal(tensor, mean(classifiers, name)) for name, tensor in merged.items())
    for each in accounts(out):
        assert each["unused"] == {"left out on request": 2}
        assert each["n_tensors"] == len(stored) == each["n_merged"] + 2
    notes = json.loads((out / "merge_manifest.json").read_text())["notes"]
    assert any(note.startswith("The output lacks classifier.bias, classifier.weight, on request.") for note in notes)
    assert f"Accounted for all {2 * len(stored)} tensors of 2 models" in (out / "README.md").read_text()
    assert verify(str(out)).ok and reproduce(str(out)).identical


@pytest.mark.parametrize("named", [lambda experts: experts[1], lambda experts: "2"])
def test_a_head_is_taken_from_one_expert_with_its_labels(
    classifiers: tuple[str, str], tmp_path: Path, named: Any
) -> None:
    out = tmp_path / "out"
    command = ["merge", *classifiers, "--output-dir", str(out), "--method", "linear"]
    result = click_runner().invoke(main, [*command, "--take", f"^classifier={named(classifiers)}"])
    assert result.exit_code == 0, result.output
    model, info = BertForSequenceClassification.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert model.config.id2label == dict(enumerate("vwxyz"))
    theirs = load_file(f"{classifiers[1]}/model.safetensors")
    for name, tensor in load_file(out / "model.safetensors").items():
        wanted = theirs[name] if name.startswith("classifier") else mean(classifiers, name)
        assert torch.equal(tensor, wanted), name
    first, second = accounts(out)
    assert first["unused"] == {"that gave way to another model's": 2} and not second["unused"]
    assert second["n_copied"] == 2
    assert verify(str(out)).ok and reproduce(str(out)).identical
    assert "Accounted for" not in (out / "README.md").read_text()  # nothing is missing
    record = (out / "merge_manifest.json").read_text() + (out / "README.md").read_text()
    assert "^classifier=2" in json.loads(record[: record.index("\n}") + 2])["arguments"]["take"]
    assert str(tmp_path) not in record


def test_a_tensor_is_taken_from_the_base(tmp_path: Path) -> None:
    base = random_model(0)
    models = [write_model(tmp_path / f"e{i}", random_model(i + 1, base=base)) for i in range(2)]
    origin = write_model(tmp_path / "base", base)
    out = tmp_path / "out"
    merged = merge(models, out, origin, take=[r"embed_tokens=base", r"layers\.1\.=1"])
    first = load_file(f"{models[0]}/model.safetensors")
    for name, tensor in merged.items():
        whole = base if "embed" in name else first if "layers.1." in name else None
        assert torch.equal(tensor, mean((models[0], models[1]), name) if whole is None else whole[name]), name
    assert verify(str(out)).ok


def test_a_head_of_another_class_comes_with_the_class(tmp_path: Path, classifiers: tuple[str, str]) -> None:
    torch.manual_seed(0)
    BertForMaskedLM(BertConfig(**SIZES)).save_pretrained(tmp_path / "base")
    out = tmp_path / "out"
    options = {"leave_out": [r"^cls\."], "take": ["^classifier=1", r"^bert\.pooler=1"]}
    merged = merge(list(classifiers), out, str(tmp_path / "base"), **options)
    model, info = AutoModelForSequenceClassification.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert type(model) is BertForSequenceClassification and model.config.id2label == dict(enumerate("abc"))
    name = "bert.encoder.layer.0.output.dense.weight"
    assert torch.equal(merged[name], mean(classifiers, name))


def test_heads_of_adapters_are_left_out(tmp_path: Path) -> None:
    torch.manual_seed(0)
    BertForMaskedLM(BertConfig(**SIZES)).save_pretrained(tmp_path / "base")
    folded = []
    for seed, n_labels in enumerate((3, 5)):
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=n_labels)
        config = LoraConfig(
            task_type="SEQ_CLS", r=2, target_modules=["query"], init_lora_weights=False, modules_to_save=["pooler"]
        )
        torch.manual_seed(seed)
        adapted = get_peft_model(model, config)
        adapted.save_pretrained(tmp_path / f"a{seed}")
        folded.append(adapted.merge_and_unload().state_dict())
    adapters = [str(tmp_path / f"a{seed}") for seed in range(2)]
    with pytest.raises(CheckpointError, match="differ in size"):
        merge(adapters, tmp_path / "out", str(tmp_path / "base"))
    options: dict[str, Any] = {"leave_out": ["classifier", "pooler"], "adapter_output": "merged"}
    merged = merge(adapters, tmp_path / "out", str(tmp_path / "base"), **options)
    assert merged.keys() == load_file(tmp_path / "base/model.safetensors").keys()
    name = "bert.encoder.layer.1.attention.self.query.weight"
    wanted = (folded[0][name].double() + folded[1][name].double()) / 2
    torch.testing.assert_close(merged[name], wanted.float(), rtol=1e-6, atol=1e-7)
    assert [each["unused"] for each in accounts(tmp_path / "out")[:2]] == [{"left out on request": 4}] * 2
    assert verify(str(tmp_path / "out")).ok


def test_modules_are_left_out_of_a_merged_adapter(tmp_path: Path) -> None:
    torch.manual_seed(0)
    BertForMaskedLM(BertConfig(**SIZES)).save_pretrained(tmp_path / "base")
    for seed in range(2):
        config = LoraConfig(r=2, target_modules=["query", "value"], init_lora_weights=False)
        get_peft_model(BertForMaskedLM.from_pretrained(tmp_path / "base"), config).save_pretrained(
            tmp_path / f"a{seed}"
        )
    adapters = [str(tmp_path / f"a{seed}") for seed in range(2)]
    out = tmp_path / "out"
    FisherRaoMerger(adapters, MergingArguments(str(out), leave_out=[r"layer\.0\."])).merge()
    names = load_file(out / "adapter_model.safetensors").keys()
    assert len(names) == 4 and not any("layer.0." in name for name in names)
    assert json.loads((out / "adapter_config.json").read_text())["target_modules"]
    assert [each["unused"] for each in accounts(out)] == [{"left out on request": 4}] * 2
    assert verify(str(out)).ok
    with pytest.raises(ArgumentError, match="nothing left to merge"):
        FisherRaoMerger(adapters, MergingArguments(str(tmp_path / "no"), leave_out=["layer"])).merge()
    with pytest.raises(ArgumentError, match="which no adapter can hold"):
        args = MergingArguments(str(tmp_path / "no"), take=["layer=1"], adapter_output="adapter")
        FisherRaoMerger(adapters, args).merge()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"leave_out": ["clasifier"]}, "'clasifier' matches none of the tensors of the models, such as"),
        ({"take": ["clasifier=2"]}, "'clasifier' matches none of the tensors of the models, such as"),
        ({"take": ["three=2"], "leave_out": ["classifier"]}, "'three' matches none of the tensors of the models"),
        ({"leave_out": ["."]}, "there is nothing left to merge. Write rules that match less"),
        ({"take": ["classifier=3"]}, "'3' is none of the experts.*from 1 to 2"),
        ({"take": ["classifier=base"]}, "no base model was given"),
        (
            {"take": ["classifier=1", "weight=2"]},
            "'classifier.weight' matches the rule 'weight' of `take` and another",
        ),
        ({"take": ["classifier=1"], "leave_out": ["bias"]}, "'classifier.bias' matches the rule 'classifier'"),
        ({"take": ["classifier"]}, "must read REGEX=EXPERT"),
        ({"leave_out": ["("]}, "`leave_out`: '\\(' is not a regular expression"),
    ],
)
def test_rules_that_say_nothing_are_refused(
    classifiers: tuple[str, str], tmp_path: Path, options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ArgumentError, match=sentence):
        merge(list(classifiers), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_sizes_that_no_head_explains_are_refused(tmp_path: Path) -> None:
    one = save_classifier(tmp_path / "one", ["a", "b"], 1)
    torch.manual_seed(2)
    BertForSequenceClassification(BertConfig(**SIZES | {"vocab_size": 50})).save_pretrained(tmp_path / "two")
    with pytest.raises(CheckpointError, match=r"has no place for bert\.embeddings\.word_embeddings\.weight"):
        merge([one, str(tmp_path / "two")], tmp_path / "out", take=["word_embeddings=2"])


def test_an_inspection_ends_with_the_account(tmp_path: Path) -> None:
    base = random_model(0)
    models = [write_model(tmp_path / f"e{i}", random_model(i + 1, base=base)) for i in range(2)]
    shown = click_runner().invoke(main, ["inspect", *models])
    assert f"Accounted for all {2 * len(base)} tensors of 2 models: {2 * len(base)} measured." in shown.output
    described = json.loads(click_runner().invoke(main, ["inspect", *models, "--json"]).stdout)
    whole = {"n_tensors": len(base), "n_merged": len(base), "n_copied": 0, "unused": {}}
    assert described["accounts"] == [whole, whole]
