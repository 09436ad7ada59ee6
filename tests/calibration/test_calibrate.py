"""Calibrated merges of small models, from prompts to a folder that is loaded, checked, made again and gone on with."""

from __future__ import annotations

import json
import re
import shutil
from importlib.resources import files
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from click_runner import click_runner
from jsonschema import Draft202012Validator
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_frmerge import FisherRaoMerger, MergingArguments
from hf_frmerge.calibration.sweep import Sweep
from hf_frmerge.cli.main import main
from hf_frmerge.errors import ArgumentError, CheckpointError, ResumeError
from hf_frmerge.merging.outputs.shard_output import ShardOutput
from hf_frmerge.merging.record.manifest import SCHEMA_FILE, read_manifest
from hf_frmerge.provenance.diff import diff_merges
from hf_frmerge.provenance.merge_again import reproduce
from hf_frmerge.provenance.verify import verify

VOCABULARY, LENGTH, N_PROMPTS = 60, 16, 32


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, three LoRA experts of it, and three full fine-tunes; and those of a base with a head of its own."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    llama = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.1, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(llama).save_pretrained(folder / "base")
    llama.tie_word_embeddings = False
    LlamaForCausalLM(llama).save_pretrained(folder / "untied")
    for number in range(3):
        torch.manual_seed(number + 1)
        lora = get_peft_model(
            LlamaForCausalLM.from_pretrained(folder / "base"),
            LoraConfig(r=2, lora_alpha=4, target_modules="all-linear"),
        )
        full, untied = (LlamaForCausalLM.from_pretrained(folder / base) for base in ("base", "untied"))
        for kind, model, rate in (("lora", lora, 1e-2), ("full", full, 2e-3), ("untied", untied, 2e-3)):
            train(model, number, rate)
            model.save_pretrained(folder / f"{kind}{number}")
    return folder


def train(model: torch.nn.Module, expert: int, rate: float) -> None:
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), rate)
    for step in range(60):
        ids = torch.tensor(prompts(expert, seed=100 + step))
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()


def prompts(expert: int, seed: int = 0) -> list[list[int]]:
    """Walks in an expert's domain: 20 tokens of its own, each of which has one that follows it, but for some noise."""
    follows = np.random.default_rng(expert).permutation(20)
    rng = np.random.default_rng([seed, expert])
    walks = rng.integers(0, 20, (N_PROMPTS, LENGTH))
    for place in range(1, LENGTH):
        walks[:, place] = np.where(rng.random(N_PROMPTS) < 0.8, follows[walks[:, place - 1]], walks[:, place])
    return (20 * expert + walks).tolist()


def merger(models: Path, out: Path, kind: str = "lora", **options: Any) -> FisherRaoMerger:
    experts = [str(models / f"{kind}{number}") for number in range(3)]
    calibration = options.pop("calibration", {expert: prompts(i) for i, expert in enumerate(experts)})
    defaults = {
        "method": "linear",
        "max_calibration_length": LENGTH,
        "disable_tqdm": True,
        "calibration_rank": 4,
        "num_calibration_samples": N_PROMPTS,
        "adapter_output": "merged" if kind == "lora" else "auto",
    }
    args = MergingArguments(output_dir=str(out), **{**defaults, **options})
    return FisherRaoMerger(experts, args, base_model=str(base_of(models, kind)), calibration_dataset=calibration)


def base_of(models: Path, kind: str) -> Path:
    return models / ("untied" if kind == "untied" else "base")


def distance_to_experts(models: Path, out: Path, kind: str = "lora") -> float:
    """Mean squared Fisher–Rao distance on fresh prompts, by transformers and PEFT alone."""
    merged = LlamaForCausalLM.from_pretrained(out, dtype=torch.float64).eval()
    total = 0.0
    for number in range(3):
        if kind == "lora":
            base = LlamaForCausalLM.from_pretrained(models / "base", dtype=torch.float64)
            expert = PeftModel.from_pretrained(base, models / f"lora{number}").eval()
        else:
            expert = LlamaForCausalLM.from_pretrained(models / f"{kind}{number}", dtype=torch.float64).eval()
        ids = torch.tensor(prompts(number, seed=1))
        with torch.no_grad():
            p, q = (model(ids).logits.softmax(-1) for model in (merged, expert))
        total += float((2 * torch.arccos((p * q).sqrt().sum(-1).clamp(max=1))).square().mean())
    return total / 3


