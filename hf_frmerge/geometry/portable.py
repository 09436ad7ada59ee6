r"""
Sums, powers and functions of an angle that have the same bits on every machine and for every size of array.

IEEE 754 fixes the last bit of `+ - * /` and `sqrt`. It does not fix the order in which a library adds up a sum, nor
the results of sines and powers. einsum, matmul and BLAS choose the order by size and by processor, and numpy uses
different code for inverse trigonometric functions and powers on processors with AVX-512. The functions of this module
use only those five operations, elementwise over the blocks; everything that coefficients depend on goes through them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

# x / sin(x) - 1 over s, s = sin(x/2)**2, highest power first: Chebyshev fit on 0 <= x <= pi/4, absolute error 3e-17.
_OVER_SINE = (
    0.5862262480092164,
    0.13890129550722435,
    0.3114441256831834,
    0.2960204583411719,
    0.3185427082035421,
    0.3409778249006265,
    0.3694088306939528,
    0.4063491978321203,
    0.45714285722325565,
    0.5333333333330381,
    0.6666666666666669,
)
# sin(x) / x - 1 over x**2, highest power first: the same on 0 <= x <= pi/2, absolute error 1e-18.
_SINC = (
    2.731444766986399e-15,
    -7.643970296798572e-13,
    1.6058977312464087e-10,
    -2.5052107616996182e-08,
    2.7557319219163234e-06,
    -0.00019841269841254974,
    0.008333333333333316,
    -0.16666666666666666,
)
_PI_REST = 1.2246467991473532e-16  # pi minus its float64
# Arrays of at most _SHORT rows and more than _FEW_ELEMENTS elements are added row by row, which is faster. The order
# of the additions is the same either way, so no bit depends on these.
_SHORT, _FEW_ELEMENTS = 16, 1024
_TINY = 2.0**-54  # lower bound of cos(theta/2)**2: keeps theta / sin(theta) finite at theta = pi


def fold(terms: Array) -> Array:
    """
    Sum over the first axis in an order that depends only on its length.

    Adds the second half of the rows to the first half until one row is left. Works in place: `terms` is overwritten.

    Args:
        terms (`np.ndarray`): `(n, ...)`, float64, owned by the caller.

    Returns:
        `np.ndarray`: `(...)`, float64; zeros if `n` is 0.
    """
    n = len(terms)
    if n == 0:
        return np.zeros(terms.shape[1:])
    # numpy is slow where the innermost axis is short, as after a transpose. Adding row by row avoids that, in the same
    # order.
    by_rows = n <= _SHORT and terms.strides[0] == terms.itemsize and terms.size > _FEW_ELEMENTS
    rows = list(terms) if by_rows else []
    while n > 1:
        half = (n + 1) // 2
        if by_rows:
            for i in range(n - half):
                rows[i] += rows[half + i]
        else:
            terms[: n - half] += terms[half:n]
        n = half
    return terms[0]


def sinc(x: Array) -> Array:
    """Return `sin(x) / x`, and 1 at 0, for `x` in radians, between 0 and pi."""
    x = np.asarray(x, dtype=np.float64)
    # sin(x) = sin(pi - x), so the polynomial is only needed up to pi/2. The quotient nearer / x is exactly 1 up to
    # there, and beyond it pi - x does not cancel, because _PI_REST holds the digits that float64 pi lacks.
    nearer = np.minimum(x, np.pi - x + _PI_REST)
    return _sinc(nearer) * np.divide(nearer, x, out=np.ones_like(x), where=x > 0)


def cosine_and_sinc(x: Array) -> tuple[Array, Array]:
    """Return `cos(x)` and `sin(x) / x` for `x` in radians, 0 to pi; the sine is inaccurate within 1e-8 of pi."""
    half = 0.5 * x
    half_sinc = _sinc(half)
    square = (half * half_sinc) ** 2
    return 1.0 - 2.0 * square, half_sinc * np.sqrt(np.maximum(1.0 - square, 0.0))


def angle_over_sine(cosine: Array) -> Array:
    r"""
    Return \(\theta / \sin\theta\), and 1 at 0, from \(\cos\theta\), which rounding may have pushed out of [-1, 1].

    \(\sin\theta = 4 \sin(\theta/4) \cos(\theta/4) \cos(\theta/2)\), so that the polynomial is only needed for the
    angle \(\theta/4\), at most pi/4.
    """
    half_cosine = np.sqrt(np.minimum(np.maximum(0.5 + 0.5 * cosine, _TINY), 1.0))
    quarter_cosine = np.sqrt(0.5 + 0.5 * half_cosine)
    return _over_sine(0.5 - 0.5 * quarter_cosine) / (half_cosine * quarter_cosine)


def arctan2(y: Array, x: Array) -> Array:
    r"""
    Angle of the point `(x, y)` in radians, for `x` and `y` that are not negative: from 0 to pi/2, and 0 at the origin.

    Halves the angle twice by \(\tan(\theta/2) = y / (x + \sqrt{x^2 + y^2})\), which adds only non-negative numbers and
    so never cancels. The angle that remains is at most pi/8.
    """
    hypotenuse = x + np.sqrt(x * x + y * y)
    half_tangent = np.divide(y, hypotenuse, out=np.zeros_like(hypotenuse), where=hypotenuse > 0)
    tangent = half_tangent / (1.0 + np.sqrt(1.0 + half_tangent * half_tangent))
    square = tangent * tangent
    # With t = tan(angle / 4): sin(angle / 2) = 2t / (1 + t**2) and sin(angle / 4)**2 = t**2 / (1 + t**2).
    return 4.0 * tangent / (1.0 + square) * _over_sine(square / (1.0 + square))


def power(base: Array, exponent: float) -> Array:
    """
    Return `base ** exponent` for `base > 0`, to about 1e-14 relative for exponents around 1.

    Goes through the binary digits of the exponent: repeated squares for the whole part, repeated square roots for the
    fraction.
    """
    whole = int(abs(exponent))
    fraction = abs(exponent) - whole
    result = np.ones_like(base)
    square = base
    while whole:
        if whole % 2:
            result = result * square
        square, whole = square * square, whole // 2
    root = base
    while fraction:
        root, fraction = np.sqrt(root), 2.0 * fraction
        if fraction >= 1.0:
            result, fraction = result * root, fraction - 1.0
    return 1.0 / result if exponent < 0 else result


def _sinc(x: Array) -> Array:
    """Return `sin(x) / x` for `x` in `[0, pi/2]`."""
    square = x * x
    return 1.0 + square * _polynomial(_SINC, square)


def _over_sine(half_sine_square: Array) -> Array:
    """Return `x / sin(x)` from `sin(x/2)**2`, for `x` in `[0, pi/4]`."""
    return 1.0 + half_sine_square * _polynomial(_OVER_SINE, half_sine_square)


def _polynomial(coefficients: tuple[float, ...], x: Array) -> Array:
    value = np.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        value *= x
        value += coefficient
    return value
