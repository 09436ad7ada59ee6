"""Merges by Fisher information, from prompts to a folder that is checked and made again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from hf_frmerge import FisherRaoMerger, MergingArguments
from hf_frmerge.calibration.sweep import Sweep
from hf_frmerge.checkpoints.resolve import resolve
from hf_frmerge.errors import ArgumentError, ResumeError
from hf_frmerge.evaluation.models.identity import model_identity
from hf_frmerge.fisher import files as fisher_files
from hf_frmerge.merging.record.manifest import read_manifest
from hf_frmerge.provenance.merge_again import reproduce
from hf_frmerge.provenance.verify import verify

VOCABULARY, LENGTH, N_PROMPTS = 20, 8, 16
WEIGHTS = [0.7, 0.3]


def prompts(expert: int) -> list[list[int]]:
    """Each expert has seen half of the tokens."""
    ids: list[list[int]] = np.random.default_rng(expert).integers(0, 10, (N_PROMPTS, LENGTH)).tolist()
    return [[10 * expert + token for token in row] for row in ids]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(root / "base")
    for number in range(2):
        model = LlamaForCausalLM.from_pretrained(root / "base")
        torch.manual_seed(number)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        model.save_pretrained(root / f"full{number}")
        lora = LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        adapted = get_peft_model(LlamaForCausalLM.from_pretrained(root / "base"), lora)
        adapted.save_pretrained(root / f"lora{number}")
    return root


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_FRMERGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "fisher"


def merger(models: Path, out: Path, kind: str = "full", **options: Any) -> FisherRaoMerger:
    experts = [str(models / f"{kind}{number}") for number in range(2)]
    calibration = {expert: prompts(number) for number, expert in enumerate(experts)}
    args = MergingArguments(
        output_dir=str(out), max_calibration_length=LENGTH, disable_tqdm=True, dtype="float32",
        **({"method": "fisher"} | options),
    )  # fmt: skip
    return FisherRaoMerger(
        experts, args, weights=WEIGHTS, base_model=str(models / "base"), calibration_dataset=calibration
    )


def whole(models: Path, kind: str) -> list[dict[str, torch.Tensor]]:
    if kind == "full":
        return [load_file(models / f"full{number}" / "model.safetensors") for number in range(2)]
    bases = [LlamaForCausalLM.from_pretrained(models / "base") for _ in range(2)]
    adapted = [PeftModel.from_pretrained(base, models / f"lora{i}") for i, base in enumerate(bases)]
    return [model.merge_and_unload().state_dict() for model in adapted]


@pytest.mark.parametrize(("kind", "scale"), [("full", 1.0), ("full", 0.5), ("lora", 1.0)])
def test_values_are_averaged_by_information(
    models: Path, tmp_path: Path, cache: Path, kind: str, scale: float
) -> None:
    options: dict[str, Any] = {} if scale == 1 else {"space": "deltas", "scale": scale}
    merger(models, tmp_path / "out", kind, **options).merge()
    stored = {}
    for file in cache.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            record = json.loads(opened.metadata()["fisher"])
        assert record["estimator"] == "sampled labels" and record["n_predictions"] > 100
        stored[record["model"][0]] = load_file(file)
    information = [stored[model_identity(resolve(str(models / f"{kind}{number}")))] for number in range(2)]
    experts = whole(models, kind)
    base, merged = load_file(models / "base/model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    norms = [sum(float(f.double().square().sum()) for f in each.values()) ** 0.5 for each in information]
    for name, tensor in merged.items():
        values = [expert[name].double() for expert in experts]
        expected = sum(w * x for w, x in zip(WEIGHTS, values))
        if ".layers." in name and not torch.equal(*values):
            fs = [each[name].double() / norm for each, norm in zip(information, norms)]
            least = 1e-3 * sum(w * f.mean() for w, f in zip(WEIGHTS, fs))
            fs = [w * f.clamp(min=float(least)) for w, f in zip(WEIGHTS, fs)]
            average, expected = expected, sum(f * x for f, x in zip(fs, values)) / sum(fs)
            assert float((expected - average).abs().max()) > 0.01
        expected = base[name].double() + scale * (expected - base[name].double())
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-4, atol=1e-5)

    record = read_manifest(tmp_path / "out").calibration
    assert record is not None and record.form == "dense" and record.options["method"] == "fisher"
    report = verify(str(tmp_path / "out"))
    assert report.ok, report.problems
    assert not reproduce(str(tmp_path / "out")).differences


def test_information_is_estimated_once(
    models: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merger(models, tmp_path / "out").merge()
    kept = {file: file.read_bytes() for file in cache.iterdir()}
    damaged = sorted(kept)[0]
    damaged.write_bytes(kept[damaged][:100])
    asked: list[int] = []
    estimate = fisher_files.diagonal_fisher
    monkeypatch.setattr(fisher_files, "diagonal_fisher", lambda *a, **k: (asked.append(1), estimate(*a, **k))[1])
    merger(models, tmp_path / "again").merge()
    assert asked == [1]  # the damaged one
    assert {file: file.read_bytes() for file in cache.iterdir()} == kept
    names = ("model.safetensors", "merge_corrections.safetensors")
    assert all((tmp_path / "again" / n).read_bytes() == (tmp_path / "out" / n).read_bytes() for n in names)


def test_what_it_cannot_write_is_refused_before_anything_is(models: Path, tmp_path: Path, cache: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ArgumentError, match=r"no adapter can express it\. Use adapter_output='merged'"):
        merger(models, out, "lora", adapter_output="adapter").merge()
    with pytest.raises(ArgumentError, match=r"'fisher' gives has no low rank\. Leave out calibration_form='low_rank'"):
        merger(models, out, calibration_form="low_rank").merge()
    assert not out.exists() and not cache.exists()
    merger(models, out, "lora").merge()  # without an option, adapters become a whole model
    assert (out / "model.safetensors").exists()


class Killed(Exception):
    pass


@pytest.mark.parametrize("method", ["fisher", "regmean++"])
def test_an_interrupted_merge_goes_on_to_the_same_bits(
    models: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    fit, fitted = Sweep.fit_block, []

    def fit_block(self: Sweep, index: int, known: Any) -> Any:
        fitted.append(index if known is None else None)
        if fitted == [0, 1]:
            raise Killed
        return fit(self, index, known)

    monkeypatch.setattr(Sweep, "fit_block", fit_block)
    with pytest.raises(Killed):
        merger(models, tmp_path / "out", method=method).merge()
    with pytest.raises(ResumeError, match=r"option method"):
        merger(models, tmp_path / "out", method="regmean").merge(resume_from_checkpoint=True)
    merger(models, tmp_path / "out", method=method).merge(resume_from_checkpoint=True)
    assert fitted == [0, 1, None, 1]
    merger(models, tmp_path / "whole", method=method).merge()
    for name in ("model.safetensors", "merge_corrections.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
