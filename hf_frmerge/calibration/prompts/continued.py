"""Further prompts that experts write behind pieces of the prompts they have: a few of these become many."""

# Shape suffixes: B = prompts of a batch, T = tokens.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_frmerge.calibration.prompts.read_prompts import Prompts
from hf_frmerge.calibration.prompts.self_written import go_on, identities_of, kept_prompts, seed_of
from hf_frmerge.checkpoints.source import Source
from hf_frmerge.evaluation.models.loading import ModelLoader

_PIECE = 16
"""Tokens of a piece: enough to say what kind of text it is, few enough that what is written behind it is new."""


def continued_prompts(
    prompts: Sequence[Prompts],
    experts: Sequence[Source],
    base: Source | None,
    *,
    n_samples: int,
    max_length: int,
    seed: int,
    device: str = "cpu",
    cache_dir: Path | None = None,
) -> tuple[Prompts, ...]:
    """
    Let every expert go on with pieces of its prompts. They are kept as prompts are that experts write from nothing.

    A piece is 16 tokens from anywhere in a prompt, behind those that stand before every text; half of `max_length` if
    that is less, and a whole prompt if none is longer.

    Args:
        prompts: What the experts have; pieces are taken of each in turn.
        experts: Sources of all experts of the merge, on this machine; loaded one at a time.
        base: Base of adapters.
        n_samples: Prompts every expert writes.
        max_length: Tokens of each, with the piece.
        seed: Of pieces and draws; every expert has its own, which depends on its content.
        device: Where to compute.
        cache_dir: By default `prompts` in the user's cache.

    Returns:
        One for each of `prompts`, of the same source.

    Raises:
        ArgumentError: If an expert cannot write, with its name.
        NonFiniteError: If it predicts NaN or infinity.
        MergeError: If the cache cannot be written.
    """
    loader, found = ModelLoader(base, "auto", device), []
    for own in prompts:
        identities = identities_of(experts[own.expert], base)
        own_seed = seed_of(identities, seed)

        def write(
            model: Any, numbers: Sequence[int], own: Prompts = own, own_seed: int = own_seed
        ) -> NDArray[np.int64]:
            begun_BT = np.stack([_beginning(own, number, max_length, own_seed) for number in numbers])
            n_drawn = max_length - begun_BT.shape[1]
            draws = [np.random.default_rng([own_seed, number, n_drawn]).random(n_drawn) for number in numbers]
            return go_on(model, begun_BT, np.stack(draws))

        key = [identities, ["continued", own.digest, list(own.leading), max_length, own_seed, device]]
        written = kept_prompts(loader, experts[own.expert], key, n_samples, write, cache_dir)
        found.append(replace(own, token_ids=written))
    return tuple(found)


def _beginning(own: Prompts, number: int, max_length: int, seed: int) -> NDArray[np.int64]:
    """Return what a prompt is written behind: the tokens before every text and a piece of a prompt."""
    n_leading = len(own.leading)
    longest = max(len(ids) for ids in own.token_ids) - n_leading
    width = max(1, min(_PIECE, longest, (max_length - n_leading) // 2))
    bodies = [ids[n_leading:] for ids in own.token_ids if len(ids) - n_leading >= width]
    body = bodies[number % len(bodies)]
    start = np.random.default_rng([seed, number]).integers(len(body) - width + 1)
    return np.concatenate([np.array(own.leading, np.int64), body[start : start + width]])
