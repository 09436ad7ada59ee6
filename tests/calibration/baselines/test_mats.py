"""MaTS of small models, from prompts to a folder that is checked and made again, against dense algebra in float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from scipy.sparse.linalg import cg
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from hf_frmerge import FisherRaoMerger, MergingArguments
from hf_frmerge.calibration.baselines.mats import conjugate_gradients
from hf_frmerge.checkpoints.resolve import resolve
from hf_frmerge.errors import ArgumentError
from hf_frmerge.evaluation.models.identity import model_identity
from hf_frmerge.fisher import files as fisher_files
from hf_frmerge.merging.record.manifest import read_manifest
from hf_frmerge.provenance.merge_again import reproduce
from hf_frmerge.provenance.verify import verify

VOCABULARY, LENGTH, N_PROMPTS = 20, 8, 16
WEIGHTS = [0.7, 0.3]


def symmetric(size: int, rank: int, seed: int) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal((rank, size))
    return rows.T @ rows


@pytest.mark.parametrize("ranks", [(4, 5), (2, 3)])
def test_conjugate_gradients_solve_the_kronecker_system(ranks: tuple[int, int]) -> None:
    """Of a singular system, which few prompts make, the solution is that of least norm."""
    terms = [(symmetric(4, ranks[0], i), symmetric(5, ranks[1], 10 + i)) for i in range(2 if ranks[0] == 4 else 1)]
    wanted = np.random.default_rng(9).standard_normal((5, 4))
    target = sum(g @ wanted @ a for a, g in terms)
    dense = sum(np.kron(g, a) for a, g in terms)
    expected = (np.linalg.pinv(dense, rcond=1e-10) @ target.flatten()).reshape(5, 4)
    tensors = [(torch.from_numpy(a), torch.from_numpy(g)) for a, g in terms]
    calls = []

    def apply(x: torch.Tensor) -> torch.Tensor:
        calls.append(x)
        return torch.stack([g @ x @ a for a, g in tensors]).sum(0)

    found = conjugate_gradients(apply, torch.from_numpy(np.asarray(target)), 500)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-4)
    assert len(calls) < 100  # it stops by itself
    two, _ = cg(dense, target.flatten(), maxiter=2)
    np.testing.assert_allclose(conjugate_gradients(apply, torch.from_numpy(target), 2).numpy().flatten(), two)
    calls.clear()
    assert not conjugate_gradients(apply, torch.zeros(5, 4), 500).any() and not calls


def prompts(expert: int) -> list[list[int]]:
    """Each expert has seen half of the tokens."""
    ids: list[list[int]] = np.random.default_rng(expert).integers(0, 10, (N_PROMPTS, LENGTH)).tolist()
    return [[10 * expert + token for token in row] for row in ids]


def llama() -> Any:
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.2, attention_bias=True,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def gpt2() -> Any:
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=16))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for kind, make in (("llama", llama), ("gpt2", gpt2)):
        torch.manual_seed(0)
        base = make()
        base.save_pretrained(root / kind / "base")
        for number in range(2):
            torch.manual_seed(0)
            model = make()
            torch.manual_seed(number + 1)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))
            model.save_pretrained(root / kind / f"full{number}")
    return root


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_FRMERGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "fisher"


def merger(folder: Path, out: Path, **options: Any) -> FisherRaoMerger:
    experts = [str(folder / f"full{number}") for number in range(2)]
    calibration = {expert: prompts(number) for number, expert in enumerate(experts)}
    args = MergingArguments(
        output_dir=str(out), max_calibration_length=LENGTH, disable_tqdm=True, dtype="float32",
        **({"method": "mats"} | options),
    )  # fmt: skip
    return FisherRaoMerger(
        experts, args, weights=WEIGHTS, base_model=str(folder / "base"), calibration_dataset=calibration
    )


def stored_factors(cache: Path, folder: Path) -> list[dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Layer -> A and G divided by the norm over all layers, of every expert, from the files' own headers."""
    found = {}
    for file in cache.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            record = json.loads(opened.metadata()["fisher"])
        assert record["kind"] == "kfac" and record["estimator"] == "sampled labels"
        triangles = load_file(file)
        layers = {}
        for name, first in record["owner"].items():
            pair = []
            for triangle in (triangles[f"{first}.inputs"], triangles[f"{name}.outputs"]):
                size = int((2 * len(triangle)) ** 0.5)
                matrix = np.zeros((size, size))
                matrix[np.triu_indices(size)] = triangle.double().numpy()
                pair.append(matrix + np.triu(matrix, 1).T)
            layers[name] = pair
        norm = sum(np.square(np.kron(g, a)).sum() for a, g in layers.values()) ** 0.5
        assert record["norm"] == pytest.approx(norm, rel=1e-6)
        found[record["model"][0]] = {name: (a, g / norm) for name, (a, g) in layers.items()}
    return [found[model_identity(resolve(str(folder / f"full{number}")))] for number in range(2)]


