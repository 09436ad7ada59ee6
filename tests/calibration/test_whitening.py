"""Merges with lengths and angles by Fisher information, against the merge of whitened experts in float64."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from hf_frmerge import FisherRaoMerger, MergingArguments
from hf_frmerge.calibration import whitening
from hf_frmerge.checkpoints.resolve import resolve
from hf_frmerge.comparison.comparison import MergeComparison
from hf_frmerge.errors import ArgumentError, ResumeError
from hf_frmerge.evaluation.models.identity import model_identity
from hf_frmerge.fisher import files as fisher_files
from hf_frmerge.merging.engine.outcomes import StepObserver
from hf_frmerge.merging.engine.processes import Processes
from hf_frmerge.merging.outputs.memory_output import MemoryOutput
from hf_frmerge.merging.planning.build_plan import build_plan
from hf_frmerge.merging.record.manifest import read_manifest
from hf_frmerge.merging.run import merge_into_memory, run_merge
from hf_frmerge.provenance.merge_again import reproduce
from hf_frmerge.provenance.verify import verify
from hf_frmerge.weighting.continual import next_merge

VOCABULARY, LENGTH, N_PROMPTS, FLOOR = 20, 8, 16, 1e-3
WEIGHTS = [0.5, 0.3, 0.2]
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "c_attn", "c_proj", "c_fc")


def prompts(expert: int) -> list[list[int]]:
    ids: list[list[int]] = np.random.default_rng(expert).integers(0, 10, (N_PROMPTS, LENGTH)).tolist()
    return [[5 * expert + token for token in row] for row in ids]


def llama() -> Any:
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def gpt2() -> Any:
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=16))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`KIND/base`, `KIND/full0` ..., and for Llama adapters `lora0` ... with the full models `folded0` they give."""
    root = tmp_path_factory.mktemp("models")
    for kind, make in (("llama", llama), ("gpt2", gpt2)):
        torch.manual_seed(0)
        make().save_pretrained(root / kind / "base")
        for number in range(3):
            torch.manual_seed(0)
            model = make()
            torch.manual_seed(number + 1)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))
            model.save_pretrained(root / kind / f"full{number}")
    for number in range(3):
        torch.manual_seed(10 + number)
        lora = LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        adapted: Any = get_peft_model(LlamaForCausalLM.from_pretrained(root / "llama" / "base"), lora)
        adapted.save_pretrained(root / "llama" / f"lora{number}")
        adapted.merge_and_unload().save_pretrained(root / "llama" / f"folded{number}")
    return root


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_FRMERGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "fisher"


def experts_of(folder: Path, kind: str) -> list[str]:
    return [str(folder / f"{kind}{number}") for number in range(3)]


def merger(folder: Path, out: Path, kind: str = "full", **options: Any) -> FisherRaoMerger:
    experts = experts_of(folder, kind)
    prompts_given = None if options.pop("without_prompts", False) else dict(zip(experts, map(prompts, range(3))))
    args = MergingArguments(
        output_dir=str(out), max_calibration_length=LENGTH, disable_tqdm=True, dtype="float32",
        **({"space": "deltas", "adapter_output": "merged", "fisher": "diagonal"} | options),
    )  # fmt: skip
    return FisherRaoMerger(
        experts, args, weights=WEIGHTS, base_model=str(folder / "base"), calibration_dataset=prompts_given
    )


def information(cache: Path, folder: Path, kind: str = "full") -> list[dict[str, Any]]:
    """Of every expert: parameter -> diagonal, or layer -> (A, G), divided by the norm over all, from the files."""
    found = {}
    for file in cache.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            record = json.loads(opened.metadata()["fisher"])
        stored = {name: values.double().numpy() for name, values in load_file(file).items()}
        if record["kind"] == "diagonal":
            norm = sum(np.square(values).sum() for values in stored.values()) ** 0.5
            found[record["model"][0]] = {name: values / norm for name, values in stored.items()}
            continue
        layers = {}
        for name, first in record["owner"].items():
            pair = []
            for triangle in (stored[f"{first}.inputs"], stored[f"{name}.outputs"]):
                size = int((2 * len(triangle)) ** 0.5)
                matrix = np.zeros((size, size))
                matrix[np.triu_indices(size)] = triangle
                pair.append(matrix + np.triu(matrix, 1).T)
            layers[name] = pair
        norm = sum(np.square(np.kron(g, a)).sum() for a, g in layers.values()) ** 0.5
        found[record["model"][0]] = {name: (a, g / norm) for name, (a, g) in layers.items()}
    return [found[model_identity(resolve(expert))] for expert in experts_of(folder, kind)]


