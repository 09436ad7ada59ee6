"""Adapters that a spectral method merges into an adapter: PEFT loads what a naive float64 merge of dense deltas is."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapter_merges import make_adapter, peft_deltas
from jsonschema import Draft202012Validator
from safetensors.torch import load_file, save_file
from spectral_reference import Array, polar, rests_and_heads, tied
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from xxhash import xxh3_128_hexdigest

from hf_frmerge.errors import ArgumentError
from hf_frmerge.merging.arguments.merging_arguments import MergingArguments
from hf_frmerge.merging.engine.outcomes import StepObserver
from hf_frmerge.merging.engine.processes import Processes
from hf_frmerge.merging.outputs.factor_output import FactorOutput
from hf_frmerge.merging.planning.build_plan import build_plan
from hf_frmerge.merging.record.manifest import SCHEMA_FILE, Manifest, read_manifest
from hf_frmerge.merging.run import run_merge
from hf_frmerge.methods.spectral.decision import RULES
from hf_frmerge.methods.spectral.inputs import Experts, SpectralOptions
from hf_frmerge.methods.table import METHODS
from hf_frmerge.provenance.merge_again import reproduce
from hf_frmerge.provenance.verify import verify

WITH_CORES = [m.name for m in METHODS.values() if m.cores is not None and m.n_experts is None]
WEIGHTS = [0.6, 0.4]
LORA = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]}
OTHER = {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "down_proj"]}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4
    )
    folder = tmp_path_factory.mktemp("base") / "llama"
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("adapters")
    return [make_adapter(base, root / f"a{seed}", seed, **config) for seed, config in enumerate([LORA, OTHER])]


def merge(experts: list[Path], out: Path, base: Path | None = None, **options: Any) -> Manifest:
    args = MergingArguments(output_dir=str(out), **options)
    with closing(build_plan(list(map(str, experts)), args, WEIGHTS, base and str(base))) as plan:
        run_merge(plan, StepObserver(), Processes())
    return read_manifest(out)


def relative_error(actual: Array, expected: Array) -> float:
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def svd(delta: Array, rank: int) -> tuple[Array, Array, Array]:
    left, values, right = np.linalg.svd(delta)
    return left[:, :rank], values[:rank], right[:rank].T


def tsv(deltas: Array, weights: Array) -> Array:
    """All directions of deltas of low rank, the vectors of all made orthonormal."""
    parts = [svd(delta, rank) for delta, rank in zip(deltas, (3, 2))]
    values = np.concatenate([2 * w * s for w, (_, s, _) in zip(weights, parts)])
    left, right = (polar(np.concatenate([part[side] for part in parts], axis=1)) for side in (0, 2))
    return left * values @ right.T


def isotropic(deltas: Array, weights: Array) -> Array:
    left, values, right = svd(2 * np.tensordot(weights, deltas, axes=1), 5)
    return values.mean() * left @ right.T


def ties_in_core_space(deltas: Array, weights: Array, bases: tuple[Array, Array]) -> Array:
    """TIES on the dense deltas in the coordinates of both bases, element by element."""
    cores = np.stack([bases[0].T @ delta @ bases[1] for delta in deltas])
    count = int(0.2 * cores[0].size)
    kept = np.stack([np.where(abs(core) >= np.sort(abs(core), axis=None)[-count], core, 0.0) for core in cores])
    merged = np.zeros(cores[0].shape)
    for index in np.ndindex(merged.shape):
        column = kept[(slice(None), *index)]
        same = column * (1.0 if weights @ column >= 0 else -1.0) > 0
        merged[index] = (weights[same] @ column[same]) / weights[same].sum() if same.any() else 0.0
    return bases[0] @ merged @ bases[1].T


def bases_of(adapters: list[Path], module: str) -> tuple[Array, Array]:
    """Singular vectors of all factors of a module, as they are stored, without their scales."""
    stored = [load_file(folder / "adapter_model.safetensors") for folder in adapters]
    down, up = (
        [tensors[f"base_model.model.{module}.lora_{side}.weight"].double().numpy() for tensors in stored]
        for side in "AB"
    )
    left = np.linalg.svd(np.concatenate(up, axis=1), full_matrices=False)[0]
    right = np.linalg.svd(np.concatenate(down, axis=0), full_matrices=False)[2].T
    return left, right


NAIVE: dict[str, Callable[[Array, Array], Array]] = {
    "tsv_m": tsv,
    "iso_c": isotropic,
    "res_merge": rests_and_heads,
    "knots": lambda deltas, weights: tied(deltas, weights, rank=5),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", WITH_CORES)
def test_peft_loads_the_merge_of_the_dense_deltas(
    base: Path, adapters: list[Path], tmp_path: Path, method: str, dtype: str
) -> None:
    manifest = merge(adapters, tmp_path / "out", method=method, scale=0.7, dtype=dtype)
    sources = [peft_deltas(base, folder) for folder in adapters]
    merged = peft_deltas(base, tmp_path / "out")
    assert manifest.output_kind == "adapter" and set(merged) == set(sources[0])
    for name, actual in merged.items():
        deltas = np.stack([source[name] for source in sources])
        if method == "core_ties":
            expected = ties_in_core_space(deltas, np.array(WEIGHTS), bases_of(adapters, name))
        else:
            options = SpectralOptions(METHODS[method].density or 1.0)
            expected = RULES[method](Experts(deltas.astype(np.float32)), np.array(WEIGHTS), options)
            if method in NAIVE:
                assert relative_error(NAIVE[method](deltas, np.array(WEIGHTS)), expected) < 1e-5
        assert relative_error(actual, 0.7 * expected) < (1e-5 if dtype == "float32" else 2.0**-7)
        entry = manifest.tensors[f"{name}.weight"]
        assert entry.rank == 5 and entry.truncation_error == 0.0
        assert entry.norm == pytest.approx(0.7 * np.linalg.norm(expected), rel=1e-5)
        assert entry.to_dict()["decision"]["kind"] == "spectral"


def test_modules_of_other_shapes_are_averaged_and_their_coefficients_recorded(base: Path, tmp_path: Path) -> None:
    config = LORA | {"target_modules": ["q_proj", "embed_tokens"]}
    adapters = [make_adapter(base, tmp_path / f"a{seed}", seed, **config) for seed in range(2)]
    manifest = merge(adapters, tmp_path / "out", base, method="tsv_m", scale=0.5)
    sources = [load_embedding(folder) for folder in adapters]
    expected = 0.6 * sources[0] + 0.4 * sources[1]  # a mean, as with full models
    assert relative_error(load_embedding(tmp_path / "out"), expected) < 1e-6
    assert manifest.tensors["model.embed_tokens.weight"].decision is None
    (note,) = [note for note in manifest.report.notes if "merges 2 matrices" in note]
    assert "the other 1 tensors (model.embed_tokens.weight) are averaged" in note
    assert verify(str(tmp_path / "out")).problems == []


def load_embedding(folder: Path) -> Array:
    tensors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    down, up = (tensors[f"base_model.model.model.embed_tokens.lora_embedding_{side}"].double() for side in "AB")
    scale = config["lora_alpha"] / config["r"]
    pattern = config.get("alpha_pattern") or {}
    ranks = config.get("rank_pattern") or {}
    if pattern:
        assert pattern == ranks  # scale 1
        scale = 1.0
    return (scale * up @ down).numpy()


@pytest.mark.parametrize("options", [{"adapter_rank": 2}, {"adapter_energy": 0.8}], ids=["rank", "energy"])
@pytest.mark.parametrize("method", ["iso_c", "knots", "dc_merge"])
def test_a_smaller_rank_is_the_best_of_its_size_and_the_loss_is_told(
    base: Path, adapters: list[Path], tmp_path: Path, method: str, options: dict[str, Any]
) -> None:
    merge(adapters, tmp_path / "exact", method=method)
    manifest = merge(adapters, tmp_path / "small", method=method, **options)
    exact, small = (peft_deltas(base, tmp_path / name) for name in ("exact", "small"))
    lost, total = 0.0, 0.0
    for name, delta in exact.items():
        values = np.linalg.svd(delta, compute_uv=False)
        entry = manifest.tensors[f"{name}.weight"]
        discarded = float(np.sqrt(np.sum(values[entry.rank :] ** 2) / np.sum(values**2)))
        if "adapter_energy" in options:
            # With equal singular values the rank is that of a count, give or take a rounding error.
            assert discarded**2 <= 0.2 + 1e-6
        else:
            assert entry.rank == 2
        assert relative_error(small[name], delta) == pytest.approx(discarded, rel=1e-4, abs=1e-5)
        assert entry.truncation_error == pytest.approx(discarded, rel=1e-4, abs=1e-5)
        assert entry.norm == pytest.approx(np.linalg.norm(delta), rel=1e-5)
        lost, total = lost + entry.truncation_error**2 * entry.norm**2, total + entry.norm**2
    error = float(np.sqrt(lost / total))
    assert manifest.report.factors.truncation_error == pytest.approx(error, rel=1e-6)
    (note,) = [note for note in manifest.report.notes if "compressed" in note]
    assert f": {error:.2%} of the norm of what was merged is lost." in note
    report = verify(str(tmp_path / "small"))
    assert report.problems == [] and report.checked_tensors == 8


@pytest.mark.parametrize("method", WITH_CORES)
def test_the_record_is_checked_and_the_merge_made_again(adapters: list[Path], tmp_path: Path, method: str) -> None:
    merge(adapters, tmp_path / "out", method=method, dtype="bfloat16")
    schema = Draft202012Validator(
        json.loads(files("hf_frmerge.merging.record").joinpath(SCHEMA_FILE).read_text(encoding="utf-8"))
    )
    manifest = json.loads((tmp_path / "out" / "merge_manifest.json").read_text())
    assert [error.message for error in schema.iter_errors(manifest)] == []
    report = verify(str(tmp_path / "out"))
    assert report.problems == [] and report.checked_tensors == 8  # factors, modules, layers
    assert reproduce(str(tmp_path / "out")).identical


@pytest.mark.parametrize(("method", "told"), [("iso_c", "0.001"), ("core_ties", "0.03")])
def test_other_factors_of_one_product_are_verified_and_others_are_not(
    adapters: list[Path], tmp_path: Path, method: str, told: str
) -> None:
    # Another machine's LAPACK may turn the singular vectors of equal singular values, and flips signs.
    merge(adapters, tmp_path / "out", method=method, dtype="bfloat16")
    assert problems_with(tmp_path / "out", lambda down, up: (-down, -up)) == []
    turn = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    turned = problems_with(
        tmp_path / "out", lambda down, up: ((turn.T @ down.double()).bfloat16(), (up.double() @ turn).bfloat16())
    )
    assert turned == []
    (problem,) = problems_with(tmp_path / "out", lambda down, up: (down, 1.08 * up))
    assert problem.endswith(
        f"q_proj.weight' is farther than {told} of its norm from what its experts and options give."
    )


def problems_with(
    folder: Path, change: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
) -> list[str]:
    """Problems of a merge, one module of which, and the digest of it, are what another machine may have written."""
    file, record = folder / "adapter_model.safetensors", folder / "merge_manifest.json"
    whole, text = file.read_bytes(), record.read_text()
    tensors = load_file(file)
    module = "model.layers.0.self_attn.q_proj"
    down, up = (f"base_model.model.{module}.lora_{side}.weight" for side in "AB")
    tensors[down], tensors[up] = (value.contiguous() for value in change(tensors[down], tensors[up]))
    save_file(tensors, file, metadata={"format": "pt"})
    raw = b"".join(tensors[name].view(torch.uint8).numpy().tobytes() for name in (down, up))
    manifest = json.loads(text)
    manifest["tensors"][f"{module}.weight"]["output_xxh3_128"] = xxh3_128_hexdigest(raw)
    manifest["files"][file.name]["sha256"] = None
    manifest["files"][file.name]["header_xxh3_128"] = None
    manifest["files"][file.name]["size"] = file.stat().st_size
    record.write_text(json.dumps(manifest))
    try:
        return verify(str(folder)).problems
    finally:
        file.write_bytes(whole)
        record.write_text(text)


def test_a_changed_bit_and_what_is_missing_are_found(adapters: list[Path], tmp_path: Path) -> None:
    merge(adapters, tmp_path / "out", method="tsv_m")
    file = tmp_path / "out" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = "base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"
    save_file(tensors | {name: tensors[name] * (1 + 2.0**-23)}, file, metadata={"format": "pt"})
    changed = "The delta of 'model.layers.1.mlp.down_proj.weight' was changed after the merge."
    assert changed in verify(str(tmp_path / "out")).problems
    save_file({key: value for key, value in tensors.items() if "1.mlp" not in key}, file, metadata={"format": "pt"})
    problems = verify(str(tmp_path / "out")).problems
    assert any("model.layers.1.mlp.down_proj" in problem for problem in problems)


@pytest.mark.parametrize(
    "options", [{}, {"adapter_rank": 2}, {"adapter_energy": 0.9}], ids=["exact", "rank", "energy"]
)
def test_an_interrupted_merge_continues_to_the_same_bits(
    adapters: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    whole = merge(adapters, tmp_path / "whole", method="tsv_m", **options)
    written = FactorOutput.merge
    for n_before in (1, 3, 4):
        calls: list[int] = []

        def stop(*args: Any, calls: list[int] = calls, n_before: int = n_before) -> str:
            calls.append(1)
            if len(calls) > n_before:
                raise KeyboardInterrupt
            return written(*args)

        def no_publish(*args: Any) -> dict[str, Path]:
            raise KeyboardInterrupt

        out = tmp_path / f"stopped{n_before}"
        with monkeypatch.context() as patch:
            patch.setattr(FactorOutput, "merge", stop)
            patch.setattr(FactorOutput, "publish", no_publish)  # all four were written, and nothing renamed
            with pytest.raises(KeyboardInterrupt):
                merge(adapters, out, method="tsv_m", num_workers=1, **options)
        resumed = merge(adapters, out, method="tsv_m", resume_from_checkpoint=True, **options)
        expected = (tmp_path / "whole" / "adapter_model.safetensors").read_bytes()
        assert (out / "adapter_model.safetensors").read_bytes() == expected
        assert resumed.tensors == whole.tensors and resumed.report.factors == whole.report.factors


def test_both_outputs_are_one_merge(base: Path, adapters: list[Path], tmp_path: Path) -> None:
    origin = load_file(base / "model.safetensors")
    for method in WITH_CORES:
        merge(adapters, tmp_path / method, base, method=method)
        merge(adapters, tmp_path / f"{method}-full", base, method=method, adapter_output="merged")
        full = load_file(tmp_path / f"{method}-full" / "model.safetensors")
        for name, delta in peft_deltas(base, tmp_path / method).items():
            actual = full[f"{name}.weight"].double() - origin[f"{name}.weight"].double()
            assert relative_error(actual.numpy(), delta) < 2e-5, (method, name)


def test_weights_stored_as_inputs_by_outputs_are_merged_as_peft_has_them(tmp_path: Path) -> None:
    torch.manual_seed(0)
    folder = tmp_path / "gpt2"
    GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=1, n_head=4)).save_pretrained(folder)
    config = {"target_modules": ["c_attn"], "fan_in_fan_out": True}
    adapters = [make_adapter(folder, tmp_path / f"a{i}", i, r=rank, **config) for i, rank in enumerate((3, 2))]
    merge(adapters, tmp_path / "out", folder, method="knots")
    for name, actual in peft_deltas(folder, tmp_path / "out").items():
        # PEFT gives the delta as the model stores it.
        deltas = np.stack([peft_deltas(folder, adapter)[name].T for adapter in adapters])
        assert relative_error(actual.T, tied(deltas, np.array(WEIGHTS), rank=5)) < 1e-5


def test_what_has_no_low_rank_is_refused_and_the_advice_works(
    base: Path, adapters: list[Path], tmp_path: Path
) -> None:
    for options in (
        {"method": "ace"},
        {"method": "ortho_merge"},
        {"method": "ties"},
        {"method": "tsv_m", "post_step": "svc"},
    ):
        with pytest.raises(ArgumentError, match=r"no adapter can express it. Use adapter_output='merged'"):
            merge(adapters, tmp_path / "out", base, adapter_output="adapter", **options)
        out = tmp_path / "-".join(options.values())
        assert merge(adapters, out, base, adapter_output="merged", **options).output_kind == "full"


def test_core_ties_is_for_adapters_and_the_advice_works(base: Path, adapters: list[Path], tmp_path: Path) -> None:
    with pytest.raises(
        ArgumentError, match=r"merges the low-rank factors of adapters, and '.*llama' has none. Use meth"
    ):
        merge([adapters[0], base], tmp_path / "out", base, method="core_ties")
    merge([adapters[0], base], tmp_path / "knots", base, method="knots")
    dora = make_adapter(base, tmp_path / "dora", 2, **LORA, use_dora=True)
    whole = r"none of model.layers.0.mlp.down_proj.weight.* which it changes as a whole"
    with pytest.raises(ArgumentError, match=whole):
        merge([adapters[0], dora], tmp_path / "out", base, method="core_ties", adapter_output="merged")
    merge([adapters[0], dora], tmp_path / "dora-knots", base, method="knots")
