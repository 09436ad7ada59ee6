"""Fits against naive float64 solutions on all tokens at once."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from hf_frmerge.calibration.blocks.blockwise_model import Outputs
from hf_frmerge.calibration.blocks.outputs import squared_distance
from hf_frmerge.calibration.fits.least_squares import (
    FitOptions,
    Moments,
    System,
    UpdatePrior,
    WriterMoments,
    fit_linear,
    low_rank,
)
from hf_frmerge.calibration.held_out import choose_form
from hf_frmerge.errors import NonFiniteError

N_IN, N_OUT, TOKENS = 19, 5, (40, 25, 60)
SHARES = [0.5, 0.2, 0.3]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def layer(n_in: int = N_IN) -> tuple[list[Tensor], list[Tensor], Tensor, list[Tensor]]:
    """Inputs of the merge and of the experts, a start and the experts' weights."""
    merged = [torch.randn(n, n_in) for n in TOKENS]
    experts = [x + 0.3 * torch.randn_like(x) for x in merged]
    return merged, experts, torch.randn(N_OUT, n_in), [torch.randn(N_OUT, n_in) for _ in TOKENS]


PORTIONS = (slice(0, 11), slice(11, None))  # tokens may come in any


def moments_of(merged: list[Tensor], experts: list[Tensor]) -> list[Moments]:
    out = []
    for x, e in zip(merged, experts):
        out.append(Moments.zeros(x.shape[1], torch.device("cpu")))
        for part in PORTIONS:
            out[-1].add(x[part], e[part])
    return out


def system_of(
    moments: Sequence[Moments | WriterMoments],
    weights: list[Tensor],
    options: FitOptions | None = None,
    shares: list[float] = SHARES,
) -> System:
    system = System.zeros(weights[0].shape[1], N_OUT, torch.device("cpu"))
    for moment, share, weight in zip(moments, shares, weights):
        system.add(moment, share, weight, options or FitOptions())
    return system


