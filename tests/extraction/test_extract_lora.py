"""Extracting an adapter from dense checkpoints, against exact SVDs and against the adapters that were merged in."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from adapter_merges import merge_adapters
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from hf_frmerge.checkpoints.adapters.adapter import open_adapter
from hf_frmerge.checkpoints.resolve import Source
from hf_frmerge.checkpoints.tensors.reader import Checkpoint, open_checkpoint
from hf_frmerge.errors import ArgumentError, CheckpointError, NonFiniteError
from hf_frmerge.extraction import difference as dense_delta
from hf_frmerge.extraction.extract_lora import ExtractOptions, extract_lora

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def read(folder: Path) -> Checkpoint:
    return open_checkpoint(Source(str(folder), "full", str(folder)))


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("llama")
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense_delta, "_CHUNK_ELEMENTS", 32 * 5)  # several chunks, the last one shorter


def change(base: Path, folder: Path, make_delta) -> dict[str, np.ndarray]:
    """Copy of a checkpoint with `make_delta(name, shape)` added in float64; returns the deltas that came out."""
    folder.mkdir()
    (folder / "config.json").write_bytes((base / "config.json").read_bytes())
    before, after = load_file(base / "model.safetensors"), {}
    for name, tensor in before.items():
        delta = make_delta(name, tuple(tensor.shape))
        after[name] = tensor if delta is None else (tensor.double() + torch.from_numpy(delta)).to(tensor.dtype)
    save_file(after, folder / "model.safetensors", metadata={"format": "pt"})
    return {name: (after[name].double() - before[name].double()).numpy() for name in before}


def full_spectrum(name: str, shape: tuple[int, ...]) -> np.ndarray | None:
    """A delta whose singular values decay slowly."""
    if not any(layer in name for layer in LINEAR):
        return None
    rng = np.random.default_rng(len(name) + shape[0])
    left, _ = np.linalg.qr(rng.normal(size=(shape[0], min(shape))))
    right, _ = np.linalg.qr(rng.normal(size=(shape[1], min(shape))))
    return left * 0.8 ** np.arange(min(shape)) @ right.T


def test_error_is_that_of_the_exact_truncated_svd(llama: Path, tmp_path: Path) -> None:
    deltas = change(llama, tmp_path / "merged", full_spectrum)
    report = extract_lora(read(tmp_path / "merged"), read(llama), tmp_path / "lora", ExtractOptions(rank=6))
    assert {module.target for module in report.modules} == {
        name for name in deltas if any(part in name for part in LINEAR)
    }
    assert not report.unchanged and not report.left_out
    adapter = open_adapter(Source("lora", "adapter", str(tmp_path / "lora")))
    for module in report.modules:
        delta = deltas[module.target]
        u, s, vt = np.linalg.svd(delta, full_matrices=False)
        left, right = adapter.deltas[module.target].factors()
        best = np.linalg.norm(s[6:]) / np.linalg.norm(s)
        assert module.norm == pytest.approx(np.linalg.norm(delta), rel=1e-6)
        assert np.linalg.norm(delta - left @ right) / np.linalg.norm(delta) == pytest.approx(module.error, rel=1e-4)
        # Two power iterations: within a thousandth of the optimum at this decay.
        assert best * (1 - 1e-6) <= module.error <= best * 1.001
        np.testing.assert_allclose(left @ right, (u[:, :6] * s[:6]) @ vt[:6], atol=0.02)
    norms = np.array([module.norm for module in report.modules])
    errors = np.array([module.error for module in report.modules])
    assert report.error == pytest.approx(np.linalg.norm(norms * errors) / np.linalg.norm(norms), rel=1e-12)


def test_an_adapter_replaces_the_model_that_was_in_its_folder(llama: Path, tmp_path: Path) -> None:
    """Beside a model, or the record of a merge, it would be taken for a part of it."""
    change(llama, tmp_path / "merged", full_spectrum)
    change(llama, tmp_path / "out", full_spectrum)
    (tmp_path / "out" / "merge_manifest.json").write_text("{}")
    with pytest.raises(ArgumentError, match="is not empty"):
        extract_lora(read(tmp_path / "merged"), read(llama), tmp_path / "out", ExtractOptions(rank=6))
    extract_lora(read(tmp_path / "merged"), read(llama), tmp_path / "out", ExtractOptions(rank=6), overwrite=True)
    expected = ["adapter_config.json", "adapter_model.safetensors"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == expected


def low_rank(name: str, shape: tuple[int, ...]) -> np.ndarray | None:
    if not any(layer in name for layer in ("q_proj", "down_proj")):
        return None
    rng = np.random.default_rng(len(name) + shape[0])
    return rng.normal(size=(shape[0], 5)) @ rng.normal(size=(5, shape[1]))


def test_a_low_rank_delta_is_recovered_and_peft_merges_it_back(llama: Path, tmp_path: Path) -> None:
    deltas = change(llama, tmp_path / "merged", low_rank)
    report = extract_lora(read(tmp_path / "merged"), read(llama), tmp_path / "lora", ExtractOptions(rank=5))
    assert len(report.modules) == 4
    assert "model.layers.0.self_attn.k_proj" in report.unchanged
    # Weights of size 1e1 rounded to fp32 hide 1e-6 of the delta, at most.
    assert report.error < 1e-6
    base = LlamaForCausalLM.from_pretrained(llama, dtype=torch.float32)
    state = PeftModel.from_pretrained(base, tmp_path / "lora").merge_and_unload().state_dict()
    for name, tensor in load_file(tmp_path / "merged" / "model.safetensors").items():
        scale = 1 + np.abs(deltas[name]).max()
        np.testing.assert_allclose(state[name].numpy(), tensor.numpy(), rtol=0, atol=3e-6 * scale)


def test_a_merge_of_adapters_comes_back_at_the_sum_of_their_ranks(llama: Path, tmp_path: Path) -> None:
    adapters = []
    for index in range(3):
        change(llama, tmp_path / f"full-{index}", lambda name, shape, i=index: low_rank(name * (i + 1), shape))
        extract_lora(
            read(tmp_path / f"full-{index}"), read(llama), tmp_path / f"{index}", ExtractOptions(rank=5, seed=index)
        )
        adapters.append(tmp_path / f"{index}")
    merge_adapters(adapters, [0.2, 0.3, 0.5], tmp_path / "adapter")
    base = LlamaForCausalLM.from_pretrained(llama, dtype=torch.float32)
    PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload().save_pretrained(tmp_path / "dense")

    report = extract_lora(read(tmp_path / "dense"), read(llama), tmp_path / "again", ExtractOptions(rank=15))
    assert report.error < 1e-6
    merged, again = (open_adapter(Source(n, "adapter", str(tmp_path / n))).deltas for n in ("adapter", "again"))
    assert set(merged) == set(again)
    for target, delta in merged.items():
        expected, actual = (np.matmul(*pair.factors()) for pair in (delta, again[target]))
        assert np.linalg.norm(actual - expected) < 1e-6 * np.linalg.norm(expected)


def test_an_energy_bound_picks_the_lowest_rank(llama: Path, tmp_path: Path) -> None:
    deltas = change(llama, tmp_path / "merged", full_spectrum)
    report = extract_lora(
        read(tmp_path / "merged"),
        read(llama),
        tmp_path / "lora",
        ExtractOptions(rank=12, energy=0.9, power_iterations=4),
    )
    for module in report.modules:
        values = np.linalg.svd(deltas[module.target], compute_uv=False) ** 2
        assert module.rank == 1 + np.argmax(np.cumsum(values) >= 0.9 * values.sum())
        assert module.error**2 <= 0.1 + 1e-6


def test_a_tied_embedding_is_not_extracted(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=4))
    for name in ("base", "merged"):
        model.save_pretrained(tmp_path / name)
        torch.nn.init.normal_(model.transformer.wte.weight)
    for names in (["wte"], ["lm_head", "c_attn"]):
        with pytest.raises(ArgumentError, match=rf"target_modules: .*{names[0]} shares its weight"):
            extract_lora(
                read(tmp_path / "merged"),
                read(tmp_path / "base"),
                tmp_path / "lora",
                ExtractOptions(target_modules=names),
            )


def test_transposed_layers_and_embeddings_of_gpt2(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=4, tie_word_embeddings=False)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    names = ("c_attn", "c_proj", "wte")

    def delta_of(name: str, shape: tuple[int, ...]) -> np.ndarray | None:
        if len(shape) != 2 or not any(part in name for part in names):
            return None
        rng = np.random.default_rng(len(name))
        return rng.normal(size=(shape[0], 3)) @ rng.normal(size=(3, shape[1]))

    deltas = change(tmp_path / "base", tmp_path / "merged", delta_of)
    report = extract_lora(
        read(tmp_path / "merged"),
        read(tmp_path / "base"),
        tmp_path / "lora",
        ExtractOptions(rank=3, target_modules=names),
    )
    assert report.error < 1e-6
    model = GPT2LMHeadModel.from_pretrained(tmp_path / "base", dtype=torch.float32)
    state = PeftModel.from_pretrained(model, tmp_path / "lora").merge_and_unload().state_dict()
    for name, tensor in load_file(tmp_path / "merged" / "model.safetensors").items():
        scale = 1 + np.abs(deltas[name]).max()
        np.testing.assert_allclose(state[name].numpy(), tensor.numpy(), rtol=0, atol=3e-6 * scale)


def test_what_an_adapter_cannot_hold_is_reported_with_its_norm(llama: Path, tmp_path: Path) -> None:
    def delta_of(name: str, shape: tuple[int, ...]) -> np.ndarray | None:
        return np.full(shape, 0.5) if "norm" in name else low_rank(name, shape)

    deltas = change(llama, tmp_path / "merged", delta_of)
    report = extract_lora(
        read(tmp_path / "merged"), read(llama), tmp_path / "lora", ExtractOptions(rank=5, dtype="BF16")
    )
    assert set(report.left_out) == {name for name in deltas if "norm" in name}
    n_extracted, n_left = len(report.modules), len(report.left_out)
    for account in report.accounts:
        assert (account.n_tensors, account.n_merged) == (len(deltas), n_extracted)
        assert account.n_copied == len(deltas) - n_extracted - n_left
        assert account.unused == {"that differ and are left as in the base": n_left}
    for name, norm in report.left_out.items():
        assert norm == pytest.approx(np.linalg.norm(deltas[name]), rel=1e-6)
    total = np.sqrt(sum(np.sum(delta**2) for delta in deltas.values()))
    lost = np.linalg.norm(list(report.left_out.values()))
    assert report.error == pytest.approx(lost / total, rel=1e-2)
    # bf16 factors: the measured error is that of the rounded ones.
    assert all(1e-4 < module.error < 2**-7 for module in report.modules)


@pytest.mark.parametrize(("value", "dtype"), [(1e30, torch.float32), (1e-290, torch.float64)])
def test_a_difference_beyond_float32_products_is_refused_and_the_rest_can_be_extracted(
    llama: Path, tmp_path: Path, value: float, dtype: torch.dtype
) -> None:
    name = "model.layers.1.self_attn.q_proj.weight"
    base = {key: tensor.to(dtype) for key, tensor in load_file(llama / "model.safetensors").items()}
    base[name] = torch.zeros_like(base[name])
    tuned = {key: tensor + (value if key == name else 0.1 * ("v_proj" in key)) for key, tensor in base.items()}
    for folder, tensors in (("base", base), ("tuned", tuned)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_bytes((llama / "config.json").read_bytes())
        save_file(tensors, tmp_path / folder / "model.safetensors")
    models = read(tmp_path / "tuned"), read(tmp_path / "base")
    with pytest.raises(NonFiniteError, match=rf"{name}.*tuned.*base.*Leave its module out of `target_modules`"):
        extract_lora(*models, tmp_path / "adapter", ExtractOptions(2, target_modules=["q_proj", "v_proj"]))
    assert not (tmp_path / "adapter").exists()
    actual = extract_lora(*models, tmp_path / "adapter", ExtractOptions(2, target_modules=["v_proj"]))
    assert {module.target for module in actual.modules} == {key for key in base if "v_proj" in key}
    assert actual.left_out == {name: pytest.approx(32 * value, rel=1e-12 if dtype == torch.float64 else 1e-6)}


def test_refusals_name_what_is_wrong(llama: Path, tmp_path: Path) -> None:
    change(llama, tmp_path / "same", lambda name, shape: None)
    with pytest.raises(CheckpointError, match=r"equal in all 14 modules"):
        extract_lora(read(tmp_path / "same"), read(llama), tmp_path / "lora")
    with pytest.raises(ArgumentError, match=r"target_modules: c_attn names no linear layer.*like .*down_proj"):
        extract_lora(
            read(tmp_path / "same"), read(llama), tmp_path / "lora", ExtractOptions(target_modules=["c_attn"])
        )
    with pytest.raises(ArgumentError, match=r"must be at least 1, but got 0"):
        extract_lora(read(tmp_path / "same"), read(llama), tmp_path / "lora", ExtractOptions(rank=0))

    tensors = load_file(llama / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    path = tmp_path / "same" / "model.safetensors"
    save_file(tensors | {name: torch.full_like(tensors[name], float("inf"))}, path)
    with pytest.raises(NonFiniteError, match=name):
        extract_lora(read(tmp_path / "same"), read(llama), tmp_path / "lora")
    save_file(tensors | {name: tensors[name][:-1].clone()}, path)
    with pytest.raises(CheckpointError, match=rf"{name}' is F32 \(32, 32\) in .* but F32 \(31, 32\)"):
        extract_lora(read(tmp_path / "same"), read(llama), tmp_path / "lora")
    save_file(tensors | {"model.norm.weight": torch.ones(31)}, path)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight differ in shape"):
        extract_lora(read(tmp_path / "same"), read(llama), tmp_path / "lora")
    (llama.parent / "bare").mkdir()
    (llama.parent / "bare" / "model.safetensors").write_bytes((llama / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"architecture None"):
        extract_lora(read(llama), read(llama.parent / "bare"), tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def test_codes_are_not_extracted_from(llama: Path, tmp_path: Path) -> None:
    shutil.copytree(llama, tmp_path / "coded")
    tensors = load_file(llama / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.qweight"] = torch.ones(2, 4, dtype=torch.int32)
    save_file(tensors, tmp_path / "coded/model.safetensors", {"format": "pt"})
    for pair in ((llama, tmp_path / "coded"), (tmp_path / "coded", llama)):
        with pytest.raises(CheckpointError, match="is quantised"):
            extract_lora(*map(read, pair), tmp_path / "lora")