@pytest.mark.parametrize(("kind", "steps", "scale"), [("llama", 3, 1.0), ("llama", 4, 0.5), ("gpt2", 3, 1.0)])
def test_linear_layers_are_what_so_many_steps_give(
    models: Path, tmp_path: Path, cache: Path, kind: str, steps: int, scale: float
) -> None:
    folder, out = models / kind, tmp_path / "out"
    options: dict[str, Any] = {} if scale == 1 else {"space": "deltas", "scale": scale}
    merger(folder, out, max_iter=steps, **options).merge()
    factors = stored_factors(cache, folder)
    assert len(factors[0]) == (14 if kind == "llama" else 8)
    experts = [load_file(folder / f"full{number}" / "model.safetensors") for number in range(2)]
    base, merged = load_file(folder / "base/model.safetensors"), load_file(out / "model.safetensors")
    prefix = "" if kind == "llama" else "transformer."
    for tensor, found in merged.items():
        values = [expert[tensor].double().numpy() for expert in experts]
        average = expected = np.sum([w * x for w, x in zip(WEIGHTS, values)], axis=0)
        name = tensor.removesuffix(".weight")
        layer = name if name in factors[0] else prefix + name
        if layer in factors[0] and tensor.endswith(".weight"):
            as_stored = [x.T if kind == "gpt2" else x for x in values]
            middle = np.sum([w * x for w, x in zip(WEIGHTS, as_stored)], axis=0)
            terms = [(w * each[layer][1], each[layer][0]) for w, each in zip(WEIGHTS, factors)]
            dense = sum(np.kron(g, a) for g, a in terms)
            pull = sum(g @ (x - middle) @ a for (g, a), x in zip(terms, as_stored))
            solved, _ = cg(dense, pull.flatten(), maxiter=steps)
            solved = middle + solved.reshape(middle.shape)
            expected = solved.T if kind == "gpt2" else solved
            assert np.abs(expected - average).max() > 0.01
        start = base[tensor].double().numpy()
        np.testing.assert_allclose(found.double().numpy(), start + scale * (expected - start), rtol=1e-4, atol=1e-4)

    record = read_manifest(out).calibration
    assert record is not None and record.form == "dense"
    assert {"method": "mats", "max_iter": steps, "fisher_labels": "sampled"}.items() <= record.options.items()
    report = verify(str(out))
    assert report.ok, report.problems
    assert not reproduce(str(out)).differences


def test_factors_are_estimated_once_and_of_the_labels_asked_for(
    models: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    estimate = fisher_files.kronecker_factors

    def counted(*args: Any, **options: Any) -> Any:
        asked.append(options["labels"])
        return estimate(*args, **options)

    monkeypatch.setattr(fisher_files, "kronecker_factors", counted)
    merger(models / "llama", tmp_path / "out", max_iter=2).merge()
    merger(models / "llama", tmp_path / "again", max_iter=4).merge()
    assert asked == ["sampled"] * 2
    merger(models / "llama", tmp_path / "exact", max_iter=2, fisher_labels="exact").merge()
    merger(models / "llama", tmp_path / "empirical", max_iter=2, fisher_labels="empirical").merge()
    assert asked == ["sampled"] * 2 + ["exact"] * 2 + ["empirical"] * 2
    merged = {kind: load_file(tmp_path / kind / "model.safetensors") for kind in ("out", "exact", "empirical")}
    name = "model.layers.0.mlp.up_proj.weight"
    assert len({tuple(weights[name].flatten().tolist()) for weights in merged.values()}) == 3
    record = read_manifest(tmp_path / "empirical").calibration
    assert record is not None and record.options["fisher_labels"] == "empirical"


def test_what_it_cannot_do_is_refused_before_anything_is_written(models: Path, tmp_path: Path, cache: Path) -> None:
    out, experts = tmp_path / "out", [str(models / "llama" / f"full{number}") for number in range(2)]
    with pytest.raises(ArgumentError, match="'mats'` asks what the experts do on prompts, and there are none"):
        FisherRaoMerger(experts, MergingArguments(output_dir=str(out), method="mats")).merge()
    with pytest.raises(ArgumentError, match=r"'mats' gives has no low rank\. Leave out calibration_form='low_rank'"):
        merger(models / "llama", out, calibration_form="low_rank").merge()
    assert not out.exists() and not cache.exists()
    merger(models / "llama", out, max_iter=1).merge()
    assert (out / "model.safetensors").exists()
