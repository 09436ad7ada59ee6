"""Matching checkpoints: what is merged, copied, dropped or refused, on files transformers wrote."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BertModel

from hf_frmerge.checkpoints.alignment.align import Alignment, align
from hf_frmerge.errors import CheckpointError


def rewrite(folder: Path, change) -> None:
    """Let `change` edit the tensors of a single-file checkpoint in place."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def actions(alignment: Alignment) -> dict[str, tuple[str, int]]:
    return {tensor.name: (tensor.action, tensor.donor) for tensor in alignment.tensors}


@pytest.fixture
def pair(tmp_path, save_model):
    """Two Llama folders with the same tensors, `a` and `b`."""
    save_model(tmp_path / "a", seed=1)
    save_model(tmp_path / "b", seed=2)
    return tmp_path / "a", tmp_path / "b"


def test_equal_layouts_merge_every_tensor_in_file_order(pair, open_folder_as):
    a, b = (open_folder_as(folder) for folder in pair)
    alignment = align([a, b])
    assert alignment.notes == []
    assert [tensor.name for tensor in alignment.tensors] == list(a.tensors)
    assert {tensor.action for tensor in alignment.tensors} == {"merge"}
    assert all((t.dtype, t.shape) == (a.tensors[t.name].dtype, a.tensors[t.name].shape) for t in alignment.tensors)


def test_sharded_and_single_files_match(tmp_path, save_model, open_folder_as):
    save_model(tmp_path / "a", max_shard_size="10KB")
    save_model(tmp_path / "b")
    a, b = open_folder_as(tmp_path / "a"), open_folder_as(tmp_path / "b")
    assert len(a.files) > 1
    assert [tensor.name for tensor in align([a, b]).tensors] == list(a.tensors)
    assert [tensor.name for tensor in align([b, a]).tensors] == list(b.tensors)


def test_dtype_and_order_come_from_the_base(tmp_path, save_model, open_folder_as):
    save_model(tmp_path / "base", dtype=torch.float32)
    save_model(tmp_path / "a", seed=1)
    save_model(tmp_path / "b", seed=2, dtype=torch.float16)
    save_model(tmp_path / "c", seed=3)
    base, a, b, c = (open_folder_as(tmp_path / name, name) for name in ("base", "a", "b", "c"))
    alignment = align([a, b], base)
    assert {tensor.dtype for tensor in alignment.tensors} == {"F32"}
    assert {tensor.donor for tensor in alignment.tensors} == {-1}
    count = len(base.tensors)
    assert alignment.notes == [
        f"{count} tensors are BF16 in 'a', and F32 in 'base'.",
        f"{count} tensors are F16 in 'b', and F32 in 'base'.",
    ]
    notes = align([a, b, c], base).notes  # models that differ alike share one
    assert notes[0] == f"{count} tensors are BF16 in 'a', 'c', and F32 in 'base'." and len(notes) == 2
    assert {tensor.dtype for tensor in align([a, b]).tensors} == {"BF16"}


def test_base_alone_gives_its_own_tensors(pair, open_folder_as):
    base = open_folder_as(pair[0])
    assert [tensor.name for tensor in align([], base).tensors] == list(base.tensors)


def test_one_expert_twice_is_noted(pair, open_folder_as):
    a = open_folder_as(pair[0], "a")
    assert align([a, open_folder_as(pair[0], "a")]).notes == ["'a' is listed twice; it counts with both its weights."]


def test_empty_tensors_are_copied(pair, open_folder_as):
    for folder in pair:
        rewrite(folder, lambda tensors: tensors.update(empty=torch.zeros(0, 3)))
    actual = actions(align([open_folder_as(folder) for folder in pair]))
    assert actual["empty"] == ("copy", 0)
    assert actual["model.norm.weight"] == ("merge", 0)


# Non-float tensors


@pytest.fixture
def berts(tmp_path, save_model):
    """Three BERT folders; the second and third carry the position ids that older transformers stored."""
    for place, name in enumerate("abc"):
        save_model(tmp_path / name, "bert", seed=place)
    for name in "bc":
        rewrite(tmp_path / name, lambda t: t.update({"bert.embeddings.position_ids": torch.arange(32)[None]}))
    return [tmp_path / name for name in "abc"]