def metric(found: list[dict[str, Any]], name: str, *, is_flipped: bool) -> np.ndarray | None:
    """The mean information of a tensor as a dense matrix; `None` if it has none."""
    layer = name.removesuffix(".weight")
    if name in found[0]:
        mean = sum(w * each[name].flatten() for w, each in zip(WEIGHTS, found))
        return np.diag(np.maximum(mean, FLOOR * mean.mean()))
    if layer == name or layer not in found[0]:
        return None

    def damped(factor: np.ndarray) -> np.ndarray:
        return factor + FLOOR * factor.diagonal().mean() * np.eye(len(factor))

    products = [[damped(factor) for factor in each[layer]] for each in found]
    return np.asarray(
        sum(w * (np.kron(a, g) if is_flipped else np.kron(g, a)) for w, (a, g) in zip(WEIGHTS, products))
    )


def spherical_mean(points: list[np.ndarray], method: str) -> np.ndarray:
    """Weighted Karcher mean of the directions by the textbook iteration, or the plain mean's; of mean length."""
    lengths = [float(np.linalg.norm(x)) for x in points]
    mean = sum(w * x for w, x in zip(WEIGHTS, points))
    if method == "karcher":
        units = [x / length for x, length in zip(points, lengths)]
        mean = sum(w * u for w, u in zip(WEIGHTS, units))
        mean /= np.linalg.norm(mean)
        for _ in range(200):
            angles = [np.arccos(np.clip(u @ mean, -1, 1)) for u in units]
            step = sum(w * t / np.sin(t) * (u - np.cos(t) * mean) for w, t, u in zip(WEIGHTS, angles, units))
            size = np.linalg.norm(step)
            mean = np.cos(size) * mean + np.sinc(size / np.pi) * step
    return np.asarray(sum(w * n for w, n in zip(WEIGHTS, lengths)) * mean / np.linalg.norm(mean))


def whitened_mean(points: list[np.ndarray], weighted: np.ndarray | None, method: str, n_blocks: int) -> np.ndarray:
    """Multiply by the root of the information, merge, divide by the root, block by block."""
    flat = [x.reshape(n_blocks, -1) for x in points]
    size, rows = flat[0].shape[1], []
    for block in range(n_blocks):
        here = slice(block * size, (block + 1) * size)
        values, vectors = np.linalg.eigh(np.eye(size) if weighted is None else weighted[here, here])
        root, inverse = ((vectors * values**power) @ vectors.T for power in (0.5, -0.5))
        rows.append(inverse @ spherical_mean([root @ x[block] for x in flat], method))
    return np.concatenate(rows).reshape(points[0].shape)


CASES = [
    ("llama", "full", {"fisher": "diagonal"}),
    ("llama", "full", {"fisher": "kfac"}),
    ("llama", "full", {"fisher": "diagonal", "block": "row", "method": "nre", "scale": 0.5}),
    ("llama", "full", {"fisher": "kfac", "block": "row"}),
    ("llama", "full", {"fisher": "kfac", "space": "weights"}),
    ("llama", "lora", {"fisher": "diagonal"}),
    ("llama", "lora", {"fisher": "kfac", "method": "nre"}),
    ("gpt2", "full", {"fisher": "kfac", "block": "row"}),
    ("gpt2", "full", {"fisher": "diagonal", "space": "weights"}),
]


