"""The folder that a GGUF file stands for: what lies beside it, what is made of it, and what is said of both."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path

import pytest
from project_file import PYPROJECT
from transformers import LlamaConfig, LlamaForCausalLM

pytest.importorskip("gguf")
pytest.importorskip("transformers", minversion="5.20")

from gguf_files import tensors_of, write_gguf

from hf_frmerge.checkpoints.folders import open_folder
from hf_frmerge.checkpoints.gguf.header import EXTRA
from hf_frmerge.checkpoints.resolve import resolve
from hf_frmerge.checkpoints.tensors.reader import open_checkpoint
from hf_frmerge.errors import CheckpointError

CONFIG = LlamaConfig(
    vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, max_position_embeddings=77, tie_word_embeddings=False,
)  # fmt: skip


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write_gguf(tmp_path / "m.gguf", "llama", CONFIG, tensors_of(LlamaForCausalLM(CONFIG), "llama"))
    return tmp_path / "m.gguf"


def test_a_config_is_made(file: Path) -> None:
    folder = open_folder(str(file))
    assert folder.names() == ["config.json", "m.gguf"] and folder.exists("config.json")
    assert not file.with_name("config.json").exists()
    content = folder.read("config.json")
    assert folder.size("config.json") == len(content) and folder.read("config.json", 2, 9) == content[2:9]
    config = json.loads(content)
    wanted = CONFIG.to_dict() | {"architectures": ["LlamaForCausalLM"], "dtype": "float32"}
    same = ("architectures", "dtype", "model_type", "vocab_size", "hidden_size", "intermediate_size", "head_dim",
            "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "max_position_embeddings",
            "tie_word_embeddings", "rope_parameters")  # fmt: skip
    assert {key: config[key] for key in same} == {key: wanted[key] for key in same}
    assert config["rms_norm_eps"] == pytest.approx(CONFIG.rms_norm_eps)


def test_what_is_made_changes_with_the_file(file: Path) -> None:
    folder = open_folder(str(file))
    before = folder.identity("config.json"), folder.read("config.json")
    other = LlamaConfig(**CONFIG.to_dict() | {"max_position_embeddings": 88})
    write_gguf(file, "llama", other, tensors_of(LlamaForCausalLM(other), "llama"))
    assert folder.identity("config.json") != before[0] and folder.read("config.json") != before[1]
    assert json.loads(folder.read("config.json"))["max_position_embeddings"] == 88


def test_a_config_beside_goes_first(file: Path) -> None:
    file.with_name("config.json").write_text("{}")
    folder = open_folder(str(file))
    assert folder.read("config.json") == b"{}" and folder.size("config.json") == 2
    assert folder.identity("config.json") != folder.identity("m.gguf")


def test_settings_of_which_no_config_can_be_made(file: Path) -> None:
    key, content = b"llama.attention.head_count", file.read_bytes()
    heads = key + struct.pack("<II", 4, 2)
    assert content.count(heads) == 1
    file.write_bytes(content.replace(heads, key + struct.pack("<II", 4, 0)))
    with pytest.raises(CheckpointError, match=r"no config of the settings in '.*m\.gguf' \(ZeroDivisionError"):
        open_folder(str(file)).read("config.json")


def test_the_missing_package_is_named(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf.constants", None)  # as if it were not installed
    with pytest.raises(
        CheckpointError, match=r"m\.gguf' is a GGUF file.*not installed: pip install -U 'hf_frmerge\[gguf\]'"
    ):
        open_checkpoint(resolve(str(file)))


def test_the_extra_that_is_named_has_the_package() -> None:
    assert EXTRA == "pip install -U 'hf_frmerge[gguf]'"
    assert any(each.startswith("gguf>=") for each in PYPROJECT["project"]["optional-dependencies"]["gguf"])
