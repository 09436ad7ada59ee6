"""How different the curvatures of experts' predictions are, against dense algebra in float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click_runner import click_runner
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from hf_frmerge import FisherRaoMerger, MergingArguments
from hf_frmerge.calibration.curvature import layer_curvature
from hf_frmerge.calibration.prompts.read_prompts import read_prompts, split_prompts
from hf_frmerge.cli.main import main
from hf_frmerge.fisher import files as fisher_files
from hf_frmerge.fisher.kronecker import kronecker_factors

VOCABULARY, LENGTH, N_PROMPTS = 20, 8, 12
SHARES = [0.5, 0.2, 0.3]


def positive(size: int, seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    rows = torch.randn(size + 3, size, dtype=torch.float64)
    return rows.T @ rows / size


def layer(rank: int | None) -> tuple[torch.Tensor, list[torch.Tensor], list[tuple[torch.Tensor, torch.Tensor]]]:
    torch.manual_seed(9)
    base = torch.randn(7, 5, dtype=torch.float64)
    deltas = [torch.randn(7, rank or 5).double() @ torch.randn(rank or 5, 5).double() for _ in SHARES]
    return base, [base + delta for delta in deltas], [(positive(5, i), positive(7, 10 + i)) for i in range(3)]


def dense(
    experts: list[torch.Tensor], factors: list[Any], shares: list[float], basis: np.ndarray | None = None
) -> tuple[float, float]:
    """The cost of the mean and eta, with the whole Kronecker products between the columns of a basis."""
    points = [expert.double().numpy().flatten() for expert in experts]
    wholes = [np.kron(g.double().numpy(), a.double().numpy()) for a, g in factors]
    mean = sum(w * x for w, x in zip(shares, points))
    if basis is None:
        basis = np.eye(len(points[0]))
    points = [basis.T @ (x - mean) for x in points]
    wholes = [basis.T @ whole @ basis for whole in wholes]
    cost = 0.5 * sum(w * x @ f @ x for w, x, f in zip(shares, points, wholes))
    mean_whole = sum(w * f for w, f in zip(shares, wholes))
    c = sum(w * (f - mean_whole) @ x for w, x, f in zip(shares, points, wholes))
    return float(cost), float(c @ np.linalg.pinv(mean_whole, rcond=1e-12, hermitian=True) @ c)


def test_over_all_directions_it_is_the_formula_and_twice_what_the_best_point_saves() -> None:
    base, experts, factors = layer(None)
    cost, eta = layer_curvature(experts, base, factors, SHARES)
    assert (cost, eta) == pytest.approx(dense(experts, factors, SHARES), rel=1e-6)
    # The best point by least squares, and the cost there by the definition.
    roots = [np.sqrt(w) * np.linalg.cholesky(torch.kron(g, a).numpy()).T for w, (a, g) in zip(SHARES, factors)]
    targets = np.concatenate([root @ x.numpy().flatten() for root, x in zip(roots, experts)])
    best, *_ = np.linalg.lstsq(np.concatenate(roots), targets, rcond=None)
    least = 0.5 * sum(np.square(root @ (best - x.numpy().flatten())).sum() for root, x in zip(roots, experts))
    assert cost - least == pytest.approx(eta / 2, rel=1e-6)
    assert layer_curvature(experts, None, factors, SHARES) == pytest.approx((cost, eta), rel=1e-6)


def test_of_few_directions_it_is_the_formula_between_them() -> None:
    """Those between the leading left and right singular vectors of all deltas."""
    for rank, n_directions in ((1, 32), (None, 1)):
        base, experts, factors = layer(rank)
        singular = [np.linalg.svd((expert - base).numpy()) for expert in experts]
        left, _ = np.linalg.qr(np.stack([u[:, 0] for u, _, _ in singular], axis=1))
        right, _ = np.linalg.qr(np.stack([v[0] for _, _, v in singular], axis=1))
        found = layer_curvature(experts, base, factors, SHARES, n_directions)
        assert found == pytest.approx(dense(experts, factors, SHARES, np.kron(left, right)), rel=1e-6)
        whole = dense(experts, factors, SHARES)
        assert found[1] < 0.99 * whole[1]
        assert (found[0] == pytest.approx(whole[0], rel=1e-6)) == (rank == 1)  # they hold all of such deltas


def test_it_is_zero_where_there_is_nothing_to_gain() -> None:
    base, experts, factors = layer(None)
    same = layer_curvature(experts, base, [factors[0]] * 3, SHARES)
    assert same[0] > 1 and same[1] == pytest.approx(0, abs=1e-9 * same[0])
    assert layer_curvature([base] * 3, base, factors, SHARES) == (0.0, 0.0)


def prompts(expert: int) -> list[list[int]]:
    ids: list[list[int]] = np.random.default_rng(expert).integers(0, VOCABULARY, (N_PROMPTS, LENGTH)).tolist()
    return ids


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.3,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(root / "base")
    for number in range(2):
        torch.manual_seed(number)
        lora = LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        base = LlamaForCausalLM.from_pretrained(root / "base")
        get_peft_model(base, lora).save_pretrained(str(root / f"lora{number}"))
    return root


def test_inspect_measures_it_and_mats_finds_its_factors(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_FRMERGE_CACHE", str(tmp_path / "cache"))
    experts = [str(models / f"lora{number}") for number in range(2)]
    command = ["inspect", *experts, "--base-model", str(models / "base"), "--max-calibration-length", str(LENGTH)]
    command += ["--fisher-labels", "exact", "--weights", "0.7,0.3"]
    for number, expert in enumerate(experts):
        file = tmp_path / f"{number}.jsonl"
        file.write_text("\n".join(json.dumps({"input_ids": ids}) for ids in prompts(number)))
        command += ["--calibration", f"{expert}={file}"]
    result = click_runner().invoke(main, [*command, "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)["curvature"]

    data = {expert: prompts(number) for number, expert in enumerate(experts)}
    read = read_prompts(data, None, experts=experts, n_samples=64, max_length=LENGTH, seed=42, vocab_size=VOCABULARY)
    fitted = [[*own.token_ids] for own in split_prompts(read, 1 / 8, 42)[0]]
    whole: list[Any] = []
    plain: Any = LlamaForCausalLM.from_pretrained(models / "base")
    for expert in experts:
        base = LlamaForCausalLM.from_pretrained(models / "base", dtype=torch.float64)
        merged: Any = PeftModel.from_pretrained(base, expert).merge_and_unload()
        whole.append(merged.double().eval())
    names = [n for n, m in whole[0].named_modules() if type(m).__name__ == "Linear" and ".layers." in n]
    factors = [kronecker_factors(model, ids, names, labels="exact", seed=0)[0] for model, ids in zip(whole, fitted)]
    for block, of_block in enumerate(found["blocks"]):
        own = [name for name in names if f"layers.{block}." in name]
        traces = [sum(float(f.inputs[n].trace() * f.outputs[n].trace()) for n in own) for f in factors]
        assert of_block["traces"] == pytest.approx(traces, rel=1e-4)
        cost = eta = 0.0
        for name in own:
            weights = [model.get_submodule(name).weight.detach() for model in whole]
            pairs = [(f.inputs[name], f.outputs[name]) for f in factors]
            base_weight = plain.get_submodule(name).weight.detach()
            deltas = [w - base_weight.double() for w in weights]
            if max(float(d.abs().max()) for d in deltas) < 1e-6:
                continue
            sides = []
            for joined in (torch.cat(deltas, 1), torch.cat([d.T for d in deltas], 1)):
                u, s, _ = np.linalg.svd(joined.numpy(), full_matrices=False)
                sides.append(u[:, s > 1e-4 * s[0]])
            of_layer = dense(weights, pairs, [0.7, 0.3], np.kron(*sides))
            cost, eta = cost + of_layer[0], eta + of_layer[1]
        assert (of_block["cost"], of_block["eta"]) == pytest.approx((cost, eta), rel=1e-3)
    assert found["eta"] == pytest.approx(sum(block["eta"] for block in found["blocks"]))
    assert found["labels"] == "exact" and found["n_predictions"] == [sum(map(len, ids)) for ids in fitted]

    printed = click_runner().invoke(main, command)
    assert printed.exit_code == 0, printed.output
    text = " ".join(printed.stdout.split())
    share = found["eta"] / 2 / found["cost"]
    assert f"EpiMer's η = {found['eta']:.3g}" in text and f"{share:.0%} of it" in text
    assert "model.layers.1" in text

    # What it estimated serves a merge with the same options.
    monkeypatch.setattr(fisher_files, "kronecker_factors", None)
    args = MergingArguments(
        output_dir=str(tmp_path / "out"), method="mats", max_calibration_length=LENGTH, fisher_labels="exact",
        max_iter=2, disable_tqdm=True,
    )  # fmt: skip
    FisherRaoMerger(
        experts, args, weights=[0.7, 0.3], base_model=str(models / "base"), calibration_dataset=data
    ).merge()


def test_every_expert_needs_prompts(models: Path, tmp_path: Path) -> None:
    experts = [str(models / f"lora{number}") for number in range(2)]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(json.dumps({"input_ids": ids}) for ids in prompts(0)))
    command = ["inspect", *experts, "--base-model", str(models / "base"), "--calibration", f"{experts[0]}={file}"]
    result = click_runner().invoke(main, command)
    assert result.exit_code != 0
    assert "lora1 has no prompts. Pass some for it too" in " ".join(result.stderr.replace("\n", " ").split())