def test_position_ids_that_some_lack_are_copied_from_the_first_that_has_them(berts, open_folder_as):
    a, b, c = (open_folder_as(folder, folder.name) for folder in berts)
    alignment = align([a, b, c])
    assert actions(alignment)["bert.embeddings.position_ids"] == ("copy", 1)
    assert alignment.notes == [
        "bert.embeddings.position_ids (I64) is missing in 1 of 3 checkpoints; it is copied from 'b'."
    ]
    with_base = align([a, b], c)
    assert actions(with_base)["bert.embeddings.position_ids"] == ("copy", -1)


def test_differing_contents_are_copied_with_a_note_and_equal_ones_silently(berts, open_folder_as):
    _, b, c = berts
    assert align([open_folder_as(b), open_folder_as(c)]).notes == []
    rewrite(c, lambda t: t.update({"bert.embeddings.position_ids": torch.arange(32)[None] + 1}))
    alignment = align([open_folder_as(b, "b"), open_folder_as(c, "c")])
    assert alignment.notes == ["bert.embeddings.position_ids (I64) differs in 'c'; it is copied from 'b'."]
    assert actions(alignment)["bert.embeddings.position_ids"] == ("copy", 0)


def test_other_shape_of_a_non_float_tensor_is_no_error(berts, open_folder_as):
    _, b, c = berts
    rewrite(c, lambda t: t.update({"bert.embeddings.position_ids": torch.arange(16)[None]}))
    alignment = align([open_folder_as(b), open_folder_as(c, "c")])
    assert "differs in 'c'" in alignment.notes[0]
    assert next(t for t in alignment.tensors if t.action == "copy").shape == (1, 32)


# Tied weights that were stored


@pytest.fixture
def tied(tmp_path, save_model):
    for place, name in enumerate("ab"):
        save_model(tmp_path / name, seed=place, tie_word_embeddings=True)
    return tmp_path / "a", tmp_path / "b"


def store_head(folder: Path) -> None:
    rewrite(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))


def test_stored_copy_of_a_tied_weight_is_left_out(tied, open_folder_as):
    store_head(tied[1])
    alignment = align([open_folder_as(tied[0], "a"), open_folder_as(tied[1], "b")])
    assert "lm_head.weight" not in actions(alignment)
    assert alignment.notes == [
        "lm_head.weight repeats model.embed_tokens.weight in 'b' (tied weights, stored twice); it is left out."
    ]


def test_stored_copy_stays_when_the_donor_of_the_config_has_it(tied, open_folder_as):
    store_head(tied[0])
    a, b = open_folder_as(tied[0], "a"), open_folder_as(tied[1], "b")
    alignment = align([a, b])
    assert actions(alignment)["lm_head.weight"] == ("merge", 0)
    assert np.array_equal(b.read("lm_head.weight"), b.read("model.embed_tokens.weight"))
    assert "lm_head.weight repeats model.embed_tokens.weight in 'a'" in alignment.notes[0]


def test_tied_biases_of_bert(berts, open_folder_as):
    for name in ("weight", "bias"):
        twin = "bert.embeddings.word_embeddings.weight" if name == "weight" else "cls.predictions.bias"
        rewrite(berts[2], lambda t, n=name, w=twin: t.update({f"cls.predictions.decoder.{n}": t[w].clone()}))
    alignment = align([open_folder_as(berts[1]), open_folder_as(berts[2])])
    assert len(alignment.notes) == 2
    assert not any("decoder" in tensor.name for tensor in alignment.tensors)


