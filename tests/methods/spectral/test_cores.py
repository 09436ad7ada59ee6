"""Low-rank deltas merged through their cores are the deltas merged as matrices."""

from __future__ import annotations

import numpy as np
import pytest
from spectral_reference import Array, base_of

from hf_frmerge.geometry.lowrank import Factors
from hf_frmerge.methods.spectral.decision import Spectral
from hf_frmerge.methods.spectral.inputs import Experts, SpectralOptions
from hf_frmerge.methods.table import METHODS

EQUIVARIANT = [method.name for method in METHODS.values() if method.cores and not method.needs_factors]


def factors(ranks: tuple[int, ...], rows: int, cols: int) -> list[Factors]:
    rng = np.random.default_rng(sum(ranks))
    return [
        Factors(rng.standard_normal((rows, r)), rng.standard_normal((r, cols)), rng.uniform(0.1, 2)) for r in ranks
    ]


def dense(pairs: list[Factors]) -> Array:
    return np.stack([scale * left @ right for left, right, scale in pairs])


@pytest.mark.parametrize("shape", [(40, 60), (60, 40)])
@pytest.mark.parametrize("ranks", [(4, 4), (2, 24), (9, 0), (40, 30)])  # also above 1/N of all, none, and too many
@pytest.mark.parametrize("name", EQUIVARIANT)
def test_a_merge_of_cores_is_the_merge(name: str, ranks: tuple[int, ...], shape: tuple[int, int]) -> None:
    pairs = factors(ranks, *shape)
    for weights in ((0.5, 0.5), (0.7, 0.3)):
        decision = Spectral(name, weights, 1.0, SpectralOptions(METHODS[name].density or 1.0))
        expected = decision.merge(Experts(dense(pairs).astype(np.float32), base_of(shape).astype(np.float32)))
        left, right, scale = decision.merge_factors(pairs)
        actual = scale * left @ right
        assert actual.shape == shape and left.shape[1] <= sum(ranks)
        assert np.linalg.norm(actual - expected) < 1e-4 * np.linalg.norm(expected)


def test_directions_that_no_expert_has_do_not_count_for_ties_in_core_space() -> None:
    [pair] = factors((5,), 30, 20)
    left, right = np.linalg.svd(pair.B)[0][:, :5], np.linalg.svd(pair.A)[2][:5].T
    core = left.T @ dense([pair])[0] @ right
    kept = np.where(abs(core) >= np.sort(abs(core), axis=None)[-10], core, 0.0)  # 0.4 of 25
    decision = Spectral("core_ties", (0.5, 0.5), 1.0, SpectralOptions(0.4))
    # Side by side the two have rank 10, of which 5 are nothing.
    [actual] = dense([decision.merge_factors([pair, pair._replace(scale=pair.scale)])])
    assert np.linalg.norm(actual - left @ kept @ right.T) < 1e-5 * np.linalg.norm(kept)


@pytest.mark.parametrize("name", [name for name in EQUIVARIANT if name != "dc_merge"])  # equal ones are all ties
def test_cores_of_equal_and_of_zero_deltas(name: str) -> None:
    [pair] = factors((5,), 30, 20)
    decision = Spectral(name, (0.5, 0.5), 1.0, SpectralOptions(METHODS[name].density or 1.0))
    expected = decision.merge(Experts(dense([pair, pair]).astype(np.float32)))
    [actual] = dense([decision.merge_factors([pair, pair])])
    assert np.linalg.norm(actual - expected) < 1e-4 * np.linalg.norm(expected)
    nothing = pair._replace(B=np.zeros((30, 5)))  # as an adapter is before its training
    assert not dense([decision.merge_factors([nothing, nothing])]).any()
