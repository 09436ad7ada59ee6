"""Batches of prompts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_frmerge.calibration.blocks.streams import in_batches


@pytest.mark.parametrize("lengths", [[8] * 5, [8, 3, 8, 2, 8, 2, 2, 2, 2, 5], [2], []])
def test_short_prompts_share_a_batch_with_few_places_of_padding(lengths: list[int]) -> None:
    prompts = [np.arange(10 * number, 10 * number + length) for number, length in enumerate(lengths)]
    batches = list(in_batches(prompts, 3, 2, 99, is_held_out=True, device=torch.device("cpu")))
    held = []
    for batch in batches:
        assert batch.expert == 3 and batch.is_held_out
        ids = batch.inputs["input_ids"]
        assert ids.numel() <= 2 * max(lengths)
        mask = batch.mask_BT if batch.mask_BT is not None else torch.ones_like(ids, dtype=torch.bool)
        assert int(mask.sum()) > ids.numel() / 2 and bool((ids[~mask] == 99).all())
        held += [row[kept].tolist() for row, kept in zip(ids, mask)]
    assert sorted(held) == sorted(ids.tolist() for ids in prompts)
    longest = [batch.inputs["input_ids"].shape[1] for batch in batches]
    assert longest == sorted(longest, reverse=True)
