"""Drawing and splitting of texts, and losses by text."""

from __future__ import annotations

import numpy as np
import pytest
from comparison_family import WORDS
from tiny_models import word_tokenizer

from hf_frmerge.comparison.texts import digest_of, split_texts
from hf_frmerge.errors import ArgumentError

TOKENIZER = word_tokenizer(WORDS)
BOOK = "\n".join(" ".join(np.random.default_rng(line).choice(WORDS, 12)) for line in range(200))


def split(data, max_tokens=0, seed=1, reads="text", tokenizer=TOKENIZER):
    return split_texts("red", data, tokenizer, max_tokens=max_tokens, seed=seed, reads=reads)


def test_a_long_text_is_cut_into_passages_that_are_the_text() -> None:
    splits = split([BOOK])
    rows = {row for one in splits.values() for row in one.rows}
    assert sum(len(one.rows) for one in splits.values()) == len(rows) > 15  # none is in both
    assert max(map(len, rows)) < 900
    places = sorted((BOOK.index(row), row) for row in rows)
    assert "".join(row for _, row in places) == BOOK
    assert [BOOK.index(row) for row in splits["test"].rows] == sorted(BOOK.index(row) for row in splits["test"].rows)


def test_a_quarter_is_for_validation_and_the_limit_counts_tokens_of_both() -> None:
    rows = [" ".join(WORDS[:10])] * 400
    splits = split(rows, max_tokens=1000)
    assert [len(splits[name].rows) for name in ("validation", "test")] == [25, 75]
    assert splits["validation"].n_predictions == 249
    assert [len(one.rows) for one in split(rows).values()] == [100, 300]


def test_the_draw_follows_from_the_seed() -> None:
    rows = [f"{word} w1 w2" for word in WORDS]
    assert split(rows)["test"].rows == split(rows)["test"].rows != split(rows, seed=2)["test"].rows
    digests = {digest_of({"red": split(rows, seed=seed)["test"]}) for seed in (1, 1, 2)}
    assert len(digests) == 2


def test_losses_of_a_text_are_those_of_its_tokens() -> None:
    one = split(["w1 w2 w3", "w4", "w5 w6", "w7 w8 w9 w10", "w1 w2"])["test"]
    lengths = [len(row.split()) for row in one.rows]
    log_probs = -np.arange(1.0, sum(lengths))  # of every token but the first
    losses = one.losses(log_probs)
    expected, start = [], 0
    for number, length in enumerate(lengths):
        n = length - (number == 0)
        expected.append((log_probs[start : start + n].sum(), n))
        start += n
    np.testing.assert_array_equal(losses.sums, [-total for total, _ in expected])
    np.testing.assert_array_equal(losses.counts, [n for _, n in expected])
    assert losses.mean == pytest.approx(-log_probs.mean())


def test_a_row_with_a_label_is_one_prediction() -> None:
    one = split([{"text": f"{word} w1", "label": 0} for word in WORDS], reads="labelled text")["test"]
    log_probs = -np.arange(30.0)
    np.testing.assert_array_equal(one.losses(log_probs).sums, -log_probs)
    assert one.n_predictions == len(one.rows) == one.losses(log_probs).counts.sum() == 30


def test_too_little_text_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"'red' has 3 passages.*Give 4 or more"):
        split(["w1 w2", "w3 w4", "w5"])
    assert split(["w1 w2", "w3 w4", "w5 w6", "w7 w8"])["test"].n_predictions == 5


def test_tokens_need_no_tokenizer() -> None:
    rows = [{"input_ids": [number, 1, 2]} for number in range(8)]
    assert split(rows, tokenizer=None)["test"].n_predictions == 17