@pytest.mark.parametrize(("family", "kind", "options"), CASES)
def test_it_is_the_merge_of_whitened_experts(
    models: Path, tmp_path: Path, cache: Path, family: str, kind: str, options: dict[str, Any]
) -> None:
    folder, out = models / family, tmp_path / "out"
    merger(folder, out, kind, **options).merge()
    found = information(cache, folder, kind)
    full = "folded" if kind == "lora" else kind
    experts = [load_file(folder / f"{full}{number}" / "model.safetensors") for number in range(3)]
    base, merged = load_file(folder / "base/model.safetensors"), load_file(out / "model.safetensors")
    method, scale = options.get("method", "karcher"), options.get("scale", 1.0)
    n_weighted, n_other = 0, 0
    for name, tensor in merged.items():
        start = base[name].double().numpy() if options.get("space") != "weights" else np.zeros(tensor.shape)
        points = [expert[name].double().numpy() - start for expert in experts]
        if np.abs(points).max() < 1e-6:  # no adapter changes it
            continue
        weighted = metric(found, name, is_flipped=family == "gpt2")
        n_blocks = tensor.shape[0] if options.get("block") == "row" and tensor.ndim > 1 else 1
        expected = start + scale * whitened_mean(points, weighted, method, n_blocks)
        np.testing.assert_allclose(tensor.double().numpy(), expected, rtol=0, atol=2e-5 * np.abs(expected).max())
        n_weighted += weighted is not None
        plain = start + scale * whitened_mean(points, None, method, n_blocks)
        n_other += np.abs(plain - expected).max() > 1e-3 * np.abs(expected).max()
    assert n_weighted >= (4 if kind == "lora" else 8) and n_other >= 4  # it is another merge than the plain one

    record: Any = read_manifest(out).calibration
    assert record.form == "table" and record.fisher == options["fisher"] and not record.is_fitted
    assert record.options["weighted_tensors"] == n_weighted and set(record.distances) == {"start", "table"}
    report = verify(str(out))
    assert report.ok, report.problems
    assert not reproduce(str(out)).differences


@pytest.mark.parametrize("fisher", ["diagonal", "kfac"])
def test_an_adapter_is_that_of_the_full_models_it_stands_for(
    models: Path, tmp_path: Path, cache: Path, fisher: str
) -> None:
    folder = models / "llama"
    merger(folder, tmp_path / "adapter", "lora", fisher=fisher, adapter_output="adapter").merge()
    merger(folder, tmp_path / "full", "folded", fisher=fisher).merge()
    base = LlamaForCausalLM.from_pretrained(folder / "base")
    merged = PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload().state_dict()
    full = load_file(tmp_path / "full" / "model.safetensors")
    n_changed = 0
    for name, origin in load_file(folder / "base/model.safetensors").items():
        change = full[name] - origin
        n_changed += bool(change.abs().max() > 1e-3)
        torch.testing.assert_close(merged[name] - origin, change, rtol=0, atol=1e-4 * float(full[name].abs().max()))
    assert n_changed == 4
    report = verify(str(tmp_path / "adapter"))
    assert report.ok, report.problems
    assert not reproduce(str(tmp_path / "adapter")).differences
    merger(folder, tmp_path / "short", "lora", fisher=fisher, adapter_output="adapter", adapter_rank=2).merge()


@pytest.mark.parametrize("fisher", ["diagonal", "kfac"])
def test_the_same_information_everywhere_is_the_plain_merge(
    models: Path, tmp_path: Path, cache: Path, fisher: str
) -> None:
    folder = models / "llama"
    merger(folder, tmp_path / "out", fisher=fisher).merge()
    for file in cache.iterdir():
        stored = load_file(file)
        with safe_open(file, "pt") as opened:
            record = opened.metadata()
        for name, values in stored.items():
            size = int((2 * values.numel()) ** 0.5)
            triangle = torch.eye(size)[torch.ones(size, size).triu().bool()] if fisher == "kfac" else None
            stored[name] = torch.ones_like(values) if triangle is None else triangle.to(values.dtype)
        save_file(stored, file, record)
    merger(folder, tmp_path / "unit", fisher=fisher).merge()
    merger(folder, tmp_path / "plain", fisher=None, without_prompts=True).merge()
    files = [tmp_path / name / "model.safetensors" for name in ("out", "unit", "plain")]
    weighted, plain_again, plain = map(load_file, files)
    for name, values in plain.items():
        torch.testing.assert_close(plain_again[name], values, rtol=1e-5, atol=1e-7)
        if any(projection in name for projection in PROJECTIONS):
            assert not torch.allclose(weighted[name], values, rtol=1e-3)


