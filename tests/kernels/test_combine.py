"""Combinations against numpy's float64 sum in the same order and an exact rounding by integers."""

from __future__ import annotations

import math
import struct

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from xxhash import xxh3_128_hexdigest

from hf_frmerge.kernels.interface import ITEMSIZE, Operand

DTYPES = ["BF16", "F16", "F32", "F64"]
GUARD = 0xA5
QUIET_NAN = {"BF16": 0x7FC0, "F16": 0x7E00, "F32": 0x7FC00000, "F64": 0x7FF8000000000000}
UNSIGNED = {"BF16": np.uint16, "F16": np.uint16, "F32": np.uint32, "F64": np.uint64}
NUMPY = {"F16": np.float16, "F32": np.float32, "F64": np.float64}


def decode(data, dtype):
    """Bytes -> float64, exactly."""
    values = data.copy().view(UNSIGNED[dtype])
    values = (values.astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else values.view(NUMPY[dtype])
    with np.errstate(invalid="ignore"):  # signalling NaN
        return values.astype(np.float64)


OVERFLOW = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000, "F64": 0x7FF0000000000000}  # infinity


def encode(values, dtype):
    """float64 -> bytes."""
    return round_once(values, dtype).view(np.uint8).copy()


def round_once(values, dtype):
    """float64 -> bits: the nearest multiple of the last place, ties to even, found with integers."""
    if dtype in ("F32", "F64"):
        with np.errstate(over="ignore"):
            bits = values.astype(NUMPY[dtype]).view(UNSIGNED[dtype]).copy()
    else:
        precision, least, bias = {"BF16": (8, -126, 127), "F16": (11, -14, 15)}[dtype]
        bits = np.empty(values.shape, np.uint16)
        for i, value in enumerate(values.tolist()):
            sign = 1 << 15 if math.copysign(1.0, value) < 0 else 0
            overflow = (2 * bias + 1) << (precision - 1)
            if math.isnan(value):
                bits[i] = 0
                continue
            if math.isinf(value):
                bits[i] = sign | overflow
                continue
            exponent = max(math.frexp(value)[1] - 1, least) if value else least
            numerator, denominator = abs(value).as_integer_ratio()
            shift = precision - 1 - exponent
            numerator, denominator = numerator << max(shift, 0), denominator << max(-shift, 0)
            whole, rest = divmod(numerator, denominator)
            whole += 2 * rest > denominator or (2 * rest == denominator and whole % 2)
            # Counting up from zero, the numbers of a format are consecutive integers: a carry moves up a binade.
            bits[i] = sign | min(whole + ((exponent - least) << (precision - 1)), overflow)
    bits[np.isnan(values)] = QUIET_NAN[dtype]
    return bits


