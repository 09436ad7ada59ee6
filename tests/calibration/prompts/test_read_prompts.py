"""Prompts from files and datasets of every kind."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from datasets import Dataset
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from hf_frmerge.calibration.prompts.read_prompts import (
    Prompts,
    leading_tokens,
    read_prompts,
    split_prompts,
    with_more_beginnings,
)
from hf_frmerge.errors import ArgumentError
from tests.tiny_models import word_tokenizer

EXPERTS = ["org/math", "org/code"]
WORDS = [f"w{number}" for number in range(1000)]
TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}[bot]{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = word_tokenizer([*WORDS, "user", "bot", "[", "]", "w1w2"], pad_token="<pad>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def read(calibration: Any, tokenizer: Any = None, **options: Any) -> tuple[Prompts, ...]:
    chosen: dict[str, Any] = {"n_samples": 4, "max_length": 8, "seed": 0, "vocab_size": 2000} | options
    return read_prompts(calibration, tokenizer, experts=EXPERTS, **chosen)


def words(prompts: Prompts, tokenizer: Any) -> list[str]:
    return [tokenizer.decode(ids) for ids in prompts.token_ids]


def test_a_text_is_cut_into_blocks_from_all_over_it(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    (tmp_path / "a.txt").write_text(" ".join(WORDS))
    (prompts, other) = read(str(tmp_path / "a.txt"), tokenizer, n_samples=10)
    assert prompts.source == "file"
    starts = [int(tokenizer.decode(ids[:1])[1:]) for ids in prompts.token_ids]
    for ids, start in zip(prompts.token_ids, starts):
        assert tokenizer.decode(ids) == " ".join(WORDS[start : start + 8])
        assert start % 7 == 0  # blocks overlap by one token
    edges = [143 * tenth // 10 for tenth in range(11)]  # there are 143 blocks: one of each tenth of the text is chosen
    assert all(low <= start // 7 < high for low, start, high in zip(edges, starts, edges[1:]))
    assert [p.expert for p in (prompts, other)] == [0, 1]
    assert prompts.digest != other.digest  # every expert reads other parts


def bos_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that puts a token before every text, as Llama's and Gemma's do, and one behind it."""
    tokenizer = word_tokenizer(WORDS, bos_token="<s>", eos_token="</s>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return tokenizer


def test_blocks_from_within_a_text_begin_as_texts_do(tokenizer: PreTrainedTokenizerFast) -> None:
    assert leading_tokens(bos_tokenizer()) == (1,) and leading_tokens(tokenizer) == ()
    (prompts, _) = read([" ".join(WORDS)], bos_tokenizer(), n_samples=200)
    assert prompts.leading == (1,)
    assert all(ids[0] == 1 and 1 not in ids[1:] and len(ids) <= 8 for ids in prompts.token_ids)
    texts = [ids[1:] for ids in prompts.token_ids]
    assert texts[1][0] == texts[0][-1]  # blocks overlap by one token, and none is lost
    assert sorted({int(token) for ids in texts for token in ids}) == list(range(2, 1003))


def test_every_second_prompt_is_cut_for_the_sake_of_its_beginnings() -> None:
    ids = [np.arange(start, start + 40) for start in (100, 200, 300)] + [np.arange(10)]
    cut = with_more_beginnings(Prompts(0, tuple(ids), "file", (7,)))
    expected = [
        list(range(100, 140)),
        [7, *range(201, 211)], [7, *range(211, 221)], [7, *range(221, 231)], [7, *range(231, 240)],
        list(range(300, 340)),
        list(range(10)),  # its pieces would be too short to tell anything
    ]  # fmt: skip
    assert [piece.tolist() for piece in cut.token_ids] == expected


def test_the_seed_alone_chooses(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [" ".join(WORDS[start : start + 20]) for start in range(0, 1000, 20)]
    digests = [[p.digest for p in read(rows, tokenizer, seed=seed)] for seed in (0, 0, 1)]
    assert digests[0] == digests[1]
    assert not set(digests[0]) & set(digests[2])


def test_every_kind_of_data_gives_the_same_prompts(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    texts = [" ".join(WORDS[start : start + 9]) for start in range(0, 90, 9)]
    ids = [tokenizer(text).input_ids for text in texts]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "a.csv").write_text("text\n" + "".join(text + "\n" for text in texts))
    Dataset.from_dict({"input_ids": ids}).to_parquet(tmp_path / "a.parquet")
    padded = [{"input_ids": [0, 0, *row], "attention_mask": [0, 0, *[1] * len(row)]} for row in ids]
    kinds = [
        texts,
        Dataset.from_dict({"text": texts}),
        Dataset.from_dict({"input_ids": ids}).with_format("torch"),
        padded,
        ids,
        [np.array(row) for row in ids],
        [torch.tensor(row) for row in ids],
        tmp_path / "a.jsonl",
        str(tmp_path / "a.csv"),
        tmp_path / "a.parquet",
    ]
    for packing in (True, False):
        digests = [[p.digest for p in read(kind, tokenizer, packing=packing)] for kind in kinds]
        assert all(digest == digests[0] for digest in digests)


def test_a_row_is_a_prompt_without_packing(tmp_path: Path) -> None:
    """Truncated as the tokenizer does it, which keeps the token that ends a text."""
    tokenizer = word_tokenizer(WORDS, cls_token="<cls>", sep_token="<sep>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<cls> $A <sep>", special_tokens=[("<cls>", tokenizer.cls_token_id), ("<sep>", tokenizer.sep_token_id)]
    )
    (tmp_path / "lines.txt").write_text("w1 w2\n\nw3 w4 w5 w6 w7 w8 w9 w10\nw11\n")
    (prompts, _) = read(tmp_path / "lines.txt", tokenizer, packing=False, max_length=6)
    decoded = {tokenizer.decode(ids) for ids in prompts.token_ids}
    assert decoded == {"<cls> w1 w2 <sep>", "<cls> w3 w4 w5 w6 <sep>", "<cls> w11 <sep>"}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [{"role": "user", "content": "w1"}, {"role": "bot", "content": "w2"}]}, "[user] w1 [bot] w2"),
        ({"messages": [{"role": "user", "content": "w1"}]}, "[user] w1 [bot]"),  # the expert is to answer
        (
            {"prompt": [{"role": "user", "content": "w1"}], "completion": [{"role": "bot", "content": "w2"}]},
            "[user] w1 [bot] w2",
        ),
        ({"prompt": "w1", "completion": "w2"}, "w1w2"),
        ({"text": "w3", "messages": []}, "w3 w4"),
    ],
)
def test_conversations_get_the_chat_template(
    tokenizer: PreTrainedTokenizerFast, row: dict[str, Any], expected: str
) -> None:
    row = {name: "w3 w4" if name == "text" else value for name, value in row.items()}
    expected_ids = tokenizer(expected).input_ids
    assert len(expected_ids) >= 1
    rows = [{"input_ids": expected_ids}, row]
    (prompts, _) = read(rows, tokenizer, max_length=2 * len(expected_ids) + 1)
    assert prompts.token_ids[0].tolist() == 2 * expected_ids


