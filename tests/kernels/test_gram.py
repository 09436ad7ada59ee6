"""Gram matrices of differences against numpy in float64, and the counting of values that are not finite."""

from __future__ import annotations

import numpy as np
import pytest
import xxhash

from hf_frmerge.kernels.interface import Kernels, Operand

DTYPES = ["BF16", "F16", "F32", "F64"]
NUMPY = {"F16": np.float16, "F32": np.float32, "F64": np.float64}
# Difference, product and at most 32 additions in a lane, then halves added: each within half a unit of 2^-23.
FLOAT32 = 37 * 2.0**-24
FLOAT64 = 1e-13


def encode(values, dtype, *, offset=0, is_delta=False):
    """Round float64 values to an operand at an odd address; return it and the values it holds."""
    if dtype == "BF16":
        bits = (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        held = (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    else:
        bits = values.astype(NUMPY[dtype])
        held = bits.astype(np.float64)
    buffer = np.full(bits.nbytes + offset, 0xFF, np.uint8)
    buffer[offset:] = bits.view(np.uint8)
    return Operand(buffer[offset:], dtype, is_delta), held


def reference(operands, values, n_blocks, block_len):
    points = [
        (x if i == 0 or operand.is_delta else x - values[0]).reshape(n_blocks, block_len)
        for i, (operand, x) in enumerate(zip(operands, values))
    ]
    stack = np.stack(points, axis=1)
    return stack @ stack.transpose(0, 2, 1)


def assert_close(gram, expected, tolerance):
    """Entries within `tolerance` of the product of the norms: what rounding can do at most (Cauchy-Schwarz)."""
    norms = np.sqrt(np.einsum("bii->bi", expected))
    np.testing.assert_array_equal(gram, gram.transpose(0, 2, 1))
    assert (np.abs(gram - expected) <= tolerance * norms[:, :, None] * norms[:, None, :]).all()


def experts(rng, dtypes, count, *, spread=0.05):
    """Fine-tunes of one base: nearly parallel, as they are in life."""
    base = rng.standard_normal(count)
    pairs = [
        encode(base + spread * rng.standard_normal(count), dtype, offset=2 * i + 1) for i, dtype in enumerate(dtypes)
    ]
    return [operand for operand, _ in pairs], [values for _, values in pairs]


def tolerance_for(kernels: Kernels, dtypes):
    return FLOAT64 if "F64" in dtypes or kernels.name.startswith("torch") else FLOAT32


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_number_of_operands(kernels, dtype):
    for n_operands in [*range(1, 10), 12, 13, 16, 17, 64]:
        rng = np.random.default_rng(n_operands)
        operands, values = experts(rng, [dtype] * n_operands, 3 * 301)
        expected = reference(operands, values, 3, 301)
        assert_close(kernels.gram(operands, 3, 301), expected, tolerance_for(kernels, [dtype]))
        assert_close(kernels.gram(operands, 3, 301, precise=True), expected, FLOAT64)


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_any_block_length(kernels, dtype):
    for block_len in [0, 1, 2, 3, 4, 7, 8, 15, 16, 17, 63, 127, 129, 255, 257, 511, 513, 1024, 1025]:
        rng = np.random.default_rng(block_len)
        operands, values = experts(rng, [dtype] * 3, 5 * block_len)
        expected = reference(operands, values, 5, block_len)
        assert_close(kernels.gram(operands, 5, block_len), expected, tolerance_for(kernels, [dtype]))
        assert_close(kernels.gram(operands, 5, block_len, precise=True), expected, FLOAT64)


@pytest.mark.parametrize("dtypes", [["BF16", "F16", "F32", "BF16", "F16"], ["F32", "BF16"], ["F16", "F64", "BF16"]])
def test_dtypes_may_be_mixed(kernels, dtypes):
    operands, values = experts(np.random.default_rng(1), dtypes, 2 * 777)
    assert_close(kernels.gram(operands, 2, 777), reference(operands, values, 2, 777), tolerance_for(kernels, dtypes))


@pytest.mark.parametrize("precise", [False, True])
def test_deltas_are_taken_as_they_are(kernels, precise):
    rng = np.random.default_rng(2)
    pairs = [encode(rng.standard_normal(300), "BF16", is_delta=i in (0, 2)) for i in range(4)]
    operands, values = [p[0] for p in pairs], [p[1] for p in pairs]
    gram = kernels.gram(operands, 1, 300, precise=precise)
    assert_close(gram, reference(operands, values, 1, 300), tolerance_for(kernels, []))


def test_a_difference_of_one_bf16_step_is_seen_exactly(kernels):
    """Inner products of the values themselves would lose it: 1e-8 of the norm, below float32."""
    base = np.full(40_000, 1.5)
    moved = base.copy()
    moved[77] += 2.0**-7
    operands = [encode(values, "BF16")[0] for values in (base, moved, base)]
    gram = kernels.gram(operands, 1, 40_000)[0]
    assert gram[1, 1] == 2.0**-14
    assert gram[0, 1] == 1.5 * 2.0**-7
    assert (gram[2] == 0).all()


def test_cosines_do_not_drift_on_a_large_tensor(kernels):
    """Sums of squares in float32 drift with the number of elements; flushed every few hundred, they do not."""
    count = 1_600_000
    rng = np.random.default_rng(3)
    pairs = [encode(rng.standard_normal(count), "BF16", is_delta=True) for _ in range(2)]
    pairs.append(encode(pairs[0][1] + 0.01 * rng.standard_normal(count), "BF16", is_delta=True))
    operands, values = [p[0] for p in pairs], [p[1] for p in pairs]

    def cosines(gram):
        norms = np.sqrt(np.diag(gram))
        return gram / norms[:, None] / norms

    exact = reference(operands, values, 1, count)[0]
    single = values[0].astype(np.float32)
    whole = np.cumsum(single * single, dtype=np.float32)[-1]
    assert abs(whole / exact[0, 0] - 1) > 1e-5  # the trap: these values do drift
    gram = kernels.gram(operands, 1, count)[0]
    np.testing.assert_allclose(cosines(gram), cosines(exact), atol=1e-7, rtol=0)
    np.testing.assert_allclose(np.diag(gram), np.diag(exact), rtol=1e-7)


@pytest.mark.parametrize("scale", [1e25, 1e-25, 1e-40])
def test_precise_holds_at_extreme_magnitudes(kernels, scale):
    rng = np.random.default_rng(4)
    pairs = [encode(scale * rng.standard_normal(500), "BF16") for _ in range(3)]
    operands, values = [p[0] for p in pairs], [p[1] for p in pairs]
    expected = reference(operands, values, 1, 500)
    assert (np.diag(expected[0]) > 0).all()
    assert_close(kernels.gram(operands, 1, 500, precise=True), expected, FLOAT64)


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_subnormal_values_count(kernels, dtype):
    """Every subnormal, beside normal ones so that the products are not lost."""
    bits = np.arange(1, 128 if dtype == "BF16" else 1024, dtype=np.uint16)
    one = np.full(bits.size, 0x3F80 if dtype == "BF16" else 0x3C00, np.uint16)
    operands = [Operand(one.view(np.uint8), dtype, True), Operand(bits.view(np.uint8), dtype, True)]
    step = 2.0**-133 if dtype == "BF16" else 2.0**-24
    assert kernels.gram(operands, 1, bits.size)[0, 0, 1] == step * bits.astype(np.int64).sum()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_shows_on_the_diagonal(kernels, dtype, bad):
    for position in (0, 40, 99):
        for which in (0, 1):
            arrays = [np.ones(300), np.full(300, 2.0)]
            arrays[which][100 + position] = bad
            gram = kernels.gram([encode(a, dtype)[0] for a in arrays], 3, 100)
            assert not np.isfinite(gram[1, which, which])
            assert np.isfinite(gram[[0, 2]]).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_count_nonfinite(kernels, dtype):
    if dtype in ("BF16", "F16"):
        every = np.arange(1 << 16, dtype=np.uint16)  # every bit pattern there is
        expected = {"BF16": 2 * 128, "F16": 2 * 1024}[dtype]  # sign, and mantissas of the largest exponent
        assert kernels.count_nonfinite(Operand(every.view(np.uint8), dtype)) == expected
    largest = np.finfo(NUMPY.get(dtype, np.float32)).max
    values = np.array([0.0, -0.0, np.nan, np.inf, -np.inf, largest, -largest, 1e-7] * 37, NUMPY.get(dtype, np.float32))
    with np.errstate(over="ignore"):
        operand, held = encode(values.astype(np.float64), dtype, offset=3)
    assert kernels.count_nonfinite(operand) == np.count_nonzero(~np.isfinite(held)) > 0
    assert kernels.count_nonfinite(Operand(np.zeros(0, np.uint8), dtype)) == 0


@pytest.mark.parametrize("precise", [False, True])
@pytest.mark.parametrize(
    ("n_blocks", "block_len"),
    # Around what XXH3 treats apart: 240 bytes, whole stripes of 64, whole blocks of 1024, and one byte pair more.
    [(1, 1), (1, 120), (1, 121), (1, 128), (1, 511), (1, 512), (1, 513), (7, 73), (3, 1024), (1, 4097), (40, 1000)],
)
def test_digests_are_xxh3_of_the_bytes_and_cost_the_gram_matrix_nothing(kernels, n_blocks, block_len, precise):
    rng = np.random.default_rng(12)
    operands, _ = experts(rng, [*DTYPES[:3], "BF16"], n_blocks * block_len)
    delta, _ = encode(rng.standard_normal(n_blocks * block_len), "F32", is_delta=True)
    gram, digests = kernels.gram_and_digests([*operands, delta], n_blocks, block_len, precise=precise)
    assert digests == [*(xxhash.xxh3_128(operand.data.tobytes()).hexdigest() for operand in operands), ""]
    np.testing.assert_array_equal(gram, kernels.gram([*operands, delta], n_blocks, block_len, precise=precise))