@pytest.mark.parametrize("writes", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("kappa", [0.0, 2.0])
def test_a_layer_is_the_ridge_solution_on_all_tokens(writes: bool, has_bias: bool, kappa: float) -> None:
    merged, experts, start, weights = layer(N_IN + has_bias)
    if has_bias:
        for x in (*merged, *experts):
            x[:, -1] = 1.0
    drifts = [torch.randn(n, N_OUT) * writes for n in TOKENS]
    token_weights = [torch.rand(n) + 0.1 if writes else torch.ones(n) for n in TOKENS]
    base = torch.randn(N_OUT, N_IN)
    deltas = [(w[:, :N_IN] - base).double() for w in weights]
    priors = [d.T @ d / torch.trace(d.T @ d) * N_IN for d in deltas]
    options = FitOptions(ridge=0.05, expert_inputs=0.7, residual=0.4)

    moments: Sequence[Moments | WriterMoments] = moments_of(merged, experts)
    if writes:
        moments = [WriterMoments.zeros(N_IN + has_bias, N_OUT, torch.device("cpu")) for _ in TOKENS]
        for found, *tokens, weight in zip(moments, merged, experts, token_weights, drifts, weights):
            for part in PORTIONS:
                found.add(*(values[part] for values in tokens), weight, options)

    prior = UpdatePrior.zeros(base)
    for w in weights:
        prior.add(w[:, :N_IN] - base, kappa / 3)
    fit = fit_linear(system_of(moments, weights, options), start, options, has_bias=has_bias, prior=prior)

    # One row per token, scaled by the square root of its weight; the priors are rows of their own.
    rows, targets = [], []
    gram = torch.zeros(N_IN + has_bias, N_IN + has_bias, dtype=torch.float64)
    expected_start = start.double()
    columns = ([x.double() for x in part] for part in (merged, experts, weights, drifts, token_weights))
    for x, e, w, d, t, share in zip(*columns, SHARES):
        scale = (share / len(x) * t).sqrt()[:, None]
        target = 0.7 * e @ w.T + 0.3 * x @ w.T + 0.4 * d
        rows.append(scale * x)
        targets.append(scale * (target - x @ expected_start.T))
        gram += (scale * x).T @ (scale * x)
    mean = float(gram.diagonal()[:N_IN].mean())
    ridge = torch.full((N_IN + has_bias,), 0.05 * mean, dtype=torch.float64)
    if has_bias:
        ridge[-1] = 0.05 * float(gram[-1, -1])
    rows.append(torch.diag(ridge.sqrt()))
    targets.append(torch.zeros(N_IN + has_bias, N_OUT, dtype=torch.float64))
    for own, w in zip(priors, weights):
        root = torch.linalg.cholesky(kappa * mean / 3 * own.double() + 1e-7 * torch.eye(N_IN).double()).T
        padded = torch.cat([root, torch.zeros(N_IN, int(has_bias))], dim=1).double()
        rows.append(padded)
        targets.append(padded @ (w.double() - expected_start).T)
    expected = expected_start + torch.linalg.lstsq(torch.cat(rows), torch.cat(targets)).solution.T
    torch.testing.assert_close(fit.weight_OI, expected, rtol=2e-5, atol=2e-5)


def test_an_expert_without_prompts_counts_by_its_prior_alone() -> None:
    merged, experts, start, weights = layer()
    moments = moments_of(merged, experts)
    moments[2] = Moments.zeros(N_IN, torch.device("cpu"))
    without = fit_linear(system_of(moments[:2], weights[:2]), start, FitOptions(), has_bias=False)
    same = fit_linear(system_of(moments, weights), start, FitOptions(), has_bias=False)
    assert torch.equal(same.weight_OI, without.weight_OI)
    # An orthogonal update says as much about every input, so a strong prior alone gives the mean of the experts.
    base = torch.zeros(N_IN, N_IN)
    rotations = [torch.linalg.qr(torch.randn(N_IN, N_IN))[0] for _ in range(3)]
    prior = UpdatePrior.zeros(base)
    for rotation in rotations:
        prior.add(rotation, 1e6)
    pulled = fit_linear(System.zeros(N_IN, N_IN, base.device), base, FitOptions(), has_bias=False, prior=prior)
    torch.testing.assert_close(pulled.weight_OI, torch.stack(rotations).mean(0).double(), rtol=1e-3, atol=1e-3)


def test_the_update_of_an_adapter_says_what_its_product_does() -> None:
    up, down, base = torch.randn(N_OUT, 2), torch.randn(2, N_IN), torch.randn(N_OUT, N_IN)
    base *= 20 * torch.linalg.norm(up @ down) / torch.linalg.norm(base)
    of_factors, of_product = UpdatePrior.zeros(base), UpdatePrior.zeros(base)
    of_factors.add_factors(up, down, 0.7)
    of_factors.add_factors(torch.zeros(N_OUT, 0), torch.zeros(0, N_IN), 0.7)  # an adapter that leaves the layer alone
    of_product.add(up @ down, 0.7 / 1.25)  # 1 + (|update| / 0.1 |weight|)^2
    torch.testing.assert_close(of_factors.gram_II, of_product.gram_II)
    torch.testing.assert_close(of_factors.pull_IO, of_product.pull_IO)
    # Along what the adapter reads the pull gives its weight, and across it the start.
    start = torch.randn(N_OUT, N_IN)
    system = System.zeros(N_IN, N_OUT, start.device)
    fitted = fit_linear(system, start, FitOptions(), has_bias=False, prior=of_factors).weight_OI
    delta = (up @ down).double()
    gram = delta.T @ delta
    pull = 0.7 / 1.25 * N_IN * gram / gram.trace()
    share = pull @ torch.linalg.inv(pull + 0.03 * torch.eye(N_IN))
    expected = start + (of_factors.base_OI + delta - start) @ share
    torch.testing.assert_close(fitted, expected, rtol=1e-3, atol=1e-3)
    across = torch.linalg.qr(down.T.double(), mode="complete")[0][:, 2:]
    torch.testing.assert_close(fitted @ across, start.double() @ across, rtol=1e-3, atol=1e-3)


def test_inputs_that_are_all_zero_keep_the_start() -> None:
    _, _, start, weights = layer()
    zeros = [torch.zeros(n, N_IN) for n in TOKENS]
    system = system_of(moments_of(zeros, zeros), weights)
    fit = fit_linear(system, start, FitOptions(), has_bias=False)
    assert torch.equal(fit.weight_OI, start.double())


def test_activations_that_are_not_finite_are_refused() -> None:
    merged, experts, start, weights = layer()
    merged[1][3, 2] = math.inf
    with pytest.raises(NonFiniteError, match="not finite"):
        fit_linear(system_of(moments_of(merged, experts), weights), start, FitOptions(), has_bias=False)


@pytest.mark.parametrize("shape", [(5, 9), (9, 5)])
def test_low_rank_is_the_best_in_the_metric_of_the_inputs(shape: tuple[int, int]) -> None:
    correction = torch.randn(shape).double()
    inputs = torch.randn(50, shape[1]).double() * torch.linspace(0.1, 3, shape[1])
    metric = torch.linalg.cholesky(inputs.T @ inputs)
    up, down = low_rank(correction, metric, 2)
    assert up.shape == (shape[0], 2) and down.shape == (2, shape[1])
    # The best rank-2 outputs for these inputs: the truncated SVD of X M^T (Eckart-Young).
    left, values, right = torch.linalg.svd(inputs @ correction.T, full_matrices=False)
    best = (left[:, :2] * values[:2]) @ right[:2]
    torch.testing.assert_close(inputs @ (up @ down).double().T, best, rtol=1e-4, atol=1e-4)


def test_the_start_of_full_fine_tunes_is_the_ridge_formula() -> None:
    base, deltas = torch.randn(N_OUT, N_IN).double(), [torch.randn(N_OUT, N_IN).double() for _ in range(3)]
    grams = [d.T @ d / torch.trace(d.T @ d) * N_IN for d in deltas]
    expected = base + sum(d @ c for d, c in zip(deltas, grams)) @ torch.linalg.inv(sum(grams) + 0.3 * torch.eye(N_IN))
    prior, nothing = UpdatePrior.zeros(base), UpdatePrior.zeros(base)
    for delta in deltas:
        prior.add(delta, 2.0)
        nothing.add(torch.zeros_like(delta), 2.0)
    torch.testing.assert_close(prior.merge(2.0 * 0.3), expected)
    assert torch.equal(nothing.merge(0.6), base)


def test_the_distance_is_that_of_fisher_and_rao() -> None:
    p, q = torch.randn(6, 11), torch.randn(6, 11)
    roots = (p.double().softmax(-1).sqrt(), q.double().softmax(-1).sqrt())
    expected = (2 * torch.arccos((roots[0] * roots[1]).sum(-1))) ** 2
    logits = {name: Outputs(values, is_logits=True) for name, values in (("p", p), ("q", q))}
    torch.testing.assert_close(squared_distance(logits["p"], logits["q"]), expected)
    assert float(squared_distance(logits["p"], logits["p"]).max()) == 0.0
    beside = Outputs(p + 1e-7 * torch.randn(6, 11, dtype=torch.float64), is_logits=True)
    assert float(squared_distance(logits["p"], beside).min()) > 0  # arccos of a number this near 1 would be 0

    hidden = [Outputs(values, is_logits=False) for values in (p, 3 * q)]
    angle = torch.arccos(torch.cosine_similarity(p.double(), q.double(), dim=-1))
    torch.testing.assert_close(squared_distance(*hidden), angle.square())


@pytest.mark.parametrize(
    ("means", "wanted", "form"),
    [
        ((1.0, 0.2, 0.195), "auto", "low_rank"),  # 99 % of the gain
        ((1.0, 0.3, 0.2), "auto", "dense"),
        ((1.0, 1.0, 1.1), "auto", "start"),
        ((1.0, 1.2, 0.5), "low_rank", "start"),
        ((1.0, 0.3, 0.2), "low_rank", "low_rank"),
        ((1.0, 0.2, 0.2), "dense", "dense"),
    ],
)
def test_the_smallest_form_that_has_nearly_all_of_the_gain(means: tuple[float, ...], wanted: str, form: str) -> None:
    distances = {name: (mean, None, mean) for name, mean in zip(("start", "low_rank", "dense"), means)}
    assert choose_form(distances, wanted) == form


@pytest.mark.parametrize(
    ("means", "wanted", "form"),
    [
        ((1.0, 0.205, 0.2, 0.2), "auto", "table"),
        ((1.0, 0.3, 0.2, 0.2), "auto", "low_rank"),
        ((1.0, 0.9, 0.2, 0.2), "table", "table"),
        ((1.0, 1.1, 0.2, 0.2), "table", "start"),
    ],
)
def test_a_table_comes_first_where_it_is_offered(means: tuple[float, ...], wanted: str, form: str) -> None:
    distances = {name: (mean, None, mean) for name, mean in zip(("start", "table", "low_rank", "dense"), means)}
    assert choose_form(distances, wanted) == form
