"""Calibrated merges of classifiers: encoders that end their blocks with norms, with biases, on padded prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
)

from hf_frmerge import FisherRaoMerger, MergingArguments
from hf_frmerge.calibration.prompts.read_prompts import read_prompts, split_prompts
from hf_frmerge.errors import ArgumentError
from hf_frmerge.merging.record.manifest import read_manifest
from hf_frmerge.provenance.verify import verify
from hf_frmerge.wording.calibration import calibration_verdict

N_LABELS, N_PROMPTS = 3, 48
CLASSES = {
    "bert": (
        BertForSequenceClassification,
        BertConfig(
            vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_labels=N_LABELS, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        ),
    ),
    "gpt2": (
        GPT2ForSequenceClassification,
        GPT2Config(
            vocab_size=60, n_embd=32, n_layer=2, n_head=4, n_positions=32, num_labels=N_LABELS, pad_token_id=0,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        ),
    ),
}  # fmt: skip


def samples(expert: int, seed: int) -> tuple[list[list[int]], list[int]]:
    """Texts of an expert's own words, of many lengths; their class is the word that occurs most often."""
    rng = np.random.default_rng([seed, expert])
    labels = rng.integers(0, N_LABELS, N_PROMPTS).tolist()
    words = 20 * expert
    texts = []
    for label in labels:
        text = rng.integers(words + 4, words + 20, rng.integers(4, 12))
        text[: len(text) // 2] = words + 1 + label
        texts.append(rng.permutation(text).tolist())
    return texts, labels


def padded(texts: list[list[int]]) -> dict[str, torch.Tensor]:
    ids = torch.zeros(len(texts), max(map(len, texts)), dtype=torch.long)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = torch.tensor(text)
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


@pytest.fixture(scope="module", params=CLASSES)
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    model_class, config = CLASSES[request.param]
    torch.manual_seed(0)
    model_class(config).save_pretrained(folder / "base")
    for number in range(3):
        torch.manual_seed(number + 1)
        model = model_class.from_pretrained(folder / "base").train()
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        for step in range(40):
            texts, labels = samples(number, seed=100 + step)
            optimizer.zero_grad()
            model(**padded(texts), labels=torch.tensor(labels)).loss.backward()
            optimizer.step()
        model.save_pretrained(folder / f"full{number}")
    return model_class, folder


def distance_to_experts(model_class: Any, merged: Path, folder: Path) -> float:
    """Mean squared Fisher–Rao distance on fresh samples, by transformers alone."""
    distances = []
    model = model_class.from_pretrained(merged).eval()
    for number in range(3):
        expert = model_class.from_pretrained(folder / f"full{number}").eval()
        inputs = padded(samples(number, seed=1)[0])
        with torch.no_grad():
            p, q = (m(**inputs).logits.double().softmax(-1) for m in (model, expert))
        distances.append((2 * torch.arccos((p * q).sqrt().sum(-1).clamp(max=1))).square().mean())
    return float(torch.stack(distances).mean())


def test_encoders_without_a_head_are_judged_by_their_hidden_states(models: tuple[Any, Path], tmp_path: Path) -> None:
    """Models of embeddings, and classifiers of different labels, of which only what is before the head is merged."""
    model_class, folder = models
    bare = {"BertForSequenceClassification": "bert", "GPT2ForSequenceClassification": "transformer"}
    for name in ("base", *(f"full{number}" for number in range(3))):
        getattr(model_class.from_pretrained(folder / name), bare[model_class.__name__]).save_pretrained(
            tmp_path / name
        )
    experts = [str(tmp_path / f"full{number}") for number in range(3)]
    prompts = {expert: samples(number, seed=0)[0] for number, expert in enumerate(experts)}
    args = MergingArguments(output_dir=str(tmp_path / "out"), method="linear", disable_tqdm=True)
    FisherRaoMerger(experts, args, base_model=str(tmp_path / "base"), calibration_dataset=prompts).merge()
    record = read_manifest(tmp_path / "out").calibration
    assert record is not None and record.form != "start" and record.options["judged_by"] == "hidden_states"
    assert "the squared angle of its hidden states to the experts'" in calibration_verdict(record).text

    start = MergingArguments(output_dir=str(tmp_path / "start"), method="linear", disable_tqdm=True)
    FisherRaoMerger(experts, start).merge()
    read = read_prompts(
        prompts, None, experts=experts, n_samples=64, max_length=128, seed=start.seed, vocab_size=60, packing=False
    )
    _, held_out = split_prompts(read, 1 / 8, start.seed)
    for name, form in (("start", "start"), ("out", record.form)):
        merged = AutoModel.from_pretrained(tmp_path / name).eval()
        for own, expert, distance in zip(held_out, experts, record.distances[form], strict=True):
            inputs = padded([ids.tolist() for ids in own.token_ids])
            with torch.no_grad():
                pair = (merged, AutoModel.from_pretrained(expert).eval())
                one, other = (model(**inputs).last_hidden_state.double() for model in pair)
            cosine = torch.cosine_similarity(one, other, dim=-1)[inputs["attention_mask"].bool()]
            angles = torch.arccos(cosine.clamp(max=1))
            assert distance == pytest.approx(float(angles.square().mean()), rel=0.05)  # matrices in bfloat16
    assert record.mean_distance(record.form) < 0.7 * record.mean_distance("start")


def test_a_fitted_classifier_is_closer_to_its_experts(models: tuple[Any, Path], tmp_path: Path) -> None:
    model_class, folder = models
    experts = [str(folder / f"full{number}") for number in range(3)]
    prompts = {expert: samples(number, seed=0)[0] for number, expert in enumerate(experts)}
    for name, calibration in (("start", None), ("out", prompts)):
        args = MergingArguments(output_dir=str(tmp_path / name), method="linear", disable_tqdm=True)
        FisherRaoMerger(experts, args, base_model=str(folder / "base"), calibration_dataset=calibration).merge()
    record = read_manifest(tmp_path / "out").calibration
    assert record is not None and record.form != "start"
    assert record.prompts == (42,) * 3 and record.held_out == (6,) * 3
    before, after = (distance_to_experts(model_class, tmp_path / name, folder) for name in ("start", "out"))
    assert after < 0.8 * before
    report = verify(str(tmp_path / "out"))
    assert report.ok, report.problems


@pytest.mark.parametrize("method", ["regmean", "regmean++", "fisher"])
def test_methods_with_prompts_merge_classifiers(models: tuple[Any, Path], tmp_path: Path, method: str) -> None:
    """Padded prompts of many lengths; RegMean is nearer to the experts than the plain average, Fisher need not be."""
    model_class, folder = models
    experts = [str(folder / f"full{number}") for number in range(3)]
    prompts = {expert: samples(number, seed=0)[0] for number, expert in enumerate(experts)}
    for name, options in (("average", {"method": "linear"}), ("out", {"method": method})):
        args = MergingArguments(output_dir=str(tmp_path / name), disable_tqdm=True, **options)
        FisherRaoMerger(experts, args, calibration_dataset=prompts if name == "out" else None).merge()
    before, after = (distance_to_experts(model_class, tmp_path / name, folder) for name in ("average", "out"))
    record = read_manifest(tmp_path / "out").calibration
    assert record is not None and record.options["method"] == method
    assert after < before or method == "fisher"
    gained = record.mean_distance("dense") / record.mean_distance("start")
    assert gained == pytest.approx(after / before, rel=0.3, abs=0.25)
    assert verify(str(tmp_path / "out")).ok


def test_fisher_information_needs_predictions(models: tuple[Any, Path], tmp_path: Path) -> None:
    model_class, folder = models
    bare = {"BertForSequenceClassification": "bert", "GPT2ForSequenceClassification": "transformer"}
    experts = [str(tmp_path / f"full{number}") for number in range(2)]
    for number, expert in enumerate(experts):
        model = model_class.from_pretrained(folder / f"full{number}")
        getattr(model, bare[model_class.__name__]).save_pretrained(expert)
    out = tmp_path / "out"
    with pytest.raises(ArgumentError, match=r"(Bert|GPT2)Model gives no probabilities.*such as regmean"):
        args = MergingArguments(output_dir=str(out), method="fisher", disable_tqdm=True)
        FisherRaoMerger(experts, args, calibration_dataset=samples(0, seed=0)[0]).merge()
    assert not out.exists()
    with pytest.raises(ArgumentError, match="does not write text, so it cannot write prompts of its own"):
        args = MergingArguments(output_dir=str(out), disable_tqdm=True)
        FisherRaoMerger(experts, args, calibration_dataset="self").merge()
    assert not out.exists()
    args = MergingArguments(output_dir=str(out), method="regmean", disable_tqdm=True)
    FisherRaoMerger(experts, args, calibration_dataset=samples(0, seed=0)[0]).merge()
    assert verify(str(out)).ok


def test_biases_norms_and_flipped_weights_have_coefficients_too(models: tuple[Any, Path], tmp_path: Path) -> None:
    """Derived again from the record's table: GPT-2 stores inputs as rows, so that a weight has one row for all."""
    model_class, folder = models
    experts = [str(folder / f"full{number}") for number in range(3)]
    prompts = {expert: samples(number, seed=0)[0] for number, expert in enumerate(experts)}
    out = tmp_path / "out"
    args = MergingArguments(
        output_dir=str(out), method="linear", space="deltas", calibration_form="table", disable_tqdm=True
    )
    FisherRaoMerger(experts, args, base_model=str(folder / "base"), calibration_dataset=prompts).merge()
    manifest = read_manifest(out)
    record = manifest.calibration
    assert record is not None and record.form == "table"
    assert record.mean_distance("table") < 0.95 * record.mean_distance("start")
    assert not (out / "merge_corrections.safetensors").exists() and verify(str(out)).ok

    table = load_file(out / "merge_coefficients.safetensors")
    merged = load_file(out / "model.safetensors")
    # As transformers names them: some versions save norms under their old names.
    base, *others = (model_class.from_pretrained(path).state_dict() for path in (folder / "base", *experts))
    fitted = {name for name, tensor in manifest.tensors.items() if tensor.is_fitted}
    is_bert = model_class is BertForSequenceClassification
    in_blocks = {name for name in merged if ("encoder.layer." if is_bert else ".h.") in name and merged[name].ndim}
    behind = ("bert.pooler.", "classifier.") if is_bert else ("transformer.ln_f.", "score.")
    assert fitted == {name for name in in_blocks if not name.endswith((".attn.bias", "masked_bias"))} | {
        name for name in merged if name.startswith(behind)
    }
    for name in fitted:
        is_whole = "LayerNorm" in name or ".ln_" in name or ".h." in name
        assert len(table[name]) == (1 if is_whole else len(merged[name]))
        origin = base[name].double()
        columns = table[name].T.reshape(3, -1, *[1] * (merged[name].ndim - 1))
        expected = origin + sum(c * (expert[name] - origin) for c, expert in zip(columns, others))
        torch.testing.assert_close(merged[name].double(), expected, rtol=1e-5, atol=1e-6)
    layer = "bert.encoder.layer.1.output.dense" if is_bert else "transformer.h.1.mlp.c_proj"
    assert torch.equal(table[f"{layer}.weight"], table[f"{layer}.bias"])  # both began as the plain average
