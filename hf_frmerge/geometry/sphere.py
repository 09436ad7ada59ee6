"""
The unit sphere: distance, log, exp and slerp of coordinate vectors in the last axis.

Everything broadcasts over leading axes. No function branches on small angles: removable singularities are written with
`sinc`, and angles come from chords, because `arccos` of an inner product cannot resolve angles below 1.5e-8 rad.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from hf_frmerge.geometry.portable import Array, arctan2, cosine_and_sinc, fold, sinc

# Shape suffixes: N = number of points, K = number of coordinates; `...` = blocks.


def dot(a: Array, b: Array) -> Array:
    """
    Inner product over the last axis, added up in an order that depends only on K.

    Args:
        a (`np.ndarray`): `(..., K)`, float64.
        b (`np.ndarray`): `(..., K)`, float64, broadcast against `a`.

    Returns:
        `np.ndarray`: `(...)`, float64.
    """
    terms = a * b
    return fold(terms.transpose(terms.ndim - 1, *range(terms.ndim - 1)))


def combine(coefficients: Array, points: Array) -> Array:
    """
    Return `sum_i coefficients[..., i] * points[..., i, :]`.

    Args:
        coefficients (`np.ndarray`): `(..., N)`, float64.
        points (`np.ndarray`): `(..., N, K)`, float64.

    Returns:
        `np.ndarray`: `(..., K)`, float64.
    """
    terms = coefficients[..., None] * points
    return fold(terms.transpose(terms.ndim - 2, *range(terms.ndim - 2), terms.ndim - 1))


def norms(points: Array) -> Array:
    """
    Euclidean norms over the last axis.

    Args:
        points (`np.ndarray`): `(..., K)`, float64.

    Returns:
        `np.ndarray`: `(...)`, float64.
    """
    return np.sqrt(dot(points, points))


def normalise(points: Array) -> Array:
    """
    Divide vectors by their norms; a zero vector has no direction and stays zero.

    Args:
        points (`np.ndarray`): `(..., K)`, float64.

    Returns:
        `np.ndarray`: `(..., K)`, float64, of norm 1 or 0.
    """
    length = norms(points)[..., None]
    return points / np.where(length > 0, length, 1.0)


def distance(a: Array, b: Array) -> Array:
    """
    Angle between unit vectors, in radians, to full relative accuracy near 0 and near pi.

    `2 * atan2(|a - b|, |a + b|)`: the smaller of the two chords subtracts nearly equal numbers, which rounds nothing,
    and the other is well away from cancellation.

    Args:
        a (`np.ndarray`): Unit vectors, `(..., K)`, float64.
        b (`np.ndarray`): Unit vectors, `(..., K)`, float64, broadcast against `a`.

    Returns:
        `np.ndarray`: `(...)`, radians in `[0, pi]`.

    Example:
    ```python
    >>> import numpy as np
    >>> a, b = np.array([1.0, 0.0]), np.array([np.cos(1e-9), np.sin(1e-9)])
    >>> f"{distance(a, b):.9e}", f"{np.arccos(a @ b):.9e}"  # arccos cannot see so small an angle
    ('1.000000000e-09', '0.000000000e+00')

    ```
    """
    return 2.0 * arctan2(norms(a - b), norms(a + b))


def log(base: Array, point: Array) -> Array:
    r"""
    Log map: tangent vector at `base` that points to `point` and is as long as the arc between them.

    \(\mathrm{Log}_p(q) = \frac{\theta}{\sin\theta}(q - \cos\theta\, p)\). The difference \(q - \cos\theta\, p\) would
    cancel when `q` is close to `p`, so it is computed as \((q - p) + \tfrac12 |q - p|^2 p\).

    Args:
        base (`np.ndarray`): Unit vectors, `(..., K)`, float64.
        point (`np.ndarray`): Unit vectors, `(..., K)`, float64, not opposite to `base`.

    Returns:
        `np.ndarray`: Tangent vectors, `(..., K)`, of length the angle in radians.
    """
    chord = point - base
    sine_direction = chord + 0.5 * dot(chord, chord)[..., None] * base
    return sine_direction / sinc(distance(base, point))[..., None]


def exp(base: Array, tangent: Array) -> Array:
    r"""
    Exp map: point reached from `base` along the great circle in direction `tangent`.

    \(\mathrm{Exp}_p(v) = \cos|v|\, p + \frac{\sin|v|}{|v|} v\).

    Args:
        base (`np.ndarray`): Unit vectors, `(..., K)`, float64.
        tangent (`np.ndarray`): Vectors orthogonal to `base`, `(..., K)`, of length in radians, at most pi.

    Returns:
        `np.ndarray`: Unit vectors, `(..., K)`.

    Example:
    ```python
    >>> import numpy as np
    >>> p, q = np.array([1.0, 0.0, 0.0]), np.array([0.0, 0.6, 0.8])
    >>> bool(np.allclose(exp(p, log(p, q)), q, rtol=0, atol=1e-15))
    True

    ```
    """
    length = norms(tangent)[..., None]
    cosine, sinc_of_length = cosine_and_sinc(length)
    return cosine * base + sinc_of_length * tangent


def slerp_coefficients(angle: ArrayLike, t: ArrayLike) -> tuple[Array, Array]:
    r"""
    Coefficients of the point at a fraction `t` of the arc between two unit vectors.

    \(\sin((1-t)\theta)/\sin\theta\) and \(\sin(t\theta)/\sin\theta\) (Shoemake 1985), written with `sinc` so that
    angle 0 needs no branch. With `t` exactly 0 or 1 the coefficients are exactly 0 and 1.

    Args:
        angle (`ArrayLike`): Angle between the vectors, in radians, below pi.
        t (`ArrayLike`): Fraction of the way from the first to the second, in `[0, 1]`.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: Coefficient of the first and of the second vector.
    """
    angle, t = np.asarray(angle, dtype=np.float64), np.asarray(t, dtype=np.float64)
    whole = sinc(angle)
    return (1.0 - t) * sinc((1.0 - t) * angle) / whole, t * sinc(t * angle) / whole


def slerp(a: Array, b: Array, t: ArrayLike) -> Array:
    """
    Point at a fraction `t` of the arc from `a` to `b`.

    Args:
        a (`np.ndarray`): Unit vectors, `(..., K)`, float64.
        b (`np.ndarray`): Unit vectors, `(..., K)`, float64, not opposite to `a`.
        t (`ArrayLike`): Fraction, broadcast against `(...)`.

    Returns:
        `np.ndarray`: Unit vectors, `(..., K)`.

    Example:
    ```python
    >>> import numpy as np
    >>> slerp(np.array([1.0, 0.0]), np.array([0.0, 1.0]), 1 / 3).round(6).tolist()  # 30 of 90 degrees
    [0.866025, 0.5]

    ```
    """
    first, second = slerp_coefficients(distance(a, b), t)
    return first[..., None] * a + second[..., None] * b


def pairwise_angles(points: Array) -> Array:
    """
    Angles between all pairs of points of any norm.

    Args:
        points (`np.ndarray`): `(..., N, K)`, float64.

    Returns:
        `np.ndarray`: `(..., N, N)`, radians; NaN in the row and column of a zero vector, which has no direction.
    """
    units = normalise(points)
    angles = distance(units[..., :, None, :], units[..., None, :, :])
    no_direction = norms(points) == 0
    return np.where(no_direction[..., :, None] | no_direction[..., None, :], np.nan, angles)
