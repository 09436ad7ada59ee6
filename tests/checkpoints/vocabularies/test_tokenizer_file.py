"""What a `tokenizer.json` says about its tokens, for tokenizers that the tokenizers library writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from token_families import bpe
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from hf_frmerge.checkpoints.source import Source
from hf_frmerge.checkpoints.vocabularies.tokenizer_file import (
    TokenizerFile,
    check_ids,
    check_same_spelling,
    read_tokenizer,
)
from hf_frmerge.checkpoints.vocabularies.union import union_ids, union_json
from hf_frmerge.errors import CheckpointError

LETTERS = {"<unk>": 0, "a": 1, "b": 2, "▁a": 3}


def saved(folder: Path, tokenizer: Tokenizer, *added: str) -> TokenizerFile:
    folder.mkdir()
    tokenizer.add_tokens(list(added))
    tokenizer.save(str(folder / "tokenizer.json"))
    read = read_tokenizer(Source(folder.name, "full", str(folder)))
    assert read is not None and read.ids == tokenizer.get_vocab()
    return read


def word_level(*steps: normalizers.Normalizer, pre: pre_tokenizers.PreTokenizer | None = None) -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel(LETTERS, unk_token="<unk>"))
    if steps:
        tokenizer.normalizer = normalizers.Sequence(list(steps))
    if pre is not None:
        tokenizer.pre_tokenizer = pre
    return tokenizer


@pytest.mark.parametrize(
    ("first", "other", "reason"),
    [
        (word_level(), bpe(), "kind of model: WordLevel and BPE; byte-level: False and True"),
        (word_level(), word_level(normalizers.Lowercase()), r"normaliser: \[\] and \['Lowercase'\]"),
        (
            word_level(normalizers.BertNormalizer(lowercase=True)),
            word_level(normalizers.BertNormalizer(lowercase=False, strip_accents=False)),
            "lowercase",
        ),
        (word_level(), word_level(pre=pre_tokenizers.Metaspace()), "character for a space: None and ▁"),
        (
            Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, continuing_subword_prefix="##")),
            Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, continuing_subword_prefix="@@")),
            "mark inside a word: ## and @@",
        ),
    ],
)
def test_tokenizers_that_spell_differently(tmp_path: Path, first: Tokenizer, other: Tokenizer, reason: str) -> None:
    a, b = saved(tmp_path / "a", first), saved(tmp_path / "b", other)
    with pytest.raises(CheckpointError, match=f"tokenizers of 'a' and 'b' write their tokens differently.*{reason}"):
        check_same_spelling(a, b)
    check_same_spelling(a, a)


def test_two_ways_to_write_spaces_are_one_spelling(tmp_path: Path) -> None:
    """Llama's tokenizer writes spaces as a step of the normaliser or of the pre-tokenizer, by version."""
    old = word_level(normalizers.Prepend("▁"), normalizers.Replace(" ", "▁"))
    new = word_level(pre=pre_tokenizers.Metaspace(prepend_scheme="first"))
    check_same_spelling(saved(tmp_path / "a", old), saved(tmp_path / "b", new))


def test_an_id_of_two_tokens_is_refused(tmp_path: Path) -> None:
    tokenizer = saved(tmp_path / "a", word_level())
    content = json.loads((tmp_path / "a/tokenizer.json").read_text())
    content["model"]["vocab"]["b"] = 1
    (tmp_path / "a/tokenizer.json").write_text(json.dumps(content))
    broken = read_tokenizer(tokenizer.source)
    assert broken is not None
    with pytest.raises(CheckpointError, match=r"'a': tokenizer.json gives the id 1 to 'a' and to 'b'"):
        check_ids(broken)
    check_ids(tokenizer)


UNIGRAM = [("<unk>", 0.0), ("a", -1.0), ("b", -2.0), ("ab", -2.5)]
PIECES = {"[UNK]": 0, "a": 1, "##b": 2}


@pytest.mark.parametrize(
    ("first", "other", "text", "pieces"),
    [
        (
            Tokenizer(models.Unigram(UNIGRAM, unk_id=0)),
            Tokenizer(models.Unigram([*UNIGRAM, ("abab", -3.0)], unk_id=0)),
            "ab<x>abab<y>",
            ["ab", "<x>", "abab", "<y>"],
        ),
        (
            Tokenizer(models.WordPiece(PIECES, unk_token="[UNK]")),
            Tokenizer(models.WordPiece({**PIECES, "##c": 3}, unk_token="[UNK]")),
            "abc<y>ab<x>",
            ["a", "##b", "##c", "<y>", "a", "##b", "<x>"],
        ),
        (word_level(), word_level(), "a<y><x>", ["a", "<y>", "<x>"]),
    ],
)
def test_a_union_of_every_kind_of_model(
    tmp_path: Path, first: Tokenizer, other: Tokenizer, text: str, pieces: list[str]
) -> None:
    a, b = saved(tmp_path / "a", first, "<x>"), saved(tmp_path / "b", other, "<y>", "<x>")
    ids = union_ids(a, [b])
    assert {token: ids[token] for token in a.ids} == a.ids
    assert ids.keys() == a.ids.keys() | b.ids.keys() and sorted(ids.values()) == list(range(len(ids)))
    joined = Tokenizer.from_str(union_json(a, [b], ids))
    assert joined.get_vocab() == ids
    assert joined.encode(text).tokens == pieces


def test_what_cannot_be_joined_is_refused(tmp_path: Path) -> None:
    a = saved(tmp_path / "a", Tokenizer(models.Unigram(UNIGRAM, unk_id=0)))
    b = saved(tmp_path / "b", Tokenizer(models.Unigram(UNIGRAM, unk_id=0)), "<y>")
    with pytest.raises(CheckpointError, match="'a', 'b' cannot be joined into one: some tokens would get other ids"):
        union_json(a, [b], {**a.ids, "<y>": 9})  # a position of a Unigram model is its id
