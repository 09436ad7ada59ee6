"""
Texts that the merge itself goes on with while it is refined, so that it learns where its own words lead it.

Agarwal et al., On-Policy Distillation of Language Models (arXiv 2306.13649).
"""

# Shape suffixes: B = prompts, T = tokens.

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from hf_frmerge.calibration.blocks.blockwise_model import BlockwiseModel
from hf_frmerge.calibration.prompts.self_written import BATCH, write_behind
from hf_frmerge.calibration.refinement.corrected_merge import CorrectedMerge
from hf_frmerge.errors import ArgumentError
from hf_frmerge.evaluation.models.loading import predicts_next_token

Place = tuple[int, int]
"""Expert and step of a text."""


@dataclass(frozen=True)
class Rollouts:
    """
    Prompts that the merge has gone on with.

    Attributes:
        ids_BT: their tokens.
        n_given: how many at the beginning are the prompts'.
    """

    ids_BT: Tensor
    n_given: int


def is_on_policy(step: int, lmbda: float) -> bool:
    """Return whether a step, from 0, takes rollouts: a share of `lmbda` of all steps does, evenly spread."""
    return math.floor((step + 1) * lmbda) > math.floor(step * lmbda)


@torch.no_grad()
def write_rollouts(
    merge: CorrectedMerge, begun: Mapping[Place, Mapping[str, Tensor]], seed: int
) -> dict[Place, Rollouts]:
    """
    Let the merge, as it is now, go on from the first half of prompts to their length.

    Texts of one length are written together, up to `BATCH`. All weights of the merge are in memory once more, in the
    dtype of the products.

    Args:
        merge: The merge.
        begun: Prompts that share a step, as the model takes them; of different lengths all begin with half of the
            shortest, and end with the longest.
        seed: Of the draws; every prompt has random numbers of its own at every step.
    """
    forward, name = merge.writer(), merge.class_name
    by_lengths: dict[tuple[int, int], list[tuple[Place, int]]] = {}
    for place, inputs in begun.items():
        n_prompts, length = inputs["input_ids"].shape
        rows = by_lengths.setdefault((_n_given(inputs), length), [])
        rows += [(place, row) for row in range(n_prompts)]
    written: dict[Place, list[Tensor]] = {place: [] for place in begun}
    for (n_given, length), rows in by_lengths.items():
        for start in range(0, len(rows), BATCH):
            part = rows[start : start + BATCH]
            begun_BT = torch.stack([begun[place]["input_ids"][row, :n_given] for place, row in part])
            draws = [np.random.default_rng([seed, *place, row]).random(length - n_given) for place, row in part]
            ids_BT = write_behind(forward, begun_BT, torch.from_numpy(np.stack(draws)), name)
            for (place, _), ids_T in zip(part, ids_BT):
                written[place].append(ids_T)
    return {place: Rollouts(torch.stack(texts), _n_given(begun[place])) for place, texts in written.items()}


def _n_given(inputs: Mapping[str, Tensor]) -> int:
    """Return how many tokens of prompts are given: half of the shortest, so that padding never is."""
    mask_BT = inputs.get("attention_mask")
    shortest = inputs["input_ids"].shape[1] if mask_BT is None else int(mask_BT.sum(dim=1).min())
    return max(1, shortest // 2)


def check_writes(model: BlockwiseModel, option: str, writer: str) -> None:
    """
    Check that models of a kind can write texts, with weights of zeros: before long work.

    Args:
        model: The modules.
        option: The argument that asks for it.
        writer: Who is to write: `"the merge"`, or `"the experts"`.

    Raises:
        ArgumentError: If it is no causal language model, or keeps no cache of keys and values.
    """
    name = type(model.model).__name__
    if not predicts_next_token(model.model):
        raise ArgumentError(
            f"{name} does not write text, as {option} (--{option.replace('_', '-')}) would have {writer} do: only "
            "causal language models can. Leave it out."
        )
    zero = torch.zeros((), dtype=model.dtype, device=model.device)
    zeros = {
        # Of stacked matrices one takes memory: products of groups need rows that are apart.
        key: (zero if parameter.ndim < 3 else zero.new_zeros(parameter.shape[1:])).expand(parameter.shape)
        for key, parameter in model.model.named_parameters()
    }
    one = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    write_behind(partial(model.run_whole, zeros), one, torch.zeros(1, 1, dtype=torch.float64), name)
