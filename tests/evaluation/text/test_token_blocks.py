"""How tokens become blocks: packed and row by row, against loops over single tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_frmerge.errors import ArgumentError
from hf_frmerge.evaluation.text.forward import rows_of
from hf_frmerge.evaluation.text.token_blocks import TokenBlocks, collate, cut, separate_rows

ROWS = st.lists(st.lists(st.tuples(st.integers(0, 9), st.booleans()), max_size=7), min_size=1, max_size=6)


def predicted(blocks: TokenBlocks) -> list[tuple[list[int], int]]:
    """What is predicted from what, one token after the other."""
    return [(blocks.context(i, 99).tolist(), int(blocks.targets[i])) for i in range(blocks.n_predictions)]


def check_numbering(blocks: TokenBlocks) -> None:
    """What is read from the logits of batches has the numbers that `start` gives, and those targets."""
    batch = collate([blocks[index] for index in range(len(blocks))])
    # "Logits" that are the number of their token in the block.
    logits = torch.arange(batch["input_ids"].shape[1])[None, :, None].expand(len(blocks), -1, 1)
    seen = [(blocks.start(index) + i, int(token), int(row)) for index, rows, targets in rows_of(batch, logits)
            for i, (token, row) in enumerate(zip(targets, rows[:, 0]))]  # fmt: skip
    assert [number for number, _, _ in seen] == list(range(blocks.n_predictions))
    assert [token for _, token, _ in seen] == blocks.targets.tolist()
    assert [row + 1 for _, _, row in seen] == [len(context) for context, _ in predicted(blocks)]


@given(st.lists(st.integers(0, 9), min_size=2, max_size=40), st.integers(2, 12))
def test_packed_every_token_but_the_first_is_predicted_once(tokens: list[int], block_size: int) -> None:
    blocks = cut(torch.tensor(tokens), block_size, 10, None)
    expected = []
    for position in range(1, len(tokens)):
        start = (position - 1) // (block_size - 1) * (block_size - 1)
        expected.append((tokens[start:position], tokens[position]))
    assert predicted(blocks) == expected
    check_numbering(blocks)


@given(ROWS)
def test_rows_are_read_each_by_itself_and_only_labels_count(rows: list[list[tuple[int, bool]]]) -> None:
    data: list[dict[str, Any]] = [
        {"input_ids": [token for token, _ in row], "labels": [token if counts else -100 for token, counts in row]}
        for row in rows
    ]
    expected = []
    for row in rows:
        tokens = [token for token, _ in row]
        expected += [(tokens[:i], token) for i, (token, counts) in enumerate(row) if counts and i > 0]
    if not expected:
        with pytest.raises(ArgumentError, match="nothing to predict"):
            separate_rows(None, data, 10, None)
        return
    blocks = separate_rows(None, data, 10, None)
    assert predicted(blocks) == expected
    assert blocks.n_samples == len(rows)
    check_numbering(blocks)


def test_masks_hide_and_positions_limit() -> None:
    row = {"input_ids": [1, 2, 3, 4, 5], "attention_mask": [1, 1, 1, 1, 0]}
    assert separate_rows(None, [row], 10, None).targets.tolist() == [2, 3, 4]
    assert separate_rows(None, [row], 10, 3).targets.tolist() == [2, 3]


def test_labels_that_do_not_fit_are_named() -> None:
    with pytest.raises(ArgumentError, match=r"Row 1 .* labels of shape \(\) for 2 tokens"):
        separate_rows(None, [{"input_ids": [1, 2]}, {"input_ids": [1, 2], "labels": 0}], 10, None)
