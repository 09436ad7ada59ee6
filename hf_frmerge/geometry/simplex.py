r"""
Fisher-Rao geometry of categorical distributions.

\(p \mapsto \sqrt p\) maps the simplex onto the positive orthant of the unit sphere. There the Fisher-Rao metric is
four times the metric of the sphere, so that distances are twice the angles. All distances are computed from the
squared chord \(h = \sum_v (\sqrt{p_v} - \sqrt{q_v})^2 = 2 - 2 \sum_v \sqrt{p_v q_v}\): it has full relative accuracy
for small distances, where the sum of products rounds to 1.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from hf_frmerge.geometry import sphere
from hf_frmerge.geometry.gram import embed_differences
from hf_frmerge.geometry.karcher import karcher_mean
from hf_frmerge.geometry.sphere import Array

# Shape suffixes: N = number of distributions, V = number of outcomes; `...` = tokens.

# Squared chords below this (2e-8 rad) are treated as zero. Inner products are differences of chords; for so short a
# vector they are rounding error, and its direction would be random.
_SAME_CHORD = 1e-16


class Divergences(NamedTuple):
    """
    Terms of four divergences of `p` and `q`, one per outcome, all non-negative; their sum is the divergence.

    Attributes:
        chord: terms of the squared chord, `sum (sqrt(p) - sqrt(q))**2`, in `[0, 2]`.
        kl_pq: terms of `KL(p || q)`, in nats.
        kl_qp: terms of `KL(q || p)`, in nats.
        jensen_shannon: terms of `(KL(p || m) + KL(q || m)) / 2`, `m` the mean of both, in `[0, ln 2]` nats.
    """

    chord: Array
    kl_pq: Array
    kl_qp: Array
    jensen_shannon: Array


def divergence_terms(log_p: Array, log_q: Array) -> Divergences:
    r"""
    Compute the terms of the divergences between two distributions, one per outcome.

    Each term of the usual sum gets \(\pm(q_v - p_v)\) added. Over all outcomes that sums to zero, and it makes every
    term non-negative. The sum over some of the outcomes is then a lower bound, and a sample of outcomes has little
    noise.

    Args:
        log_p (`np.ndarray`): Log-probabilities, `(...)`, float64; `-inf` for outcomes that cannot happen.
        log_q (`np.ndarray`): The same of the other distribution.

    Returns:
        `Divergences`: Arrays of the shape of `log_p`, float64.
    """
    p, q = np.exp(log_p), np.exp(log_q)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio, log_m = log_p - log_q, np.log(0.5 * (p + q))
        kl_pq = np.where(p > 0, p * ratio, 0.0) + (q - p)
        kl_qp = np.where(q > 0, -q * ratio, 0.0) + (p - q)
        middle = 0.5 * (np.where(p > 0, p * (log_p - log_m), 0.0) + np.where(q > 0, q * (log_q - log_m), 0.0))
    chord = (np.exp(0.5 * log_p) - np.exp(0.5 * log_q)) ** 2
    # Where p and q agree the parts of a term cancel, and rounding can leave about -1e-16 of the probability.
    return Divergences(chord, np.maximum(kl_pq, 0.0), np.maximum(kl_qp, 0.0), np.maximum(middle, 0.0))


def lumped_divergences(p: Array, q: Array) -> Divergences:
    r"""
    Lower bound on the divergence from outcomes that are only known as a sum.

    Lumping outcomes into one never raises a divergence (data processing inequality; Chentsov 1972 for Fisher-Rao).

    Args:
        p (`np.ndarray`): Probability of the outcomes under one distribution, `(...)`, float64.
        q (`np.ndarray`): The same under the other.
    """
    with np.errstate(divide="ignore"):
        return divergence_terms(np.log(p), np.log(q))


def chord_to_distance(chord: ArrayLike) -> Array:
    r"""
    Compute the Fisher-Rao distance \(2\arccos\sum_v\sqrt{p_v q_v}\) from the squared chord, accurately also near 0.

    Args:
        chord (`ArrayLike`): Squared chord, `(...)`, in `[0, 2]`.

    Returns:
        `np.ndarray`: Radians, `(...)`, in `[0, pi]`.

    Example:
    ```python
    >>> chord_to_distance([0.0, 2.0]).round(6).tolist()  # equal distributions; distributions with no common outcome
    [0.0, 3.141593]

    ```
    """
    return 4.0 * np.arcsin(np.minimum(0.5 * np.sqrt(chord), np.sqrt(0.5)))


def fisher_rao_distance(p: Array, q: Array) -> Array:
    r"""
    Fisher-Rao distance of distributions, \(2\arccos\sum_v\sqrt{p_v q_v}\).

    Args:
        p (`np.ndarray`): Probabilities, `(..., V)`, float64, summing to 1.
        q (`np.ndarray`): The same, broadcast against `p`.

    Returns:
        `np.ndarray`: Radians, `(...)`, in `[0, pi]`.

    Example:
    ```python
    >>> import numpy as np
    >>> float(fisher_rao_distance(np.array([1.0, 0.0]), np.array([0.5, 0.5])).round(6))  # 2 arccos(1 / sqrt 2)
    1.570796

    ```
    """
    return chord_to_distance(np.sum((np.sqrt(p) - np.sqrt(q)) ** 2, axis=-1))


def barycentre(p: Array, weights: ArrayLike) -> Array:
    r"""
    Compute the Fisher-Rao barycentre: the distribution \(q\) that minimises \(\sum_i w_i d(q, p_i)^2\).

    It is the square of the Karcher mean of the square roots. The square roots are at most 90 degrees apart, so the
    mean is unique. The mean is a combination of them with non-negative coefficients, so its square is a distribution.

    Args:
        p (`np.ndarray`): Probabilities, `(..., N, V)`, float64.
        weights (`ArrayLike`): Non-negative, `(N,)`, summing to 1.

    Returns:
        `np.ndarray`: `(..., V)`, float64.

    Example:
    ```python
    >>> import numpy as np
    >>> barycentre(np.array([[1.0, 0.0], [0.0, 1.0]]), [0.5, 0.5]).round(6).tolist()
    [0.5, 0.5]

    ```
    """
    roots = sphere.normalise(np.sqrt(p))
    coeffs = karcher_mean(roots, weights).coeffs
    return sphere.combine(coeffs, roots) ** 2


def barycentre_coefficients(chords: Array, weights: ArrayLike) -> Array:
    r"""
    Compute the Fisher-Rao barycentre, as coefficients on square roots, from the mutual chords of the distributions.

    The distributions themselves, of which there may be very many outcomes, are not needed.

    Args:
        chords (`np.ndarray`): Squared chords between N distributions, `(..., N, N)`, float64, symmetric.
        weights (`ArrayLike`): Non-negative, `(N,)`, summing to 1.

    Returns:
        `np.ndarray`: `(..., N)`, non-negative: the barycentre is \((\sum_i c_i \sqrt{p_i})^2\).

    Example:
    ```python
    >>> import numpy as np
    >>> barycentre_coefficients(np.array([[0.0, 2.0], [2.0, 0.0]]), [0.75, 0.25]).round(6).tolist()
    [0.92388, 0.382683]

    ```
    """
    return karcher_mean(_points_from_chords(chords), weights).coeffs


def barycentre_from_chords(chords: Array, weights: ArrayLike) -> tuple[Array, Array]:
    r"""
    Compute distances to the Fisher-Rao barycentre when only the mutual chords of the distributions are known.

    The barycentre lies in the span of the square roots, so the chords determine it: the distributions themselves are
    not needed, only N + 1 choose 2 numbers per token.

    Args:
        chords (`np.ndarray`):
            Squared chords between a point of interest (index 0) and N distributions, `(..., 1 + N, 1 + N)`, float64,
            symmetric with a zero diagonal. Chords that are estimates need not fit together exactly.
        weights (`ArrayLike`): Non-negative, `(N,)`, summing to 1.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: Fisher-Rao distance of the point from the barycentre, `(...)`, and of each of
        the distributions from it, `(..., N)`; radians.
    """
    points = _points_from_chords(chords)
    roots = points[..., 1:, :]
    mean = sphere.combine(karcher_mean(roots, weights).coeffs, roots)
    return 2.0 * sphere.distance(points[..., 0, :], mean), 2.0 * sphere.distance(mean[..., None, :], roots)


def _points_from_chords(chords: Array) -> Array:
    """Return coordinates of points on a sphere with these mutual squared chords, `(..., N, N)`, one point per row."""
    # Inner products of the differences to point 0, by the law of cosines; row and column 0 then become those with the
    # point itself, a unit vector, which makes this the difference Gram that `embed_differences` takes.
    gram = 0.5 * (chords[..., :1, :] + chords[..., :, :1] - chords)
    same = chords[..., 0, :] < _SAME_CHORD
    gram[same[..., None, :] | same[..., :, None]] = 0.0
    gram[..., 0, :] = gram[..., :, 0] = -0.5 * chords[..., 0, :]
    gram[..., 0, 0] = 1.0
    return sphere.normalise(embed_differences(gram))