def sum_in_order(operands, coefficients, block_len):
    total = np.zeros(operands[0].data.size // ITEMSIZE[operands[0].dtype])
    with np.errstate(all="ignore"):
        for block, row in enumerate(coefficients):
            span = slice(block * block_len, (block + 1) * block_len)
            used = [(c, decode(operand.data, operand.dtype)[span]) for c, operand in zip(row, operands) if c != 0]
            for i, (c, x) in enumerate(used):
                total[span] = c * x if i == 0 else total[span] + c * x
    return total


def combine(kernels, operands, coefficients, out_dtype, n_blocks, block_len):
    """Run into the middle of a guarded buffer at an odd address; return the bits."""
    size = n_blocks * block_len * ITEMSIZE[out_dtype]
    buffer = np.full(size + 65, GUARD, np.uint8)
    out = buffer[33 : 33 + size]
    actual = kernels.combine(operands, np.asarray(coefficients), out, out_dtype, n_blocks, block_len)
    assert (buffer[:33] == GUARD).all() and (buffer[33 + size :] == GUARD).all()
    assert actual.digest == xxh3_128_hexdigest(out.tobytes())
    assert actual.is_finite == np.isfinite(decode(out, out_dtype)).all()
    return buffer[33 : 33 + size].copy().view(UNSIGNED[out_dtype])


def misaligned(data, offset):
    buffer = np.zeros(data.size + offset, np.uint8)
    buffer[offset:] = data
    return buffer[offset:]


def random_operand(rng, dtype, count, *, any_bits):
    """Values around 1, or any bit pattern: subnormals, infinities and NaN among them."""
    if any_bits:
        data = rng.integers(0, 256, count * ITEMSIZE[dtype]).astype(np.uint8)
    elif dtype == "BF16":
        data = (rng.standard_normal(count).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    else:
        data = rng.standard_normal(count).astype(NUMPY[dtype]).view(np.uint8)
    return Operand(misaligned(data, int(rng.integers(0, 8))), dtype)


def of_float64(values):
    return Operand(np.array(values, np.float64).view(np.uint8), "F64")


@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("any_bits", [False, True])
def test_every_value_is_the_rounded_float64_sum(kernels, dtype, out_dtype, any_bits):
    rng = np.random.default_rng(7)
    for n_operands, count in [(1, 1), (2, 3), (3, 31), (5, 32), (8, 257), (17, 515)]:
        operands = [random_operand(rng, dtype, count, any_bits=any_bits) for _ in range(n_operands)]
        coefficients = rng.standard_normal((1, n_operands))
        expected = round_once(sum_in_order(operands, coefficients, count), out_dtype)
        np.testing.assert_array_equal(combine(kernels, operands, coefficients, out_dtype, 1, count), expected)


@pytest.mark.parametrize("out_dtype", ["BF16", "F16"])
def test_dtypes_may_be_mixed_and_is_delta_plays_no_part(kernels, out_dtype):
    rng = np.random.default_rng(8)
    operands = [random_operand(rng, dtype, 203, any_bits=True) for dtype in DTYPES * 2]
    operands = [Operand(o.data, o.dtype, is_delta=i % 3 == 1) for i, o in enumerate(operands)]
    coefficients = rng.standard_normal((1, 8))
    expected = round_once(sum_in_order(operands, coefficients, 203), out_dtype)
    np.testing.assert_array_equal(combine(kernels, operands, coefficients, out_dtype, 1, 203), expected)


@pytest.mark.parametrize(
    ("n_blocks", "block_len"), [(300, 1), (100, 3), (20, 17), (7, 64), (3, 129), (2, 1025), (5, 0)]
)
def test_each_block_has_its_own_coefficients(kernels, n_blocks, block_len):
    rng = np.random.default_rng(9)
    operands = [random_operand(rng, "BF16", n_blocks * block_len, any_bits=False) for _ in range(3)]
    coefficients = rng.standard_normal((n_blocks, 3)) * rng.integers(0, 2, (n_blocks, 3))  # some zero, some rows all
    expected = round_once(sum_in_order(operands, coefficients, block_len), "BF16")
    np.testing.assert_array_equal(combine(kernels, operands, coefficients, "BF16", n_blocks, block_len), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_hot_coefficients_return_the_operand_bit_for_bit(kernels, dtype):
    rng = np.random.default_rng(10)
    operands = [random_operand(rng, dtype, 301, any_bits=True) for _ in range(4)]
    for i in range(4):
        bits = operands[i].data.copy().view(UNSIGNED[dtype])
        expected = np.where(np.isnan(decode(operands[i].data, dtype)), UNSIGNED[dtype](QUIET_NAN[dtype]), bits)
        np.testing.assert_array_equal(combine(kernels, operands, np.eye(4)[[i]], dtype, 1, 301), expected)


def test_zeros_keep_their_sign_as_in_ieee_addition(kernels):
    both = [of_float64([0.0, -0.0, 0.0, -0.0]), of_float64([0.0, -0.0, -0.0, 0.0])]
    assert combine(kernels, both, [[1.0, 1.0]], "BF16", 1, 4).tolist() == [0, 0x8000, 0, 0]
    assert combine(kernels, both, [[-1.0, 0.0]], "F16", 1, 4).tolist() == [0x8000, 0, 0x8000, 0]
    assert combine(kernels, both, [[0.0, -0.0]], "F32", 1, 4).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("value", "dtype", "bits"),
    [
        # Just beside a tie, nearer than float32 can tell: rounding through float32 would take the even neighbour.
        (1 + 2.0**-8 + 2.0**-40, "BF16", 0x3F81),
        (1 + 3 * 2.0**-8 - 2.0**-40, "BF16", 0x3F81),
        (1 + 2.0**-11 + 2.0**-40, "F16", 0x3C01),
        (1 + 3 * 2.0**-11 - 2.0**-40, "F16", 0x3C01),
        # Exact ties go to even.
        (1 + 2.0**-8, "BF16", 0x3F80),
        (1 + 3 * 2.0**-8, "BF16", 0x3F82),
        (1 + 2.0**-11, "F16", 0x3C00),
        # The edge of overflow.
        (65519.99999999, "F16", 0x7BFF),
        (65520.0, "F16", 0x7C00),
        (-65536.0, "F16", 0xFC00),
        (2.0**128 - 2.0**119, "BF16", 0x7F80),
        (2.0**128 - 2.0**119 - 2.0**80, "BF16", 0x7F7F),
        (1e300, "BF16", 0x7F80),
        (-1e300, "F16", 0xFC00),
        # Subnormals: the step is fixed, and half of it is a tie with zero.
        (2.0**-134, "BF16", 0),
        (2.0**-134 + 2.0**-180, "BF16", 1),
        (-(2.0**-134), "BF16", 0x8000),
        (2.0**-126 - 2.0**-135, "BF16", 0x0080),
        (2.0**-25, "F16", 0),
        (1.5 * 2.0**-24, "F16", 2),
        (2.0**-14 - 2.0**-30, "F16", 0x0400),
        (5e-324, "BF16", 0),
    ],
)
def test_rounding_happens_once(kernels, value, dtype, bits):
    assert combine(kernels, [of_float64([value] * 9)], [[1.0]], dtype, 1, 9).tolist() == [bits] * 9
    assert round_once(np.array([value]), dtype).tolist() == [bits]  # the reference of the other tests agrees


@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("dtype", ["BF16", "F64"])  # 16-bit inputs go another way than the others
def test_one_infinity_or_nan_is_seen_wherever_it_is(kernels, dtype, out_dtype):
    """In whole registers of every width, in what is left over, in any block; and only what is not finite is."""
    n_blocks, count = 2, 171
    greatest = np.array([OVERFLOW[out_dtype] - 1], UNSIGNED[out_dtype])
    top = decode(greatest.view(np.uint8), out_dtype)[0]
    ones, wild = encode(np.ones(n_blocks * count), dtype), encode(np.array([math.nan, math.inf, -top, top]), dtype)
    out = np.empty(n_blocks * count * ITEMSIZE[out_dtype], np.uint8)
    table = np.array([[2.0, 0.25]] * n_blocks)
    for place in range(n_blocks * count):
        values = ones.copy().view(UNSIGNED[dtype])
        values[place] = wild.view(UNSIGNED[dtype])[place % 4]
        operands = [Operand(values.view(np.uint8), dtype), Operand(ones, dtype)]
        assert not kernels.combine(operands, table, out, out_dtype, n_blocks, count).is_finite
        assert np.flatnonzero(~np.isfinite(decode(out, out_dtype))).tolist() == [place]
    combine(kernels, [Operand(ones, dtype)], [[top]] * n_blocks, out_dtype, n_blocks, count)  # the greatest of all


@settings(max_examples=60, deadline=None)
@given(values=st.lists(st.floats(width=64), min_size=1, max_size=40))
@example(values=[math.inf, -math.inf, math.nan, 0.0, -0.0, 2.0**-1074, 1.7976931348623157e308])
def test_any_float64_rounds_to_nearest_even(values):
    from hf_frmerge.kernels.load import load_kernels
    from hf_frmerge.kernels.torch_backend import TorchKernels

    for backend in (load_kernels(), TorchKernels("cpu")):
        for dtype in DTYPES:
            bits = combine(backend, [of_float64(values)], [[1.0]], dtype, 1, len(values))
            np.testing.assert_array_equal(bits, round_once(np.array(values), dtype))


@given(value=st.floats(min_value=-65519, max_value=65519))
def test_the_reference_rounding_agrees_with_pythons_half(value):
    assert round_once(np.array([value]), "F16").tobytes() == struct.pack("<e", value)


def test_the_midpoint_of_bf16_neighbours_is_a_tie_and_goes_to_even(kernels):
    low = np.arange(0x3F00, 0x3F80, dtype=np.uint16)
    operands = [Operand(bits.view(np.uint8), "BF16") for bits in (low, low + 1)]
    result = combine(kernels, operands, [[0.5, 0.5]], "BF16", 1, low.size)
    np.testing.assert_array_equal(result, low + low % 2)


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize(
    "coefficients",
    [
        [0.5, 0.5],  # midpoints everywhere
        [0.5 + 2.0**-30, 0.5],  # beside them, nearer than float32 can tell
        [0.5 - 2.0**-30, 0.5],
        [1.0, -1.0 + 2.0**-24],  # sums far below their terms
        [2.0**-60, 2.0**-70],  # products that vanish in float32
        [2.0**70, -(2.0**69)],  # and that overflow
        [0.3, 0.7000001],
    ],
)
def test_float32_is_used_only_where_it_cannot_change_the_answer(kernels, dtype, coefficients):
    rng = np.random.default_rng(11)
    low = rng.integers(0, 0x7000, 8_000).astype(np.uint16)  # every magnitude, zeros among them
    low[rng.random(low.size) < 0.1] = 0
    near = np.maximum(low.astype(np.int32) + rng.integers(-2, 3, low.size), 0).astype(np.uint16)
    sign = (rng.integers(0, 2, low.size) << 15).astype(np.uint16)
    operands = [Operand((bits | sign).view(np.uint8), dtype) for bits in (low, near)]
    total = sum_in_order(operands, [coefficients], low.size)
    result = combine(kernels, operands, [coefficients], "BF16", 1, low.size)
    np.testing.assert_array_equal(result, round_once(total, "BF16"))