def test_special_tokens_of_the_chat_template_are_not_doubled() -> None:
    tokenizer = word_tokenizer(WORDS, bos_token="<s>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    tokenizer.chat_template = "<s> {{ messages[0]['content'] }}"
    rows = [{"messages": [{"role": "user", "content": "w1 w2"}]}, {"text": "w1 w2"}]
    (prompts, _) = read(rows, tokenizer, packing=False)
    assert words(prompts, tokenizer) == ["<s> w1 w2"] * 2


def test_a_mapping_gives_experts_prompts_of_their_own(
    tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    both = read({"org/code": ["w1 w2"], "org/math": ["w3 w4"]}, tokenizer)
    assert [(p.expert, *words(p, tokenizer)) for p in both] == [(0, "w3 w4"), (1, "w1 w2")]
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        (only,) = read({"org/code": ["w1 w2"]}, tokenizer)
    assert only.expert == 1
    assert "'org/math' has no prompts" in caplog.text
    assert "'org/code' has 1 prompt of up to 8 tokens, fewer than the 4 asked for" in caplog.text


def test_a_long_dataset_is_not_read_to_its_end(tokenizer: PreTrainedTokenizerFast) -> None:
    class Endless:
        """A stream, such as `datasets.IterableDataset`, that can be read again and again."""

        n_read = 0

        def __iter__(self) -> Iterator[str]:
            while True:
                self.n_read += 1
                yield "w1 w2 w3 w4"

    for packing in (True, False):
        stream = Endless()
        prompts = read(stream, tokenizer, packing=packing)
        assert [len(p.token_ids) for p in prompts] == [4, 4]
        assert stream.n_read < 100


def test_texts_without_tokens_are_left_out_and_said(
    tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        (prompts, _) = read(["w1 w2", "", "  ", "w3"], tokenizer, packing=False)
    assert words(prompts, tokenizer) == ["w1 w2"]
    assert "3 of 4 texts have fewer than two tokens: they are left out" in caplog.text


@pytest.mark.parametrize(
    ("calibration", "reason"),
    [
        ({"math": ["w1 w2"]}, r"'math', which is none of the experts 'org/math', 'org/code'.*mean 'org/math'"),
        ({}, "no prompts for any expert"),
        ([], "'org/math' cannot be used.*0 token"),
        (["w1"], "'org/math' cannot be used.*has 1 token"),
        ([""], "'org/math' cannot be used.*0 token"),
        ({"org/code": "missing.txt"}, "'org/code' cannot be used.*'missing.txt' is not a file"),
        ([{"label": 1}], r"Row 0 of the data needs a column `text`.*found \['label'\]"),
        ([[5, 2000]], "token id 2000, but the model's vocabulary has 2000"),
        ([[5, -1]], "token id -1, but the model's vocabulary has 2000"),
        ([{"input_ids": "[5, 6]"}], r"Row 0 of the data needs a list of token ids .*found '\[5, 6\]'"),
        ([[[5, 6]]], r"needs a list of token ids .*found \[\[5, 6\]\]"),
        ([{"input_ids": None}], "needs a list of token ids .*found None"),
        ([{"messages": []}], "chat template cannot be applied to row 0"),
        ([{"messages": [{"content": "w1"}]}], "chat template cannot be applied to row 0.*`role` and a `content`"),
        (iter(["w1 w2"]), "read more than once, but got list_iterator"),
        (7, "Expected a file, a dataset or a list of texts.*int"),
    ],
)
@pytest.mark.parametrize("packing", [True, False])
def test_what_cannot_be_used_is_told(
    tokenizer: PreTrainedTokenizerFast, calibration: Any, reason: str, packing: bool
) -> None:
    if not packing:
        reason = re.sub(r"(has \d|\d) token", "hold nothing to predict", reason)
    with pytest.raises(ArgumentError, match=reason):
        read(calibration, tokenizer, packing=packing)


def test_text_needs_a_tokenizer_and_conversations_a_template() -> None:
    with pytest.raises(ArgumentError, match="there is no tokenizer: give one, or token ids"):
        read(["w1 w2"])
    assert len(read([[1, 2]])) == 2  # that advice
    conversation = {"messages": [{"role": "user", "content": "w1"}]}
    with pytest.raises(ArgumentError, match="needs a chat template"):
        read([conversation], word_tokenizer(WORDS))
    assert len(read([conversation | {"text": "w1 w2"}], word_tokenizer(WORDS))) == 2


def test_the_digest_is_of_lengths_and_tokens() -> None:
    one = Prompts(0, (np.array([1, 2]), np.array([3, 4, 5])), "file")
    stored = b"".join(n.to_bytes(8, "little") for n in (2, 1, 2, 3, 3, 4, 5))
    assert one.digest == xxhash.xxh3_128_hexdigest(stored)
    assert one.digest != Prompts(0, (np.array([1, 2, 3]), np.array([4, 5])), "file").digest
    assert one.digest == Prompts(1, one.token_ids, "self").digest


@pytest.mark.parametrize(("n_prompts", "n_held_out"), [(1, 0), (3, 0), (4, 1), (8, 2), (64, 16)])
def test_a_split_holds_a_share_of_every_expert_out(n_prompts: int, n_held_out: int) -> None:
    prompts = [Prompts(expert, tuple(np.array([expert, i]) for i in range(n_prompts)), "file") for expert in (0, 2)]
    fitted, held_out = split_prompts(prompts, 0.25, seed=3)
    assert [len(p.token_ids) for p in fitted] == [n_prompts - n_held_out] * 2
    assert [len(p.token_ids) for p in held_out] == ([n_held_out] * 2 if n_held_out else [])
    for own, *parts in zip(prompts, fitted, held_out):
        joined = [ids.tolist() for part in parts for ids in part.token_ids]
        assert sorted(joined) == [ids.tolist() for ids in own.token_ids]
        assert all(part.expert == own.expert for part in parts)
    again = split_prompts(prompts, 0.25, seed=3)
    assert [p.digest for p in again[1]] == [p.digest for p in held_out]
    if n_prompts == 64:
        assert [p.digest for p in split_prompts(prompts, 0.25, seed=4)[1]] != [p.digest for p in held_out]


def test_a_held_out_share_of_nearly_nothing_is_one_prompt() -> None:
    (fitted,), (held_out,) = split_prompts([Prompts(0, tuple(np.arange(2) for _ in range(5)), "file")], 0.01, seed=0)
    assert (len(fitted.token_ids), len(held_out.token_ids)) == (4, 1)