@pytest.mark.parametrize("form", ["dense", "low_rank"])
@pytest.mark.parametrize("kind", ["lora", "full", "untied"])
def test_a_calibrated_merge_is_closer_to_its_experts_and_can_be_checked(
    models: Path, tmp_path: Path, kind: str, form: str
) -> None:
    merger(models, tmp_path / "start", kind, calibration=None).merge()
    merger(models, tmp_path / "out", kind, calibration_form=form).merge()
    record = read_manifest(tmp_path / "out").calibration
    assert record is not None and record.form == form
    assert record.prompts == (28,) * 3 and record.held_out == (4,) * 3
    assert 0.9 < record.tokens / (3 * N_PROMPTS * LENGTH) <= 1  # the rest of the text is a short prompt

    changes = {
        change.what: change.b for change in diff_merges(str(tmp_path / "start"), str(tmp_path / "out")).arguments
    }
    assert changes["fitted to prompts"] == record.digest and changes["form of the fit"] == form

    before, after = (distance_to_experts(models, tmp_path / name, kind) for name in ("start", "out"))
    assert after < 0.9 * before
    # What the record says of four prompts an expert is what transformers and PEFT say of others, roughly.
    assert record.mean_distance(form) / record.mean_distance("start") == pytest.approx(after / before, abs=0.2)

    report = verify(str(tmp_path / "out"))
    assert report.ok, report.problems
    reproduction = reproduce(str(tmp_path / "out"), output_dir=str(tmp_path / "again"))
    assert not reproduction.differences
    notes = [read_manifest(tmp_path / name).report.notes for name in ("out", "again")]
    assert notes[0] == notes[1] and not any("changes nothing" in note for note in notes[0])


@pytest.mark.parametrize("form", ["table", "low_rank", "dense"])
def test_a_head_that_is_the_embedding_is_judged_as_it_is_written(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    """What enters the blocks has changed with it; here by so much that it would not have been kept."""
    monkeypatch.setattr("hf_frmerge.calibration.fits.head_fit._ENOUGH", np.inf)
    merger(models, tmp_path / "out", "full", calibration_form=form, space="deltas").merge()
    record = read_manifest(tmp_path / "out").calibration
    assert record is not None and record.form == form
    written, base = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", models / "base"))
    mean = sum(
        load_file(models / f"full{number}/model.safetensors")["model.embed_tokens.weight"] for number in range(3)
    )
    assert (
        not torch.allclose(written["model.embed_tokens.weight"], mean / 3, atol=1e-3) and "lm_head.weight" not in base
    )
    assert record.mean_distance(form) == pytest.approx(distance_to_experts(models, tmp_path / "out", "full"), rel=0.1)
    assert verify(str(tmp_path / "out")).ok


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("lora", {}),
        ("full", {"space": "deltas"}),
        ("full", {"space": "deltas", "block": "row", "method": "karcher"}),
        ("untied", {"space": "deltas"}),
    ],
)
def test_a_fit_in_the_form_of_coefficients_is_a_merge_of_rows_like_any_other(
    models: Path, tmp_path: Path, kind: str, options: dict[str, str]
) -> None:
    merger(models, tmp_path / "start", kind, calibration=None, **options).merge()
    merger(models, tmp_path / "out", kind, calibration_form="table", **options).merge()
    manifest = read_manifest(tmp_path / "out")
    record = manifest.calibration
    assert record is not None and record.form == "table"
    before, after = (distance_to_experts(models, tmp_path / name, kind) for name in ("start", "out"))
    assert after < before
    assert record.mean_distance("table") / record.mean_distance("start") == pytest.approx(after / before, abs=0.2)

    # The weights are the sum of the experts by the coefficients of the record, in float64.
    assert not (tmp_path / "out/merge_corrections.safetensors").exists()
    table = load_file(tmp_path / "out/merge_coefficients.safetensors")
    base = load_file(base_of(models, kind) / "model.safetensors")
    experts = [dense_weights(models, kind, number) for number in range(3)]
    merged = load_file(tmp_path / "out/model.safetensors")
    fitted = {name for name, tensor in manifest.tensors.items() if tensor.is_fitted}
    assert {name for name in fitted if "norm" not in name} == {n for n in merged if "proj" in n or "lm_head" in n}
    for name in fitted:
        rows = table[name]
        assert rows.shape == (1 if "norm" in name else len(merged[name]), 3)
        origin = base[name].double()
        columns = rows.T.reshape(3, -1, *[1] * (merged[name].ndim - 1))
        expected = origin + sum(c * (expert[name] - origin) for c, expert in zip(columns, experts))
        torch.testing.assert_close(merged[name].double(), expected, rtol=1e-5, atol=1e-6)
        geometry = manifest.tensors[name].geometry
        assert geometry is not None
        points = [(expert[name] - origin).norm() for expert in experts]
        length = (expected - origin).norm() / (sum(points) / 3)
        if name.endswith("proj.weight"):  # mean of the norms of rows, which is that of the tensor if rows are alike
            assert geometry.norm_ratio == pytest.approx(float(length), rel=0.1)

    report = verify(str(tmp_path / "out"))
    assert report.ok, report.problems
    assert not reproduce(str(tmp_path / "out")).differences
    changes = {c.what: c.b for c in diff_merges(str(tmp_path / "start"), str(tmp_path / "out")).arguments}
    assert changes["form of the fit"] == "table"
    schema = json.loads(files("hf_frmerge.merging.record").joinpath(SCHEMA_FILE).read_text(encoding="utf-8"))
    Draft202012Validator(schema).validate(json.loads((tmp_path / "out/merge_manifest.json").read_text()))


