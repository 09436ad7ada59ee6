"""Methods that take the rows of a delta as samples of an expert's inputs: SWUDI and ACE-Merging."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hf_frmerge.methods.spectral.algebra import svd
from hf_frmerge.methods.spectral.inputs import Experts, Matrix, SpectralOptions

_HETEROGENEITY = 0.3  # ACE-Merging, tau: above, experts have such different norms that these must be evened out
_RIDGE = 1e-5  # ACE-Merging, epsilon; the paper has 4e-2 for GPT-2 and 2e-4 for RoBERTa-base


def swudi(experts: Experts, weights_N: NDArray[np.float64], options: SpectralOptions) -> Matrix:
    r"""
    SWUDI (arXiv 2606.07289): gradient descent on WUDI's objective, stopped early, in closed form.

    WUDI (arXiv 2503.08099) minimises \(\sum_i |(\tau - \tau_i)\tau_i^T|^2 / |\tau_i|^2\) from
    \(\tau = \sum_i \tau_i\). With \(C = \sum_i \tau_i^T\tau_i/|\tau_i|^2 = V \Lambda V^T\) and
    \(D = \sum_i \tau_i\tau_i^T\tau_i/|\tau_i|^2\), t small steps lead to
    \(\tau - \tau V f V^T + D V (f/\Lambda) V^T\), \(f = 1 - e^{-t\Lambda}\), where only the `density` share of
    directions with the largest \(\Lambda\) is moved. An expert of zero norm is left out.
    """
    n_experts, _, cols = experts.deltas.shape
    norms_N = np.array([np.linalg.norm(delta) for delta in experts.deltas])
    factors_N = np.divide(n_experts * weights_N, norms_N**2, out=np.zeros(n_experts), where=norms_N > 0)
    gram_nn = np.zeros((cols, cols), np.float32)
    pull_mn = experts.zero()
    for delta_mn, factor in zip(experts.deltas, factors_N.astype(np.float32)):
        own_nn = factor * (delta_mn.T @ delta_mn)
        gram_nn += own_nn
        pull_mn += delta_mn @ own_nn
    values_n, vectors_nn = np.linalg.eigh(gram_nn)  # ascending
    moved = min(cols, max(1, int(options.density * experts.full_shape[1])))
    vectors_nr, values_r = vectors_nn[:, -moved:], np.maximum(values_n[-moved:].astype(np.float64), 0.0)
    shares_r = -np.expm1(-options.descent_steps * values_r)
    inverse_r = np.divide(shares_r, values_r, out=np.full(moved, options.descent_steps), where=values_r > 0)
    start_mn = experts.sum(weights_N)
    change_mr = (pull_mn @ vectors_nr) * inverse_r.astype(np.float32)
    change_mr -= (start_mn @ vectors_nr) * shares_r.astype(np.float32)
    return start_mn + change_mr @ vectors_nr.T


def ace(experts: Experts, weights_N: NDArray[np.float64], options: SpectralOptions) -> Matrix:
    r"""
    ACE-Merging (arXiv 2603.02945, eq. 5 to 19): every output as the experts have it on their own inputs, whose second
    moments are guessed from the deltas.

    With \(\tilde\tau_i\) a delta less the mean of its rows, \(\Sigma_i = \tilde\tau_i^T\tilde\tau_i\) stands for the
    second moments of expert i's inputs, and

    \[ \Delta = \Big(\sum_i \tilde\tau_i(\Sigma_i + \epsilon I)\Big)
       \Big(\sum_i (\Sigma_i + \epsilon I) + 1 c^T\Big)^{-1}, \]

    c the column means of \(\sum_i \Sigma_i\). If the variance of \(\log|\tau_i|^2\) over the experts exceeds 0.3 times
    its squared mean, \(\Sigma_i\) and \(\epsilon\) are divided by the trace of \(\Sigma_i\), c by the mean of
    \(|\tau_i|^2\), and the `density` share of leading directions of
    \(\Delta + \sum_i \tau_i(\Sigma_i - \bar\Sigma)\), \(\bar\Sigma\) the mean of the first sum, is added, each with
    the mean of their singular values. An expert whose rows are all alike, or zero, is left out.

    Computed in float64, as the inverse has entries up to 1/epsilon. A sum over the experts weighs each with `N w_i`, a
    mean or a variance with `w_i`.
    """
    factors_N = len(weights_N) * weights_N
    energies_N = np.array([float(np.sum(np.square(delta, dtype=np.float64))) for delta in experts.deltas])
    traces_N = energies_N - [experts.deltas.shape[1] * float(np.sum(_mean_row(d) ** 2)) for d in experts.deltas]
    used = [i for i in range(len(factors_N)) if factors_N[i] > 0 and traces_N[i] > 1e-10 * energies_N[i]]
    if not used:
        return experts.zero()
    total_weight = float(factors_N[used].sum())
    is_uneven = _differ_in_size(energies_N[used], factors_N[used] / total_weight)
    rows, cols = experts.deltas.shape[1:]
    moments_nn, ridge = np.zeros((cols, cols)), 0.0
    pull_mn, own_mn, sum_mn = np.zeros((rows, cols)), np.zeros((rows, cols)), experts.zero()
    for i in used:
        divisor = traces_N[i] if is_uneven else 1.0
        centred_mn = experts.deltas[i] - _mean_row(experts.deltas[i])
        moment_nn = centred_mn.T @ centred_mn
        moment_nn *= factors_N[i] / divisor
        moments_nn += moment_nn
        ridge += factors_N[i] * _RIDGE / divisor
        pull_mn += centred_mn @ moment_nn + (factors_N[i] * _RIDGE / divisor) * centred_mn
        if is_uneven:
            own_mn += experts.deltas[i] @ moment_nn
            sum_mn += np.float32(factors_N[i]) * experts.deltas[i]
    prior_n = moments_nn.mean(axis=0)
    if is_uneven:
        prior_n /= float(factors_N[used] @ energies_N[used]) / total_weight
    moments_nn[np.diag_indices(cols)] += ridge
    merged_mn = np.linalg.solve((moments_nn + prior_n).T, pull_mn.T).T
    if is_uneven:
        own_mn -= sum_mn @ (moments_nn / total_weight)
        merged_mn = merged_mn + _evened_out((merged_mn + own_mn).astype(np.float32), options.density)
    return merged_mn.astype(np.float32)


def _differ_in_size(energies_N: NDArray[np.float64], weights_N: NDArray[np.float64]) -> bool:
    """Whether experts have such different squared norms that these must be evened out (eq. 7)."""
    logs = np.log(energies_N)
    mean = float(weights_N @ logs)
    return float(weights_N @ (logs - mean) ** 2) > _HETEROGENEITY * mean**2


def _mean_row(delta_mn: Matrix) -> NDArray[np.float64]:
    mean: NDArray[np.float64] = delta_mn.mean(axis=0, dtype=np.float64)
    return mean


def _evened_out(matrix_mn: Matrix, share: float) -> Matrix:
    """Return the leading directions of a matrix, this share of all it could have, with the mean of their values."""
    left_mr, values_r, right_rn = svd(matrix_mn, max(1, int(share * min(matrix_mn.shape))))
    return np.float32(values_r.sum() / max(1, len(values_r))) * (left_mr @ right_rn)
