"""What decides about single elements: every backend against loops in float64, and all of them bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_reference import chances, draws, mean, vote

from hf_frmerge.kernels import elementwise
from hf_frmerge.kernels.elementwise import (
    Agreement,
    Band,
    Dropout,
    Elementwise,
    RankedDropout,
    Run,
    Spread,
    key_of,
    spread_of,
    uniforms,
)
from hf_frmerge.kernels.interface import Kernels, Operand, digest
from hf_frmerge.kernels.torch_backend import TorchKernels

TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
KEEPS = {
    "band": Band((0.01, 0.02, 0.0)),
    "band with a limit": Band((0.01, 0.02, 0.0), (0.03, 0.05, 0.02)),
    "dropout": Dropout(7, 0.6),
    "ranked dropout": RankedDropout(7, 0.6, 0.3),
    "spread": Spread(3e-4),
    "agreement": Agreement(0.4, 2),
}


def operand(values: np.ndarray, dtype: str, is_delta: bool = False) -> Operand:
    stored = torch.from_numpy(values).to(TORCH[dtype])
    return Operand(stored.view(torch.uint8).numpy(), dtype, is_delta)


def values_of(x: Operand) -> np.ndarray:
    return torch.frombuffer(bytearray(x.data), dtype=TORCH[x.dtype]).double().numpy()


def family(dtypes: tuple[str, ...], size: int, seed: int = 0) -> list[Operand]:
    """A base and experts around it, some of whose elements are equal to the base's or to each other."""
    rng = np.random.default_rng(seed)
    base = rng.standard_normal(size) * 0.1
    experts = base + 0.02 * rng.standard_normal((len(dtypes) - 1, size))
    experts[:, ::7] = base[::7]
    experts[1:, 3::7] = experts[:1, 3::7]
    return [operand(x, dtype) for x, dtype in zip([base, *experts], dtypes)]


def deltas_of(operands: list[Operand]) -> np.ndarray:
    base = values_of(operands[0])
    return np.stack([values_of(x) if x.is_delta else values_of(x) - base for x in operands[1:]])


def merge(
    kernels: Kernels, operands: list[Operand], decision: Elementwise, run: Run, dtype: str = "F64", skip: int = 0,
    size: int | None = None,
) -> np.ndarray:  # fmt: skip
    size = values_of(operands[0]).size - skip if size is None else size
    out = np.zeros(size * TORCH[dtype].itemsize, np.uint8)
    (written, finite), bounded = kernels.merge_elements(operands, decision, run, skip, out, dtype)
    assert finite and bounded and written == digest(out)
    return out


def kept_by(keep: Any, deltas: np.ndarray, weights: np.ndarray, run: Run) -> np.ndarray:
    """What is kept, from the definitions."""
    sizes = np.abs(deltas.astype(np.float32))
    if isinstance(keep, Band):
        upper = np.full(len(deltas), np.inf) if keep.upper is None else np.array(keep.upper)
        inside = (sizes >= np.float32(keep.lower)[:, None]) & (sizes <= np.float32(upper)[:, None])
        return np.where(inside, deltas, 0.0)
    if isinstance(keep, Spread):
        return np.where(deltas.var(axis=0).astype(np.float32) >= np.float32(keep.threshold), deltas, 0.0)
    if isinstance(keep, Agreement):
        parts = len(deltas) * weights[:, None] * deltas
        agree = np.abs(parts) > keep.ratio * np.abs(parts.sum(axis=0) - parts)
        return np.where(agree.sum(axis=0) >= keep.n_experts, deltas, 0.0)
    drawn = np.stack([draws(keep.seed, i, run.tensor, run.start, deltas.shape[1]) for i in range(len(deltas))])
    if isinstance(keep, Dropout):
        return np.where(drawn < keep.density, deltas / keep.density, 0.0)
    chance = np.stack([chances(delta, run.row_len, keep.density, keep.epsilon) for delta in deltas])
    return np.where(drawn < chance, deltas / chance, 0.0)