def test_lengths_are_said_to_be_of_what_was_measured(models: Path, tmp_path: Path) -> None:
    """Coefficients of a fit are measured with the rest; what is added to a merge is not."""
    for form, said in (
        ("table", "This merge keeps"),
        ("dense", "Before it was fitted to its experts, this merge kept"),
    ):
        merger(models, tmp_path / form, calibration_form=form).merge()
        assert said in (tmp_path / form / "README.md").read_text()


def dense_weights(models: Path, kind: str, number: int) -> dict[str, torch.Tensor]:
    """Weights of an expert in float64, as transformers and PEFT give them."""
    path = models / f"{kind}{number}"
    if kind != "lora":
        return {name: values.double() for name, values in load_file(path / "model.safetensors").items()}
    base = LlamaForCausalLM.from_pretrained(models / "base", dtype=torch.float64)
    return PeftModel.from_pretrained(base, path).merge_and_unload().state_dict()


def test_an_interrupted_table_goes_on_to_the_same_bits(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, whole, fit = tmp_path / "out", tmp_path / "whole", Sweep.fit_block

    def fit_block(self: Sweep, index: int, known: Any) -> Any:
        if index == 1:
            raise Killed
        return fit(self, index, known)

    def die(*_: Any) -> None:
        raise Killed

    for place, name, action in ((Sweep, "fit_block", fit_block), (ShardOutput, "sync", die)):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, action)
            with pytest.raises(Killed):
                merger(models, out, calibration_form="table").merge(resume_from_checkpoint=out.exists())
        assert not (out / "config.json").exists()
    merger(models, out, calibration_form="table").merge(resume_from_checkpoint=True)
    merger(models, whole, calibration_form="table").merge()
    for name in ("model.safetensors", "merge_coefficients.safetensors"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    assert verify(str(out)).ok


def test_a_table_that_cannot_be_is_refused_with_what_helps(models: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for options, advice in (
        ({"adapter_output": "adapter"}, "adapter_output='merged'"),
        ({"method": "ties"}, "method='karcher'"),
        ({"method": "regmean"}, "method='karcher'"),
        ({"method": "karcher", "post_step": "svc"}, "leave out post_step"),
        ({"space": "weights"}, "space='deltas' and a base_model"),
    ):
        with pytest.raises(ArgumentError, match=rf"form='table' .*Use calibration_form='auto', or {advice}"):
            merger(models, out, calibration_form="table", **options).merge()
    assert not out.exists()


def test_a_record_whose_fitted_coefficients_are_gone_is_refused(models: Path, tmp_path: Path) -> None:
    merger(models, tmp_path / "out", calibration_form="table").merge()
    file = tmp_path / "out/merge_coefficients.safetensors"
    table = load_file(file)
    name = next(name for name in table if "proj" in name)
    save_file({n: rows for n, rows in table.items() if n != name}, file, metadata={"space": "deltas"})
    with pytest.raises(CheckpointError, match=rf"no coefficients of '{re.escape(name)}', which was fitted"):
        reproduce(str(tmp_path / "out"))


@pytest.mark.parametrize("options", [{}, {"adapter_rank": 8}, {"adapter_rank_pattern": "uniform"}])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_adapters_are_fitted_into_an_adapter(
    models: Path, tmp_path: Path, architecture: str, options: dict[str, Any]
) -> None:
    """What PEFT makes of it is the fitted whole model. GPT-2 stores its weights the other way round."""
    if architecture == "gpt2":
        models = tmp_path
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=32)
        GPT2LMHeadModel(config).save_pretrained(models / "base")
        for number in range(3):
            lora = LoraConfig(r=2, lora_alpha=4, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)
            model = get_peft_model(GPT2LMHeadModel.from_pretrained(models / "base"), lora)
            train(model, number, 1e-2)
            model.save_pretrained(models / f"lora{number}")
    merger(models, tmp_path / "adapter", adapter_output="auto", **options).merge()
    # The rank that is left beside the experts' 3 x 2.
    rank = options.get("adapter_rank", 10) - 6
    merger(models, tmp_path / "whole", calibration_form="low_rank", calibration_rank=rank).merge()

    record = read_manifest(tmp_path / "adapter").calibration
    assert record is not None and record.form == "low_rank" and record.options["rank"] == rank
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == 6 + rank and not (options.get("adapter_rank_pattern") and config["rank_pattern"])
    base = AutoModelForCausalLM.from_pretrained(models / "base")
    merged = PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload().state_dict()
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "whole").state_dict()
    start = AutoModelForCausalLM.from_pretrained(models / "base").state_dict()
    assert expected.keys() == merged.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(merged[name], tensor, rtol=1e-5, atol=1e-6)
    assert any(not torch.equal(start[name], tensor) for name, tensor in expected.items())

    report = verify(str(tmp_path / "adapter"))
    assert report.ok, report.problems
    assert not reproduce(str(tmp_path / "adapter")).differences
    details = read_manifest(tmp_path / "adapter").tensors
    name = next(name for name in details if "mlp" in name)
    delta = merged[name] - start[name]
    assert details[name].norm is not None
    assert details[name].norm == pytest.approx(float(delta.norm()), rel=1e-4)


