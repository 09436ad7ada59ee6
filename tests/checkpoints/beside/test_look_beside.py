"""What lies beside the weights: taken over where models agree, refused where no mean fits, and named where left."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import save_tokenizer
from transformers import AutoTokenizer, BertConfig, BertModel

from hf_frmerge import FisherRaoMerger, MergingArguments
from hf_frmerge.checkpoints.beside.look_beside import Beside, copy_files, look_beside
from hf_frmerge.checkpoints.source import Source
from hf_frmerge.errors import CheckpointError

POOLING = "1_Pooling/config.json"
DENSE = "2_Dense/model.safetensors"
STEPS = {"": "Transformer", "1_Pooling": "Pooling", "2_Dense": "Dense", "3_Normalize": "Normalize"}


def write(folder: Path, name: str, content: Any) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))


def full(folder: Path) -> Source:
    return Source(folder.name, "full", str(folder))


def look(*folders: Path, base: Path | None = None) -> Beside:
    return look_beside([full(folder) for folder in folders], full(base) if base else None, makes_adapter=False)


def origins(beside: Beside) -> dict[str, str]:
    return {file.name: file.source.spec for file in beside.files}


def merge(output: Path, *folders: Path, base: Path | None = None, **options: Any) -> FisherRaoMerger:
    args = MergingArguments(output_dir=str(output), disable_tqdm=True, **options)
    return FisherRaoMerger([str(f) for f in folders], args, base_model=str(base) if base else None).merge()


# Steps of sentence-transformers


def save_embedder(folder: Path, seed: int, pooling: dict[str, Any] | None = None) -> Path:
    """A BERT with pooling, a dense layer and normalisation, as sentence-transformers lays it out."""
    torch.manual_seed(seed)
    config = BertConfig(vocab_size=8, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    BertModel(config).save_pretrained(folder)
    modules = [
        {"idx": i, "name": str(i), "path": p, "type": f"sentence_transformers.models.{k}"}
        for i, (p, k) in enumerate(STEPS.items())
    ]
    write(folder, "modules.json", modules)
    write(folder, POOLING, pooling or {"embedding_dimension": 16, "pooling_mode": "cls", "include_prompt": True})
    write(folder, "2_Dense/config.json", {"in_features": 16, "out_features": 4, "bias": True})
    dense = torch.Generator().manual_seed(7)
    weights = {"linear.weight": torch.randn(4, 16, generator=dense), "linear.bias": torch.randn(4, generator=dense)}
    save_file(weights, folder / DENSE)
    write(folder, "config_sentence_transformers.json", {"__version__": {"x": str(seed)}, "prompts": {"query": "q: "}})
    write(folder, "sentence_bert_config.json", {"max_seq_length": 12})
    return folder


@pytest.fixture
def embedders(tmp_path: Path) -> tuple[Path, Path]:
    return save_embedder(tmp_path / "a", 1), save_embedder(tmp_path / "b", 2)


FILES = [
    "modules.json",
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
    POOLING,
    "2_Dense/config.json",
    DENSE,
]


def test_steps_that_all_share_are_taken_over_byte_for_byte(embedders, tmp_path):
    (embedders[0] / "3_Normalize").mkdir()  # where there is no config, there is an empty folder, or on the Hub none
    merged = merge(tmp_path / "out", *embedders)
    assert merged.report["notes"] == []
    for name in FILES:
        assert (tmp_path / "out" / name).read_bytes() == (embedders[0] / name).read_bytes()
    manifest = json.loads((tmp_path / "out/merge_manifest.json").read_text())
    assert set(FILES) <= set(manifest["files"])
    assert set(FILES) <= set(manifest["experts"][0]["files"])


def test_the_merged_embedding_is_that_of_the_merged_parts(embedders, tmp_path):
    library = pytest.importorskip("sentence_transformers")
    for folder in embedders:
        save_tokenizer(folder, ["a", "b"])
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.pad_token = "</s>"
        tokenizer.save_pretrained(folder)
    merge(tmp_path / "out", *embedders, method="linear", dtype="float32")
    tokens = AutoTokenizer.from_pretrained(embedders[0])("a b b", return_tensors="pt")
    model = BertModel.from_pretrained(embedders[0]).eval()
    others = BertModel.from_pretrained(embedders[1]).state_dict()
    model.load_state_dict({name: (value + others[name]) / 2 for name, value in model.state_dict().items()})
    dense = load_file(embedders[0] / DENSE)
    pooled = model(**tokens).last_hidden_state[:, 0]
    wanted = torch.tanh(pooled @ dense["linear.weight"].T + dense["linear.bias"])
    actual = library.SentenceTransformer(str(tmp_path / "out")).encode(["a b b"], convert_to_tensor=True)
    torch.testing.assert_close(actual, wanted / wanted.norm(), rtol=1e-5, atol=1e-5)


def test_steps_of_experts_go_before_those_of_the_base(embedders, tmp_path):
    base = save_embedder(tmp_path / "base", 0, {"embedding_dimension": 16, "pooling_mode": "mean"})
    actual = look(*embedders, base=base)
    assert origins(actual)[POOLING] == "a"
    assert actual.notes == (f"{POOLING} differs in 'base'; that of 'a' is taken.",)
    for path in [base / "modules.json", *base.glob("*sentence*"), *base.glob("[0-9]_*")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (note,) = look(*embedders, base=base).notes
    assert note.startswith("modules.json, config_sentence_transformers.json, sentence_bert_config.json and 3 more")
    assert note.endswith("are those of 'a'; there are none in 'base'.")


def test_both_spellings_of_one_pooling_agree(tmp_path):
    old = {"word_embedding_dimension": 16, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    a, b = save_embedder(tmp_path / "a", 1), save_embedder(tmp_path / "b", 2, old)
    step = {"module_input_name": "sentence_embedding", "module_output_name": "sentence_embedding"}
    write(a, "3_Normalize/config.json", step)
    assert look(a, b).notes == look(b, a).notes == ()


def test_two_poolings_are_refused_and_encoders_alone_merge_as_advised(embedders, tmp_path):
    write(embedders[1], POOLING, {"word_embedding_dimension": 16, "pooling_mode_mean_tokens": True})
    with pytest.raises(CheckpointError, match=r"1_Pooling/config\.json differs in pooling_mode\. No mean") as caught:
        merge(tmp_path / "out", *embedders)
    assert "pass copies of the folders without modules.json" in str(caught.value)
    assert not (tmp_path / "out").exists()
    copies = [Path(shutil.copytree(folder, tmp_path / "copies" / folder.name)) for folder in embedders]
    for copy in copies:
        (copy / "modules.json").unlink()
    merge(tmp_path / "out", *copies, method="linear", dtype="float32")
    a, b, merged = (load_file(folder / "model.safetensors") for folder in (*copies, tmp_path / "out"))
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor.double(), (a[name].double() + b[name].double()) / 2, rtol=1e-7, atol=1e-7)
    assert not (tmp_path / "out/1_Pooling").exists()


def test_other_steps_are_refused(embedders, tmp_path):
    write(embedders[1], "modules.json", json.loads((embedders[1] / "modules.json").read_text())[:-1])
    with pytest.raises(CheckpointError, match=r"different steps \(Transformer, Pooling, Dense, Normalize and"):
        look(*embedders)


def test_weights_of_a_step_are_no_part_of_the_model_and_merge_as_advised(embedders, tmp_path):
    weights = load_file(embedders[1] / DENSE)
    save_file({name: tensor + 1 for name, tensor in weights.items()}, embedders[1] / DENSE)
    with pytest.raises(
        CheckpointError, match=r"2_Dense/model\.safetensors differs in 'a' and 'b'.*A/2_Dense B/2_Dense"
    ):
        look(*embedders)
    merge(tmp_path / "dense", *(folder / "2_Dense" for folder in embedders), method="linear")
    a, b, merged = (
        load_file(path) for path in (*(e / DENSE for e in embedders), tmp_path / "dense/model.safetensors")
    )
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor.double(), (a[name].double() + b[name].double()) / 2, rtol=1e-7, atol=1e-7)
    assert json.loads((tmp_path / "dense/config.json").read_text())["out_features"] == 4


def test_settings_that_differ_are_told(embedders):
    write(embedders[1], "sentence_bert_config.json", {"max_seq_length": 99})
    write(embedders[1], "sentence_xlnet_config.json", {"max_seq_length": 99})
    write(embedders[1], "config_sentence_transformers.json", {"prompts": {"query": "other: "}})
    assert look(*embedders).notes == (
        "config_sentence_transformers.json differs in 'b'; that of 'a' is taken.",
        "sentence_bert_config.json differs in 'b'; that of 'a' is taken.",
        "Beside the weights these were left behind: sentence_xlnet_config.json of 'b'.",
    )


@pytest.mark.parametrize("path", ["../elsewhere", "/etc", "a/../../b"])
def test_steps_outside_of_the_folder_are_not_read(embedders, path):
    write(embedders[0], "modules.json", [{"path": path, "type": "sentence_transformers.models.Pooling"}])
    with pytest.raises(CheckpointError, match="Nothing outside is read"):
        look(*embedders)


@pytest.mark.parametrize("content", ["{}", "[1]", "no json", '[{"path": ""}]'])
def test_modules_that_make_no_sense_are_named(embedders, content):
    write(embedders[0], "modules.json", content)
    if content != "{}":
        with pytest.raises(CheckpointError, match=r"'a': modules\.json makes no sense"):
            look(*embedders)


def test_models_in_the_folders_of_steps_are_refused(embedders):
    modules = [
        {"path": "", "type": "sentence_transformers.models.Transformer"},
        {"path": "1_Transformer", "type": "sentence_transformers.models.Transformer"},
    ]
    write(embedders[0], "modules.json", modules)
    with pytest.raises(CheckpointError, match=r"'1_Transformer' of modules\.json holds a model of its own"):
        look(*embedders)


# Tokenizers that the donor does not have, and those of adapters


@pytest.fixture
def bare(tmp_path, save_model) -> Path:
    save_model(tmp_path / "bare", vocab_size=6)
    return tmp_path / "bare"


def adapter(folder: Path, words: list[str], template: str | None = None) -> Source:
    folder.mkdir()
    save_tokenizer(folder, words, template)
    write(folder, "adapter_config.json", {"peft_type": "LORA"})
    write(folder, "adapter_model.safetensors", "")
    return Source(folder.name, "adapter", str(folder))


def test_a_base_without_tokenizer_gets_that_of_the_experts(bare, tmp_path, save_model):
    for name in ("a", "b"):
        save_model(tmp_path / name)
        save_tokenizer(tmp_path / name, ["x", "y", "z"], "{{ messages }}")
    actual = look(tmp_path / "a", tmp_path / "b", base=bare)
    assert {name: spec for name, spec in origins(actual).items() if spec != "bare"} == dict.fromkeys(
        ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"), "a"
    )
    assert "'bare' has no tokenizer; that of 'a' is taken" in actual.notes[0]


def test_adapters_that_agree_keep_their_tokenizer_and_template(tmp_path):
    a, b = adapter(tmp_path / "a", ["x"], "{{ t }}"), adapter(tmp_path / "b", ["x"], "{{ t }}")
    actual = look_beside([a, b], None, makes_adapter=True)
    assert actual.notes == ()
    copy_files(actual.files, tmp_path / "out")
    ours, theirs = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("out", "a"))
    assert (ours.get_vocab(), ours.chat_template) == (theirs.get_vocab(), "{{ t }}")


@pytest.mark.parametrize(("words", "template"), [(["y"], "{{ t }}"), (["x"], "{{ u }}"), (["x", "added"], "{{ t }}")])
def test_adapters_that_differ_get_none_and_are_told(tmp_path, words, template):
    a, b = adapter(tmp_path / "a", ["x"], "{{ t }}"), adapter(tmp_path / "b", words, template)
    actual = look_beside([a, b], None, makes_adapter=True)
    assert actual.files == ()
    assert "The tokenizers or chat templates beside 'a', 'b' differ: the merged adapter gets none" in actual.notes[0]


def test_tokens_without_embeddings_are_told(bare, tmp_path):
    adapters = [adapter(tmp_path / name, ["x", "y", "z", "added", "too"]) for name in ("a", "b")]
    for makes_adapter in (True, False):
        actual = look_beside(adapters, full(bare), makes_adapter=makes_adapter)
        assert origins(actual)["tokenizer.json"] == "a"
        assert any("ids up to 7, but 'bare' has embeddings for 6 only" in note for note in actual.notes)


def test_tokens_that_only_an_adapter_has_are_told_beside_the_tokenizer_of_the_base(bare, tmp_path):
    save_tokenizer(bare, ["x", "y", "z"], "{{ base }}")
    actual = look_beside(
        [adapter(tmp_path / "a", ["x", "y", "z", "added"], "{{ t }}")], full(bare), makes_adapter=False
    )
    assert set(origins(actual).values()) == {"bare"}
    assert actual.notes == (
        "tokenizer.json: the vocabulary of 'bare' (taken) differs from that of 'a' (1 tokens differ; sizes 6 and 7).",
        "The chat template of 'bare' (taken) differs from that of 'a'.",
    )


def test_special_tokens_that_differ_are_told(bare, tmp_path, save_model):
    save_model(tmp_path / "a", vocab_size=6)
    for folder, end in ((bare, "</s>"), (tmp_path / "a", "x")):
        save_tokenizer(folder, ["x", "y", "z"])
        config = json.loads((folder / "tokenizer_config.json").read_text())
        write(folder, "tokenizer_config.json", config | {"eos_token": {"content": end} if end == "x" else end})
    assert look(tmp_path / "a", base=bare).notes == (
        """tokenizer_config.json: eos_token is "</s>" in 'bare' (taken), "x" in 'a'.""",
    )


# What is left


def test_what_nobody_takes_over_is_named_and_what_no_loader_needs_is_not(bare, tmp_path, save_model):
    for name in ("a", "b"):
        save_model(tmp_path / name, vocab_size=6)
        for kept_out in ("README.md", "LICENSE", "training_args.bin", "optimizer.pt", "trainer_state.json", "x.gguf"):
            write(tmp_path / name, kept_out, "")
        for folder in ("runs", "checkpoint-5", ".cache", "original", "onnx"):
            write(tmp_path / name, f"{folder}/file", "")
    write(tmp_path / "a", "value_head.safetensors", "x")
    write(tmp_path / "b", "value_head.safetensors", "x")
    write(tmp_path / "b", "1_Pooling/config.json", "{}")
    write(tmp_path / "b", "preprocessor_config.json", "{}")
    write(bare, "processor_config.json", {"size": 1})
    write(tmp_path / "a", "processor_config.json", {"size": 2})
    write(tmp_path / "b", "processor_config.json", {"size": 1, "transformers_version": "5"})
    assert look(tmp_path / "a", tmp_path / "b", base=bare).notes == (
        "processor_config.json differs in 'a'; that of 'bare' is taken.",
        "Beside the weights these were left behind: 1_Pooling/ of 'b'; preprocessor_config.json of 'b'; "
        "value_head.safetensors of 'a', 'b'.",
    )