@pytest.mark.parametrize("join", ["sum", "elect", "mean"])
@pytest.mark.parametrize("name", KEEPS)
def test_a_merge_is_its_definition(kernels: Kernels, name: str, join: Any) -> None:
    keep, weights = KEEPS[name], np.array([0.5, 0.3, 0.2])
    operands = family(("BF16", "F32", "F16", "BF16"), 60 * 21)
    run = Run("tensor", 60 * 21 * 5, 60)
    decision = Elementwise(keep, join, tuple(weights), 0.7)
    deltas = deltas_of(operands)
    kept = kept_by(keep, deltas, weights, run)
    joined = {"sum": 3 * weights @ kept, "elect": vote(kept, weights), "mean": mean(kept, weights)}[join]
    actual = merge(kernels, operands, decision, run).view(np.float64)
    np.testing.assert_allclose(actual, values_of(operands[0]) + 0.7 * joined, rtol=1e-13, atol=1e-16)
    assert 0.02 < np.mean(kept == 0) < 0.98
    if join == "elect":
        votes = (0.1, 0.2, 0.7)
        decision = Elementwise(keep, join, tuple(weights), 0.7, votes)
        actual = merge(kernels, operands, decision, run).view(np.float64)
        joined = vote(kept, weights, np.array(votes))
        np.testing.assert_allclose(actual, values_of(operands[0]) + 0.7 * joined, rtol=1e-13, atol=1e-16)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(sorted(KEEPS)),
    st.sampled_from(["sum", "elect", "mean"]),
    st.lists(st.sampled_from(sorted(TORCH)), min_size=4, max_size=4),
    st.sampled_from(sorted(TORCH)),
    st.integers(1, 90),
    st.integers(1, 60),
    st.integers(0, 10**12),
)
def test_all_backends_give_the_same_bits(
    name: str, join: Any, dtypes: list[str], out: str, row_len: int, n_rows: int, start: int
) -> None:
    operands = family(tuple(dtypes), row_len * n_rows, start % 97)
    if start % 3 == 0:
        operands[2] = operand(deltas_of(operands)[1], "F32", is_delta=True)
    decision = Elementwise(KEEPS[name], join, (0.5, 0.3, 0.2), 0.7)
    run = Run("tensor", start, row_len)
    expected = merge(TorchKernels("cpu"), operands, decision, run, out)
    native = pytest.importorskip("hf_frmerge.kernels.native")
    for level in native._native.levels():
        kernels = native.NativeKernels(level)
        assert merge(kernels, operands, decision, run, out).tobytes() == expected.tobytes(), level


# As float32: even, odd, the first of a binade, subnormal, the largest.
THRESHOLDS = np.float32([0.75, 0.75000006, 0.5, 3e-42, np.finfo(np.float32).max])


def around_ties(threshold: np.float32) -> np.ndarray:
    """Float64 numbers beside those that lie midway between a float32 threshold and the float32 below or above."""
    exact = float(threshold)
    below = float(np.nextafter(threshold, np.float32(0)))
    with np.errstate(over="ignore"):
        above = min(float(np.nextafter(threshold, np.float32(np.inf))), 2.0**128)
    found = []
    for middle in ((below + exact) / 2, (exact + above) / 2, exact):
        found += [middle, np.nextafter(middle, 0), np.nextafter(middle, np.inf), below]
    return np.array(found)


@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_thresholds_decide_about_numbers_rounded_to_float32(kernels: Kernels, threshold: np.float32) -> None:
    deltas = around_ties(threshold)
    operands = [operand(np.zeros(deltas.size), "F64"), operand(deltas, "F64", True)]
    run = Run("tensor", 0, 1)
    with np.errstate(over="ignore"):
        rounded = deltas.astype(np.float32)
    for keep, expected in (
        (Band((float(threshold),)), rounded >= threshold),
        (Band((0.0,), (float(threshold),)), rounded <= threshold),
    ):
        actual = merge(kernels, operands, Elementwise(keep, "sum", (1.0,), 1.0), run).view(np.float64)
        np.testing.assert_array_equal(actual, np.where(expected, deltas, 0.0))
        assert 0 < np.count_nonzero(expected) < deltas.size


@pytest.mark.parametrize("threshold", THRESHOLDS[:3])
def test_a_threshold_of_the_spread_decides_about_numbers_rounded_to_float32(
    kernels: Kernels, threshold: np.float32
) -> None:
    near = np.sqrt(around_ties(threshold)) * (1 + 2.0**-52 * np.arange(-8, 9)[:, None])
    delta = near.ravel()  # and its negative: the spread is its square, without rounding errors but that of the square
    operands = [operand(np.zeros(delta.size), "F64"), operand(delta, "F64", True), operand(-delta, "F64", True)]
    kept = (delta * delta).astype(np.float32) >= threshold
    assert 0.1 < np.mean(kept) < 0.9
    decision = Elementwise(Spread(float(threshold)), "sum", (0.5, 0.0), 1.0)
    actual = merge(kernels, operands, decision, Run("tensor", 0, 1)).view(np.float64)
    np.testing.assert_array_equal(actual, np.where(kept, delta, 0.0))
    expected = np.sum(delta[kept] ** 2)
    np.testing.assert_allclose(kernels.energies(operands, float(threshold)), [expected, expected], rtol=1e-13)