def test_verify_notices_another_correction(models: Path, tmp_path: Path) -> None:
    merger(models, tmp_path / "out", calibration_form="dense").merge()
    file = tmp_path / "out" / "merge_corrections.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 0x40
    file.write_bytes(data)
    problems = verify(str(tmp_path / "out")).problems
    assert any("merge_corrections.safetensors was changed" in problem for problem in problems)
    assert any("differs from what its experts" in problem for problem in problems)


def test_the_start_is_written_where_the_fit_brings_nothing(models: Path, tmp_path: Path) -> None:
    """Experts that all are the same model leave nothing to gain."""
    args = MergingArguments(
        output_dir=str(tmp_path / "out"), method="linear", max_calibration_length=LENGTH, disable_tqdm=True
    )
    twins = [str(models / "full0"), shutil.copytree(models / "full0", tmp_path / "twin")]
    FisherRaoMerger(list(map(str, twins)), args, calibration_dataset=prompts(0)).merge()
    record = read_manifest(tmp_path / "out").calibration
    assert record is not None and record.form == "start" and record.mean_distance("start") < 1e-6
    assert not (tmp_path / "out" / "merge_corrections.safetensors").exists()
    expected, merged = load_file(models / "full0" / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    assert all(torch.equal(merged[name], expected[name]) for name in expected)


class Killed(Exception):
    pass


@pytest.mark.parametrize("kind", ["lora", "untied"])
def test_an_interrupted_calibration_goes_on_to_the_same_bits(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    out, whole, fit = tmp_path / "out", tmp_path / "whole", Sweep.fit_block
    fitted: list[int] = []

    def fit_block(self: Sweep, index: int, known: Any) -> Any:
        if known is None:
            fitted.append(index)
        if fitted == [0, 1] and known is None:
            raise Killed
        return fit(self, index, known)

    monkeypatch.setattr(Sweep, "fit_block", fit_block)
    with pytest.raises(Killed):
        merger(models, out, kind).merge()
    assert not (out / "config.json").exists()
    with pytest.raises(ResumeError, match=r"started differently \(prompts\)"):
        merger(models, out, kind, calibration={str(models / f"{kind}0"): prompts(0, seed=7)}).merge(
            resume_from_checkpoint=True
        )
    for name, damage in (
        ("calibration-key.json", b'{"prompts"'),
        ("calibration-key.json", b"[]"),
        ("calibration-key.json", b"\xff"),
        ("calibrated-0000.safetensors", b"\xff" * 50),
        ("calibration.json", b'{"prompts": [1], "prompts": [2]}'),
        ("calibration.json", b'{"prompts": "many"}'),
    ):
        path = out / ".frmerge" / name
        intact = path.read_bytes() if path.exists() else None
        path.write_bytes(damage)
        with pytest.raises(ResumeError, match=rf"{name} .*(damaged|is not what).*Pass --overwrite to start anew"):
            merger(models, out, kind).merge(resume_from_checkpoint=True)
        path.unlink() if intact is None else path.write_bytes(intact)
    merger(models, out, kind).merge(resume_from_checkpoint=True)
    assert fitted == [0, 1, 1]
    merger(models, whole, kind).merge()
    for name in ("model.safetensors", "merge_corrections.safetensors"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name


def test_prompts_may_begin_with_a_token_that_is_embedded_as_zeros(models: Path, tmp_path: Path) -> None:
    """As padding mostly is. It stays zero through all blocks, so by its size nothing else would count."""
    zero = VOCABULARY - 1
    for name in ("base", "full0", "full1", "full2"):
        model = LlamaForCausalLM.from_pretrained(models / name)
        with torch.no_grad():
            model.model.embed_tokens.weight[zero] = 0
        model.save_pretrained(tmp_path / name)
    calibration = {str(tmp_path / f"full{number}"): [[zero, *ids] for ids in prompts(number)] for number in range(3)}
    merger(tmp_path, tmp_path / "without", "full").merge()
    merger(tmp_path, tmp_path / "with", "full", calibration=calibration).merge()
    fitted, expected = (distance_to_experts(tmp_path, tmp_path / name, "full") for name in ("with", "without"))
    assert fitted < 1.1 * expected


def test_what_cannot_be_calibrated_is_refused_before_anything_is_written(models: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ArgumentError, match="calibration_form='low_rank', or adapter_output='merged'"):
        merger(models, out, adapter_output="adapter", calibration_form="dense").merge()
    for option in ({"adapter_rank": 6}, {"adapter_energy": 0.9}):
        with pytest.raises(ArgumentError, match="Leave out adapter_energy, and set adapter_rank above 6"):
            merger(models, out, adapter_output="auto", **option).merge()
    adapters = [str(models / f"lora{number}") for number in range(2)]
    with pytest.raises(ArgumentError, match="Name it: base_model"):
        FisherRaoMerger(adapters, MergingArguments(output_dir=str(out)), calibration_dataset=prompts(0)).merge()
    for number in range(2):
        fsspec.filesystem("memory").put(str(models / f"full{number}"), f"/far{number}", recursive=True)
    with pytest.raises(ArgumentError, match="must be on this machine"):
        experts = [f"memory://far{number}" for number in range(2)]
        FisherRaoMerger(experts, MergingArguments(output_dir=str(out)), calibration_dataset=prompts(0)).merge()
    with pytest.raises(ArgumentError, match="None of the models has a tokenizer beside it"):
        merger(models, out, calibration="self").merge()
    with pytest.raises(ArgumentError, match="none of the experts"):
        merger(models, out, calibration={"nobody": prompts(0)}).merge()
    with pytest.raises(ArgumentError, match="block='tensor', 'row' or 'head'"):
        merger(models, out, "full", block="layer").merge()
    with pytest.raises(ArgumentError, match=r"without model.norm.weight \(leave_out\) it is not whole"):
        merger(models, out, "full", leave_out=[r"model\.norm"]).merge()
    with pytest.raises(ArgumentError, match="four prompts or more"):
        merger(models, out, calibration=prompts(0)[:2]).merge()
    config = T5Config(vocab_size=VOCABULARY, d_model=16, d_ff=24, num_layers=2, num_heads=2, d_kv=8)
    for number in range(2):
        T5ForConditionalGeneration(config).save_pretrained(tmp_path / f"t5-{number}")
    experts = [str(tmp_path / f"t5-{number}") for number in range(2)]
    with pytest.raises(ArgumentError, match="an encoder and a decoder"):
        FisherRaoMerger(experts, MergingArguments(output_dir=str(out)), calibration_dataset=prompts(0)).merge()
    assert not out.exists()


def test_an_expert_without_prompts_is_merged_all_the_same(
    models: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    experts = [str(models / f"lora{number}") for number in range(3)]
    merger(models, tmp_path / "out", calibration={expert: prompts(i) for i, expert in enumerate(experts[:2])}).merge()
    record = read_manifest(tmp_path / "out").calibration
    assert record is not None and record.prompts == (28, 28, 0)
    assert record.distances["start"][2] is None
    assert json.loads((tmp_path / "out/merge_manifest.json").read_text())["calibration"]["held_out"] == [4, 4, 0]
    assert "lora2" in caplog.text


def test_too_few_tokens_are_said_with_how_many_are_missing(
    models: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expert = str(models / "lora0")
    merger(models, tmp_path / "out", calibration={expert: prompts(0)[:2]}, max_calibration_length=6).merge()
    # Seven prompts of up to 6 tokens overlap by one; the widest layer has 48 inputs.
    fitted = sum(json.loads((tmp_path / "out/merge_manifest.json").read_text())["calibration"]["prompts"])
    (warning,) = (r.message for r in caplog.records if "fewer than the widest layer" in r.message)
    tokens, widest, missing = map(int, re.findall(r"\d+", warning))
    assert widest == 48 and missing == widest - tokens and 6 * (fitted - 1) < tokens <= 6 * fitted


def test_the_record_of_the_fit_is_on_the_card(models: Path, tmp_path: Path) -> None:
    merger(models, tmp_path / "out").merge()
    card = (tmp_path / "out/README.md").read_text()
    assert "fitted to what its experts compute on 84 prompts" in card
    assert "--calibration PROMPTS.jsonl" in card
    assert (
        "by a plain weighted average, and then fitted, layer by layer, to what they compute on a few prompts" in card
    )


def test_a_record_without_its_corrections_is_refused(models: Path, tmp_path: Path) -> None:
    merger(models, tmp_path / "out", calibration_form="dense").merge()
    (tmp_path / "out" / "merge_corrections.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has no merge_corrections\.safetensors"):
        reproduce(str(tmp_path / "out"))


def test_the_command_line_says_what_the_fit_gained(models: Path, tmp_path: Path) -> None:
    calibration = []
    for number in range(3):
        file = tmp_path / f"{number}.jsonl"
        file.write_text("".join(json.dumps({"input_ids": ids}) + "\n" for ids in prompts(number)))
        calibration += ["--calibration", f"{models / f'lora{number}'}={file}"]
    experts = [str(models / f"lora{number}") for number in range(3)]
    command = ["merge", *experts, "--base-model", str(models / "base"), "--disable-tqdm"]
    fitted = click_runner().invoke(
        main, [*command, *calibration, "--max-calibration-length", "16", "--output-dir", str(tmp_path / "fitted")]
    )
    assert fitted.exit_code == 0, fitted.stderr
    said = " ".join(fitted.stdout.split())
    assert re.search(r"fitted to what its experts compute on \d+ prompts, from files", said)
    assert "--calibration" not in said
    plain = click_runner().invoke(main, [*command, "--output-dir", str(tmp_path / "plain")])
    assert "--calibration self lets language models write them" in " ".join(plain.stdout.split())


@pytest.mark.parametrize("method", ["karcher", "ties", "dare_linear", "tsv_m"])
def test_corrections_are_added_to_what_any_method_gives(models: Path, tmp_path: Path, method: str) -> None:
    options = {"method": method, "space": "deltas"}
    merger(models, tmp_path / "start", "full", calibration=None, **options).merge()
    merger(models, tmp_path / "out", "full", calibration_form="dense", **options).merge()
    start, merged, corrections = (
        load_file(tmp_path / file)
        for file in ("start/model.safetensors", "out/model.safetensors", "out/merge_corrections.safetensors")
    )
    assert corrections
    for name, tensor in merged.items():
        expected = start[name] + corrections.get(name, torch.zeros(()))
        torch.testing.assert_close(tensor, expected, rtol=1e-6, atol=1e-7)
    report = verify(str(tmp_path / "out"))
    assert report.ok, report.problems


def test_a_merge_that_dies_after_the_fit_does_not_fit_again(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"

    def die(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(ShardOutput, "sync", die)
        with pytest.raises(Killed):
            merger(models, out).merge()
    assert not (out / "config.json").exists()
    with pytest.raises(ResumeError, match=r"started differently \(prompts\)"):
        merger(models, out, calibration={str(models / "lora0"): prompts(0, seed=7)}).merge(resume_from_checkpoint=True)
    path = out / ".frmerge" / "merge_corrections.safetensors"
    intact = path.read_bytes()
    path.write_bytes(intact[:-1] + bytes([intact[-1] ^ 1]))
    with pytest.raises(ResumeError, match=r"merge_corrections\.safetensors of .* is damaged.*--overwrite"):
        merger(models, out).merge(resume_from_checkpoint=True)
    path.write_bytes(intact)
    with monkeypatch.context() as patch:
        patch.setattr(Sweep, "fit_block", die)
        merger(models, out).merge(resume_from_checkpoint=True)
    merger(models, whole).merge()
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert verify(str(out)).ok


def test_what_no_adapter_changes_is_left_as_it_is(tmp_path: Path) -> None:
    """Adapters of some layers only, in a model whose layers have biases: the rest is copied, so it is not fitted."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.1,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "base")
    calibration = {}
    for number in range(2):
        torch.manual_seed(number + 1)
        lora = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj", "down_proj"])
        model = get_peft_model(Qwen2ForCausalLM.from_pretrained(tmp_path / "base"), lora)
        train(model, number, 1e-2)
        model.save_pretrained(tmp_path / f"expert{number}")
        calibration[str(tmp_path / f"expert{number}")] = prompts(number)
    args = MergingArguments(
        output_dir=str(tmp_path / "out"),
        method="linear",
        adapter_output="merged",
        calibration_form="dense",
        disable_tqdm=True,
    )
    FisherRaoMerger([*calibration], args, base_model=str(tmp_path / "base"), calibration_dataset=calibration).merge()
    manifest = read_manifest(tmp_path / "out")
    assert manifest.calibration is not None and manifest.calibration.form == "dense"
    merged = {name for name, tensor in manifest.tensors.items() if tensor.action == "merge"}
    assert {name.split(".")[-2] for name in merged} == {"q_proj", "v_proj", "down_proj"}
    assert load_file(tmp_path / "out/merge_corrections.safetensors").keys() == merged
