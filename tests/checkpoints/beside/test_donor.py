"""Files beside the weights: copied from the donor so that transformers loads them, and disagreements told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tiny_models import save_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from hf_frmerge.checkpoints.beside.disagreements import find_disagreements
from hf_frmerge.checkpoints.beside.donor import donor_files, write_config
from hf_frmerge.checkpoints.beside.look_beside import CarriedFile, copy_files
from hf_frmerge.checkpoints.resolve import Source
from hf_frmerge.errors import CheckpointError


def source(folder: Path | str, spec: str | None = None) -> Source:
    return Source(spec or Path(folder).name, "full", str(folder))


def edit(folder: Path, name: str = "config.json", **values: object) -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture
def donor(tmp_path, save_model) -> Path:
    save_model(tmp_path / "donor")
    save_tokenizer(tmp_path / "donor", ["a", "b"], "{{ messages }}")
    return tmp_path / "donor"


@pytest.fixture
def twin(donor) -> Path:
    return Path(shutil.copytree(donor, donor.with_name("twin")))


def test_only_what_a_loader_needs_is_listed(donor):
    keep = {"generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    also = {"preprocessor_config.json", "merges.txt", "spiece.model", "modeling_custom.py", "special_tokens_map.json"}
    never = [
        "README.md",
        "LICENSE",
        "training_args.bin",
        "trainer_state.json",
        "all_results.json",
        "eval_results.json",
        "train_results.json",
        "optimizer.pt",
        "scheduler.pt",
        "pytorch_model.bin.index.json",
        "adapter_config.json",
        "adapter_model.safetensors",
        "merge_manifest.json",
        ".gitattributes",
        "requirements.txt",
        "model.onnx",
    ]
    for name in [*also, *never]:
        (donor / name).write_text("x")
    (donor / ".git").mkdir()
    (donor / "additional_chat_templates").mkdir()
    (donor / "additional_chat_templates" / "tools.jinja").write_text("y")
    expected = keep | also | {"additional_chat_templates/tools.jinja"}
    assert set(donor_files(source(donor))) == expected


def test_copies_load_like_the_originals(donor, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    names = copy_files([CarriedFile(source(donor), name) for name in donor_files(source(donor))], output)
    assert not (output / "config.json").exists()
    for name in names:
        assert (output / name).read_bytes() == (donor / name).read_bytes()
    assert write_config(source(donor), output) == output / "config.json"
    assert (output / "config.json").read_bytes() == (donor / "config.json").read_bytes()
    shutil.copy(donor / "model.safetensors", output)
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(donor).get_vocab()
    assert tokenizer.chat_template == "{{ messages }}"
    assert GenerationConfig.from_pretrained(output) == GenerationConfig.from_pretrained(donor)
    assert AutoModelForCausalLM.from_pretrained(output).config.vocab_size == 64


def test_dtype_of_the_output_goes_into_the_config(donor, tmp_path):
    before = json.loads((donor / "config.json").read_text())
    assert before["dtype"] == "bfloat16"
    write_config(source(donor), tmp_path, dtype="float32")
    assert json.loads((tmp_path / "config.json").read_text()) == before | {"dtype": "float32"}
    assert str(AutoConfig.from_pretrained(tmp_path).dtype) == "torch.float32"
    for same in ("auto", "bfloat16", None):
        write_config(source(donor), tmp_path, dtype=same)
        assert (tmp_path / "config.json").read_bytes() == (donor / "config.json").read_bytes()


def test_dtype_under_its_old_name_and_in_nested_configs(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "x", "torch_dtype": "float16", "text_config": {"dtype": "float16", "a": 1}})
    )
    write_config(source(tmp_path), tmp_path, dtype="bfloat16")
    assert json.loads((tmp_path / "config.json").read_text()) == {
        "model_type": "x",
        "torch_dtype": "bfloat16",
        "text_config": {"dtype": "bfloat16", "a": 1},
    }
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "x"}))
    write_config(source(tmp_path), tmp_path, dtype="bfloat16")
    assert json.loads((tmp_path / "config.json").read_text()) == {"model_type": "x", "dtype": "bfloat16"}


def test_donor_without_config(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json could not be read: No such file"):
        write_config(source(tmp_path), tmp_path)


def test_web_server_that_lists_nothing(donor, tmp_path, web):
    remote = Source("far", "full", f"{web[0]}/donor")
    assert donor_files(remote) == donor_files(source(donor))
    output = tmp_path / "out"
    output.mkdir()
    copy_files([CarriedFile(remote, name) for name in donor_files(remote)], output)
    assert (output / "tokenizer.json").read_bytes() == (donor / "tokenizer.json").read_bytes()


# Disagreements


def test_equal_models_agree(donor, twin):
    edit(twin, _name_or_path="elsewhere", transformers_version="4.0.0", dtype="float32", use_cache=False)
    assert find_disagreements([source(donor), source(twin), source(donor)]) == []


def test_config_values_that_differ_are_named_with_their_holders(donor, twin, tmp_path):
    third = Path(shutil.copytree(donor, tmp_path / "third"))
    edit(twin, eos_token_id=7, tie_word_embeddings=True, vocab_size=65, max_position_embeddings=9)
    edit(third, eos_token_id=7, rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    actual = find_disagreements([source(donor), source(twin), source(third)])
    assert actual == [
        "config.json: eos_token_id is 2 in 'donor' (taken), 7 in 'twin', 'third'.",
        "config.json: max_position_embeddings is 2048 in 'donor', 'third' (taken), 9 in 'twin'.",
        "config.json: rope_parameters.rope_theta is 10000.0 in 'donor', 'twin' (taken), 500000.0 in 'third'.",
        "config.json: tie_word_embeddings is false in 'donor', 'third' (taken), true in 'twin'.",
        "config.json: vocab_size is 64 in 'donor', 'third' (taken), 65 in 'twin'.",
    ]


def test_rotary_settings_compare_across_transformers_versions(donor, twin):
    old = json.loads((twin / "config.json").read_text())
    del old["rope_parameters"]
    (twin / "config.json").write_text(json.dumps(old | {"rope_theta": 10000.0, "rope_scaling": None}))
    assert find_disagreements([source(donor), source(twin)]) == []
    (twin / "config.json").write_text(json.dumps(old | {"rope_theta": 30000.0, "rope_scaling": {"type": "linear"}}))
    assert find_disagreements([source(donor), source(twin)]) == [
        "config.json: rope_parameters.rope_theta is 10000.0 in 'donor' (taken), 30000.0 in 'twin'.",
        """config.json: rope_parameters.rope_type is not given in 'donor' (taken), "linear" in 'twin'.""",
    ]


def test_generation_config(donor, twin):
    edit(twin, "generation_config.json", eos_token_id=[2, 7])
    assert find_disagreements([source(donor), source(twin)]) == [
        "generation_config.json: eos_token_id is 2 in 'donor' (taken), [2, 7] in 'twin'."
    ]


def test_vocabularies(donor, twin):
    save_tokenizer(twin, ["a", "c", "d"], "{{ messages }}")
    assert find_disagreements([source(donor), source(twin)]) == [
        "tokenizer.json: the vocabulary of 'donor' (taken) differs from that of 'twin' "
        "(3 tokens differ; sizes 5 and 6)."
    ]


def test_tokenizer_settings_alone_are_no_difference_of_vocabulary(donor, twin):
    edit(twin, "tokenizer.json", truncation=None, padding=None, version="1.0 ")
    assert find_disagreements([source(donor), source(twin)]) == []


def test_unigram_vocabularies(tmp_path):
    for name, tokens in (("a", [["x", 0.0], ["y", -1.0]]), ("b", [["x", 0.0], ["z", -1.0]])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_text(json.dumps({"model": {"vocab": tokens}, "added_tokens": []}))
    (actual,) = find_disagreements([source(tmp_path / "a"), source(tmp_path / "b")])
    assert "'b' (2 tokens differ; sizes 2 and 2)" in actual


def test_broken_tokenizer_is_named(donor, twin):
    (twin / "tokenizer.json").write_text('{"model": {}}')
    with pytest.raises(CheckpointError, match=r"'twin': tokenizer\.json makes no sense: KeyError\('vocab'\)"):
        find_disagreements([source(donor), source(twin)])


def test_chat_templates(donor, twin, tmp_path):
    save_tokenizer(twin, ["a", "b"], "other")
    assert find_disagreements([source(donor), source(twin)]) == [
        "The chat template of 'donor' (taken) differs from that of 'twin'."
    ]
    bare = Path(shutil.copytree(donor, tmp_path / "bare"))
    (bare / "chat_template.jinja").unlink()
    assert find_disagreements([source(bare), source(donor), source(twin)]) == [
        "'bare' has no chat template, so neither has the output; there is one in 'donor', 'twin'."
    ]
    (twin / "chat_template.jinja").unlink()
    edit(twin, "tokenizer_config.json", chat_template="{{ messages }}")  # where older versions kept it
    assert find_disagreements([source(donor), source(twin)]) == []


def test_expert_without_tokenizer_or_config_is_passed_over(donor, tmp_path):
    (tmp_path / "adapter").mkdir()
    assert find_disagreements([source(donor), Source("adapter", "adapter", str(tmp_path / "adapter"))]) == []