@pytest.mark.parametrize("alike", [1e-4, 1e-2, 1.0])
def test_ranks_of_magnitudes_that_are_nearly_alike(kernels: Kernels, alike: float) -> None:
    # As after one step of Adam: many magnitudes share the upper half of their bits, and some are equal.
    rng = np.random.default_rng(1)
    base = rng.standard_normal(3 * 500)
    signs = rng.choice([-1.0, 1.0], (2, 3 * 500))
    experts = [
        operand(x.astype(np.float32).astype(float), "F32", True) for x in signs * (1 + alike * rng.random(1500))
    ]
    experts[0].data[4000:5000] = experts[0].data[:1000]
    operands, run = [operand(base, "F32"), *experts], Run("tensor", 0, 500)
    keep, weights = RankedDropout(7, 0.5, 0.4), np.array([0.6, 0.4])
    kept = kept_by(keep, deltas_of(operands), weights, run)
    actual = merge(kernels, operands, Elementwise(keep, "sum", (0.6, 0.4), 1.0), run).view(np.float64)
    np.testing.assert_allclose(actual, values_of(operands[0]) + 2 * weights @ kept, rtol=1e-12, atol=1e-12)


def test_ranks_of_magnitudes_that_lie_far_apart(kernels: Kernels) -> None:
    rng = np.random.default_rng(2)
    delta = rng.standard_cauchy((6, 700))
    delta[1] = 0  # no bin is wide enough for a mean of zero, or narrow enough for the next two
    delta[2, 1:] = 0
    delta[3] *= 1e-42
    delta[4] *= 1e35 / np.abs(delta[4]).max()
    delta[5, ::2] = np.repeat(delta[5, ::4], 2)
    operands = [
        operand(np.zeros(delta.size), "F64"),
        operand(delta.astype(np.float32).astype(float).ravel(), "F32", True),
    ]
    keep, run = RankedDropout(7, 0.5, 0.4), Run("tensor", 0, 700)
    kept = kept_by(keep, deltas_of(operands), np.ones(1), run)
    actual = merge(kernels, operands, Elementwise(keep, "sum", (1.0,), 1.0), run).view(np.float64)
    np.testing.assert_allclose(actual, kept[0], rtol=1e-14)