class Killed(Exception):
    pass


@pytest.mark.parametrize("at", ["merge_distances", "estimate"])
def test_an_interrupted_merge_goes_on_to_the_same_bits(
    models: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    folder, estimate, asked = models / "llama", fisher_files.diagonal_fisher, []

    def counted(*args: Any, **options: Any) -> Any:
        asked.append(1)
        if at == "estimate" and len(asked) == 2:
            raise Killed
        return estimate(*args, **options)

    def killed(*args: Any) -> Any:
        raise Killed

    monkeypatch.setattr(fisher_files, "diagonal_fisher", counted)
    with monkeypatch.context() as patch:
        if at != "estimate":
            patch.setattr(whitening, at, killed)
        with pytest.raises(Killed):
            merger(folder, tmp_path / "out").merge()
    with pytest.raises(ResumeError, match="option fisher"):
        merger(folder, tmp_path / "out", fisher="kfac").merge(resume_from_checkpoint=True)
    merger(folder, tmp_path / "out").merge(resume_from_checkpoint=True)
    assert len(asked) == (4 if at == "estimate" else 3)  # what was estimated was kept
    merger(folder, tmp_path / "whole").merge()
    for name in ("model.safetensors", "merge_coefficients.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"without_prompts": True}, r"`fisher='diagonal'` asks what the experts do on prompts, and there are none"),
        ({"method": "linear"}, r"by which `method='linear'` does not decide\. Leave it out, or choose one of karcher"),
        ({"method": "ties"}, r"`method='ties'` does not decide"),
        ({"method": "mats"}, r"`method='mats'` does not decide"),
        ({"method": "auto"}, r"`method='auto'` does not decide"),
        ({"calibration_form": "table"}, r"nothing is fitted to them\. Leave out calibration_form='table', or fisher"),
        ({"refine_steps": 3}, r"Leave out refine_steps=3, or fisher"),
        ({"block": "layer"}, r"Use block='tensor', 'row' or 'head'"),
    ],
)
def test_what_it_cannot_do_is_refused(
    models: Path, tmp_path: Path, cache: Path, options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ArgumentError, match=sentence):
        merger(models / "llama", tmp_path / "out", **options).merge()
    assert not cache.exists()


def test_every_expert_needs_prompts(models: Path, tmp_path: Path, cache: Path) -> None:
    one = merger(models / "llama", tmp_path / "out")
    del one.calibration_dataset[one.experts[1]]
    with pytest.raises(ArgumentError, match=r"fisher='diagonal' needs prompts of every expert, and .*full1 has none"):
        one.merge()


def test_no_engine_runs_it_without_what_prompts_say(models: Path, tmp_path: Path) -> None:
    """Else it would be the plain merge under another name."""
    args = MergingArguments(output_dir=str(tmp_path / "out"), fisher="kfac", space="deltas", disable_tqdm=True)
    with closing(build_plan(experts_of(models / "llama", "full"), args, None, str(models / "llama/base"))) as plan:
        with pytest.raises(ArgumentError, match=r"`fisher='kfac'` asks what the experts do on prompts"):
            run_merge(plan, StepObserver(), Processes(alone=True))
        with pytest.raises(ArgumentError, match=r"`fisher='kfac'` asks what the experts do on prompts"):
            merge_into_memory(plan, MemoryOutput(plan))


def test_a_comparison_does_not_take_it(models: Path) -> None:
    with pytest.raises(ArgumentError, match=r"name its folder: also \(--also\)"):
        MergeComparison(experts_of(models, "full"), {"a": ["text"]}, args=MergingArguments(fisher="diagonal"))


def test_what_goes_on_with_it_has_no_prompts(models: Path, tmp_path: Path, cache: Path) -> None:
    folder = models / "llama"
    merged = merger(folder, tmp_path / "out").merge()
    added = merged.add_expert(str(folder / "full2"), str(tmp_path / "more"))
    assert added.manifest is not None and added.manifest.arguments["fisher"] is None
    args, _ = next_merge(str(tmp_path / "out"), {"output_dir": str(tmp_path / "next")}, str(folder / "base"))
    assert args.fisher is None and args.method == "karcher"