def test_untied_head_is_refused(tied, open_folder_as):
    rewrite(tied[1], lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    with pytest.raises(CheckpointError, match=r"'b' and 'a' .*it has 1 others \(lm_head.weight\).*ties this weight"):
        align([open_folder_as(tied[0], "a"), open_folder_as(tied[1], "b")])
    with pytest.raises(CheckpointError, match=r"'a' and 'b' .*it lacks 1 tensors \(lm_head.weight\)"):
        align([open_folder_as(tied[1], "b"), open_folder_as(tied[0], "a")])


def test_untied_head_merges_with_a_copy_as_the_message_says(tied, tmp_path, open_folder_as):
    rewrite(tied[1], lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    edit_config(tied[1], tie_word_embeddings=False)
    with pytest.raises(CheckpointError) as caught:
        align([open_folder_as(tied[0]), open_folder_as(tied[1])])
    model = AutoModelForCausalLM.from_pretrained(tied[0], dtype="auto")
    for statement in str(caught.value).split("`")[1::2]:
        exec(statement, {"model": model, "torch": torch})
    model.save_pretrained(tmp_path / "untied")
    assert {t.action for t in align([open_folder_as(tmp_path / "untied"), open_folder_as(tied[1])]).tensors} == {
        "merge"
    }
    untied, before = load_file(tmp_path / "untied/model.safetensors"), load_file(tied[0] / "model.safetensors")
    assert torch.equal(untied.pop("lm_head.weight"), before["model.embed_tokens.weight"])
    assert all(torch.equal(untied[name], before[name]) for name in before)
    assert json.loads((tmp_path / "untied/config.json").read_text())["tie_word_embeddings"] is False


def test_head_that_differs_in_its_last_element_only_is_not_tied(tmp_path, save_model, open_folder_as):
    for place, name in enumerate("ab"):
        save_model(tmp_path / name, seed=place, tie_word_embeddings=True, vocab_size=4096)

    def change(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["lm_head.weight"][-1, -1] += 1

    rewrite(tmp_path / "b", change)
    with pytest.raises(CheckpointError, match=r"it has 1 others \(lm_head\.weight\)"):
        align([open_folder_as(tmp_path / "a"), open_folder_as(tmp_path / "b")])


def test_copy_in_one_and_own_values_in_another_is_refused(tmp_path, tied, save_model, open_folder_as):
    save_model(tmp_path / "c", seed=5, tie_word_embeddings=True)
    store_head(tied[1])
    rewrite(tmp_path / "c", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    folders = [tied[0], tied[1], tmp_path / "c"]
    with pytest.raises(CheckpointError, match=r"lm_head\.weight"):
        align([open_folder_as(folder) for folder in folders])


def test_constant_tensors_are_not_taken_for_tied_ones(pair, open_folder_as):
    for folder in pair:
        rewrite(folder, lambda t: t.update({"model.norm.weight": torch.ones(32)}))
    rewrite(pair[1], lambda t: t.update({"extra.norm.weight": torch.ones(32)}))
    with pytest.raises(CheckpointError, match=r"extra\.norm\.weight"):
        align([open_folder_as(folder) for folder in pair])


# Refusals


def test_missing_and_other_names_are_listed_and_counted(pair, open_folder_as):
    def change(tensors):
        for name in [name for name in tensors if "self_attn" in name]:
            tensors[name.replace("self_attn", "mixer")] = tensors.pop(name)

    rewrite(pair[1], change)
    with pytest.raises(CheckpointError) as caught:
        align([open_folder_as(pair[0], "a"), open_folder_as(pair[1], "b")])
    message = str(caught.value)
    assert "'b' and 'a' do not have the same tensors: it lacks 8 tensors (model.layers.0.self_attn" in message
    assert "and 5 more) and it has 8 others (model.layers.0.mixer" in message
    assert "one architecture" in message


def test_base_is_checked_too(tmp_path, pair, save_model, open_folder_as):
    save_model(tmp_path / "base", num_hidden_layers=1)
    with pytest.raises(CheckpointError, match=r"'a' and 'base' .* it has 9 others \(model.layers.1"):
        align([open_folder_as(pair[0], "a"), open_folder_as(pair[1], "b")], open_folder_as(tmp_path / "base", "base"))


def test_shapes_are_both_named(tmp_path, pair, save_model, open_folder_as):
    save_model(tmp_path / "c", intermediate_size=64)
    with pytest.raises(CheckpointError) as caught:
        align([open_folder_as(pair[0], "a"), open_folder_as(pair[1], "b"), open_folder_as(tmp_path / "c", "c")])
    message = str(caught.value)
    assert message.startswith("6 tensors differ in shape: ")
    assert "model.layers.0.mlp.down_proj.weight is [32, 64] in 'c' and [32, 48] in 'a'" in message
    assert "and 3 more" in message
    assert "one architecture" in message


@pytest.mark.parametrize("tie", [True, False])
def test_vocabularies_of_different_sizes_get_a_hint(tmp_path, save_model, open_folder_as, tie):
    save_model(tmp_path / "a", tie_word_embeddings=tie)
    save_model(tmp_path / "b", tie_word_embeddings=tie, vocab_size=70)
    with pytest.raises(CheckpointError) as caught:
        align([open_folder_as(tmp_path / "a", "a"), open_folder_as(tmp_path / "b", "b")])
    assert "model.embed_tokens.weight is [70, 32] in 'b' and [64, 32] in 'a'" in str(caught.value)
    assert "vocabularies have different sizes (70 and 64)" in str(caught.value)
    assert "--tokenizer-source base, union or an expert" in str(caught.value)


@pytest.mark.parametrize("turned", [False, True])
def test_wrapper_prefix_is_named(pair, open_folder_as, turned):
    def wrap(tensors):
        for name in list(tensors):
            tensors[f"base_model.model.{name}"] = tensors.pop(name)

    rewrite(pair[1], wrap)
    folders = pair[::-1] if turned else pair
    with pytest.raises(CheckpointError, match=r"names in '[^']*/b' have the prefix 'base_model\.model\.'") as caught:
        align([open_folder_as(folder) for folder in folders])
    assert "`name.removeprefix('base_model.model.')`" in str(caught.value)
    tensors = load_file(pair[1] / "model.safetensors")
    named = {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}
    save_file(named, pair[1] / "model.safetensors", {"format": "pt"})
    assert {tensor.action for tensor in align([open_folder_as(folder) for folder in folders]).tensors} == {"merge"}


def test_other_heads_are_named_and_the_advice_works(tmp_path, save_model, open_folder_as):
    model = save_model(tmp_path / "a", "bert", dtype=torch.float32)
    BertModel(model.config, add_pooling_layer=False).save_pretrained(tmp_path / "b")
    with pytest.raises(
        CheckpointError, match=r"it lacks 5 tensors \(cls\.pred.*they differ in their heads"
    ) as refused:
        align([open_folder_as(tmp_path / "a", "a"), open_folder_as(tmp_path / "b", "b")])
    pattern = re.search(r"--leave-out '(.*?)'", str(refused.value))[1]
    folders = [open_folder_as(tmp_path / name, name) for name in ("a", "b")]
    names = {tensor.name for tensor in align(folders, is_apart=re.compile(pattern).search).tensors}
    assert names == {name for name in model.state_dict() if name.startswith("bert.") and not name.endswith("_ids")}


def test_quantised_checkpoints_are_refused(pair, open_folder_as):
    edit_config(pair[1], quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(CheckpointError, match=r"'b' is quantised \(gptq\).*Merge the unquantised"):
        align([open_folder_as(pair[0], "a"), open_folder_as(pair[1], "b")])


def test_fp8_tensors_are_refused_by_name(pair, open_folder_as):
    rewrite(pair[1], lambda t: t.update({"model.norm.weight": t["model.norm.weight"].to(torch.float8_e4m3fn)}))
    with pytest.raises(CheckpointError, match=r"'b' holds tensors .*: model.norm.weight \(F8_E4M3\)"):
        align([open_folder_as(pair[0], "a"), open_folder_as(pair[1], "b")])


def test_integers_in_place_of_floats_are_refused(pair, open_folder_as):
    rewrite(pair[1], lambda t: t.update({"model.norm.weight": t["model.norm.weight"].to(torch.int8)}))
    with pytest.raises(CheckpointError, match=r"'b' stores .*: model.norm.weight is BF16 in 'a' and I8 here"):
        align([open_folder_as(pair[0], "a"), open_folder_as(pair[1], "b")])