@pytest.mark.parametrize("name", KEEPS)
def test_a_merge_does_not_depend_on_how_it_is_cut(kernels: Kernels, name: str) -> None:
    operands = family(("BF16", "BF16", "F32", "F16"), 40 * 60)
    decision = Elementwise(KEEPS[name], "elect", (0.5, 0.3, 0.2), 1.0)
    whole = merge(kernels, operands, decision, Run("tensor", 0, 40), "BF16")
    parts = []
    for first, last in ((0, 3), (3, 20), (20, 60)):
        cut = [
            Operand(x.data[first * 40 * TORCH[x.dtype].itemsize : last * 40 * TORCH[x.dtype].itemsize], x.dtype)
            for x in operands
        ]
        # Not whole rows: what is before and after is computed, but not written.
        skip, left = (7, 11) if first else (0, 0)
        size = (last - first) * 40 - skip - left
        place = Run("tensor", first * 40, 40)
        parts.append(((first * 40 + skip) * 2, merge(kernels, cut, decision, place, "BF16", skip, size)))
    for at, part in parts:
        assert part.tobytes() == whole[at : at + part.size].tobytes()


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
@pytest.mark.parametrize("stream", ["magnitudes", "spread"])
def test_keys_are_counted(kernels: Kernels, stream: Any, dtype: str) -> None:
    operands = family((dtype, "BF16", dtype, "F32"), 1500)
    deltas = deltas_of(operands)
    measured = np.abs(deltas) if stream == "magnitudes" else deltas.var(axis=0)[None]
    keys = measured.astype(np.float32).view(np.uint32)
    expected = np.stack([np.bincount(row >> 16, minlength=1 << 15) for row in keys])
    actual = kernels.count_keys(operands, stream)
    if stream == "magnitudes":
        np.testing.assert_array_equal(actual, expected)
    else:  # numpy adds up a variance in another order: keys may move to the next bin
        assert np.abs(actual.cumsum(axis=1) - expected.cumsum(axis=1)).max() <= 2 and actual.sum() == expected.sum()
    bins = np.array([[row[5] >> 16, row[9] >> 16] for row in keys])
    low = kernels.count_keys(operands, stream, bins)
    assert low.shape == (len(keys), 2, 1 << 16)
    for s, pair in enumerate(bins):
        np.testing.assert_array_equal(low[s].sum(axis=1), actual[s][pair])
        if stream == "magnitudes":
            for p, which in enumerate(pair):
                inside = keys[s][keys[s] >> 16 == which] & 0xFFFF
                np.testing.assert_array_equal(low[s, p], np.bincount(inside, minlength=1 << 16))


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize(("moved", "apart"), [(0, 1), (0, 1e-3), (1, 1e-3), (1, 1e-6), (0, 1e-21), (1e18, 1e17)])
def test_every_spread_of_a_bin_is_found(kernels: Kernels, dtype: str, moved: float, apart: float) -> None:
    # Also where all experts moved alike, so that float32 says little about how far they are apart.
    rng = np.random.default_rng(0)
    size = 20_000
    experts = moved * rng.standard_normal(size) + apart * rng.standard_normal((3, size))
    experts[:, ::5] = 0
    if dtype == "F16":
        experts = np.clip(experts, -6e4, 6e4)
    operands = [operand(np.zeros(size), "BF16"), *(operand(x, dtype) for x in experts)]
    deltas = deltas_of(operands)
    bins = np.unique(spread_of(deltas).view(np.uint32) >> 16)
    for b in bins[:: max(1, len(bins) // 12)].astype(np.int64):
        few = np.array([[b, bins[-1]]])
        np.testing.assert_array_equal(
            kernels.count_keys(operands, "spread", few), elementwise.count_keys(deltas, "spread", few)
        )


def test_many_elements_are_counted(kernels: Kernels) -> None:
    # More than the native kernels count before they add to the total.
    size = (1 << 22) + 12_345
    values = np.zeros(size)
    values[::3] = 0.5
    operands = [operand(np.zeros(size), "BF16"), operand(values, "BF16")]
    [counts] = kernels.count_keys(operands, "magnitudes")
    assert np.flatnonzero(counts).tolist() == [0, 0x3F00]
    assert counts[0x3F00] == -(-size // 3) and counts.sum() == size


@pytest.mark.parametrize("size", [1, 511, 512, 70_001])
def test_energies_are_sums_of_squares_and_the_same_bits_on_all_backends(kernels: Kernels, size: int) -> None:
    operands = family(("BF16", "F32", "F16", "F64"), size)
    deltas = deltas_of(operands)
    for threshold in (0.0, 3e-4):
        kept = np.where(deltas.var(axis=0).astype(np.float32) >= np.float32(threshold), deltas, 0.0)
        actual = kernels.energies(operands, threshold)
        np.testing.assert_allclose(actual, (kept**2).sum(axis=1), rtol=1e-12)
        assert actual.tobytes() == TorchKernels("cpu").energies(operands, threshold).tobytes()


@pytest.mark.parametrize("start", [0, 1, 2, 12345, 2**33 + 1])
def test_random_numbers_follow_from_key_and_position(start: int) -> None:
    actual = uniforms(key_of(3, 1, "model.norm"), start, 9)
    np.testing.assert_array_equal(actual, draws(3, 1, "model.norm", start, 9))
    np.testing.assert_array_equal(uniforms(key_of(3, 1, "model.norm"), start + 4, 5), actual[4:])


def test_random_numbers_are_uniform_and_differ_between_seeds_experts_and_tensors() -> None:
    keys = [key_of(seed, expert, name) for seed in (0, 1) for expert in (0, 1) for name in ("a", "b")]
    drawn = np.stack([uniforms(key, 0, 200_000) for key in keys])
    counts = np.stack([np.histogram(row, bins=50, range=(0, 1))[0] for row in drawn])
    # Chi-squared with 49 degrees of freedom: mean 49, standard deviation 9.9.
    statistic = ((counts - 4000.0) ** 2 / 4000.0).sum(axis=1)
    assert statistic.max() < 49 + 6 * 9.9
    correlation = np.corrcoef(np.concatenate([drawn, drawn[:1, np.r_[1:200_000, 0]]]))
    assert np.abs(correlation[np.triu_indices(len(correlation), 1)]).max() < 5 / np.sqrt(200_000)


@pytest.mark.parametrize("name", KEEPS)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_told_even_if_it_is_dropped(kernels: Kernels, name: str, value: float) -> None:
    operands = family(("F32", "F32", "F32", "F32"), 600)
    spoilt = values_of(operands[2])
    spoilt[77] = value
    operands[2] = operand(spoilt, "F32")
    out = np.zeros(600 * 4, np.uint8)
    decision = Elementwise(KEEPS[name], "elect", (0.5, 0.3, 0.2), 1.0)
    assert kernels.merge_elements(operands, decision, Run("tensor", 0, 30), 0, out, "F32")[1] is False
    assert kernels.count_keys(operands, "magnitudes")[1, 0x7F80:].sum() == 1


def test_a_result_that_overflows_is_told(kernels: Kernels) -> None:
    operands = family(("F32", "F32", "F32"), 600)
    out = np.zeros(600 * 2, np.uint8)
    decision = Elementwise(Band((0.0, 0.0)), "sum", (0.5, 0.5), 1e7)
    (_, finite), bounded = kernels.merge_elements(operands, decision, Run("tensor", 0, 30), 0, out, "F16")
    assert bounded and not finite
