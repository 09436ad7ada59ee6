"""Coefficients of the experts against naive float64 solutions, row by row."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from hf_frmerge.calibration.fits.coefficient_rows import TableEquations, combined
from hf_frmerge.calibration.fits.least_squares import FitOptions, Moments, System, fit_linear

N_EXPERTS, N_OUT, N_IN = 3, 5, 7


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def spread(n: int) -> Tensor:
    """A positive definite system whose directions count very differently."""
    root = torch.randn(n, n).double() * torch.logspace(-1, 1, n).double()
    return root.T @ root + 0.01 * torch.eye(n).double()


def least_squares(correction: Tensor, updates: list[Tensor], system: Tensor) -> np.ndarray:
    """Minimise |(M - sum_j c_j D_j) L|^2 over c for one row, by an SVD of the stacked regressors."""
    root = np.linalg.cholesky(system.numpy())
    regressors = np.stack([update.double().numpy() @ root for update in updates], axis=1)
    return np.linalg.lstsq(regressors, correction.double().numpy() @ root, rcond=None)[0]


def solved(correction: Tensor, updates: list[Tensor], system: Tensor, *, by_row: bool = True) -> Tensor:
    return TableEquations.of(correction, updates.__getitem__, len(updates), system).solve(by_row=by_row)


def test_every_row_is_the_least_squares_solution_in_the_metric_of_the_fit() -> None:
    correction, updates = torch.randn(N_OUT, N_IN).double(), [torch.randn(N_OUT, N_IN) for _ in range(N_EXPERTS)]
    system = spread(N_IN)
    found = solved(correction, updates, system)
    assert found.shape == (N_OUT, N_EXPERTS) and found.dtype == torch.float64
    for row in range(N_OUT):
        expected = least_squares(correction[row], [update[row] for update in updates], system)
        np.testing.assert_allclose(found[row].numpy(), expected, rtol=1e-4, atol=1e-5)


def test_equations_of_some_experts_add_up_to_those_of_all() -> None:
    correction, updates = torch.randn(N_OUT, N_IN).double(), [torch.randn(N_OUT, N_IN) for _ in range(N_EXPERTS)]
    system = spread(N_IN)
    parts = [TableEquations.of(correction, updates.__getitem__, N_EXPERTS, system, own) for own in ([1], [0, 2], [])]
    whole = TableEquations(sum(part.gram_ONN for part in parts), sum(part.pull_ON for part in parts))
    for row, found in enumerate(whole.solve(by_row=True)):
        expected = least_squares(correction[row], [update[row] for update in updates], system)
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-5)


def test_one_row_for_a_tensor_sums_the_equations_of_all_rows() -> None:
    correction, updates = torch.randn(N_OUT, N_IN).double(), [torch.randn(N_OUT, N_IN) for _ in range(N_EXPERTS)]
    system = spread(N_IN)
    found = solved(correction, updates, system, by_row=False)
    whole = torch.block_diag(*[system] * N_OUT)
    expected = least_squares(correction.reshape(-1), [update.reshape(-1) for update in updates], whole)
    np.testing.assert_allclose(found.numpy(), expected[None], rtol=1e-4, atol=1e-5)


def test_channels_of_a_norm_have_systems_of_their_own() -> None:
    correction, updates = torch.randn(N_OUT, 2).double(), [torch.randn(N_OUT, 2).double() for _ in range(N_EXPERTS)]
    systems = torch.stack([spread(2) for _ in range(N_OUT)])
    found = solved(correction, updates, systems, by_row=False)
    whole = torch.block_diag(*systems)
    expected = least_squares(correction.reshape(-1), [update.reshape(-1) for update in updates], whole)
    np.testing.assert_allclose(found.numpy(), expected[None], rtol=1e-5, atol=1e-5)


def test_a_fit_that_lies_in_the_span_is_found() -> None:
    truth, updates = torch.randn(N_OUT, N_EXPERTS).double(), [torch.randn(N_OUT, N_IN) for _ in range(N_EXPERTS)]
    correction = sum(truth[:, j, None] * update for j, update in enumerate(updates))
    found = solved(correction, updates, spread(N_IN))
    torch.testing.assert_close(found, truth, rtol=1e-3, atol=1e-4)
    start = torch.randn(N_OUT, N_IN)
    torch.testing.assert_close(combined(start, updates, found), (start + correction).float(), rtol=1e-3, atol=1e-3)


def test_the_sum_of_updates_is_found_where_it_gives_what_every_expert_gives() -> None:
    """Experts whose updates act on inputs that the others' prompts do not have can all be kept: 1 + 1 + 1."""
    n_in, shares = 6, [0.5, 0.2, 0.3]
    base = torch.randn(N_OUT, n_in)
    updates, options = [torch.zeros(N_OUT, n_in) for _ in shares], FitOptions(ridge=1e-7)
    system = System.zeros(n_in, N_OUT, torch.device("cpu"))
    for number, (share, update) in enumerate(zip(shares, updates)):
        inputs = torch.zeros(40, n_in)
        own = slice(2 * number, 2 * number + 2)
        inputs[:, own], update[:, own] = torch.randn(40, 2), torch.randn(N_OUT, 2)
        moments = Moments.zeros(n_in, torch.device("cpu"))
        moments.add(inputs, inputs)
        system.add(moments, share, base + update, options)
    start = base + sum(updates) / 3
    fit = fit_linear(system, start, options, has_bias=False)
    found = solved(fit.weight_OI - start, updates, fit.system_II)
    torch.testing.assert_close(found + 1 / 3, torch.ones_like(found), rtol=1e-3, atol=1e-3)


def test_rows_that_no_expert_changed_have_no_coefficients_and_equal_experts_share_theirs() -> None:
    update = torch.randn(N_OUT, N_IN)
    update[2] = 0
    found = solved(2 * update.double(), [update, update.clone()], spread(N_IN))
    assert torch.equal(found[2], torch.zeros(2).double())
    torch.testing.assert_close(found[[0, 1, 3, 4]], torch.ones(4, 2).double(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("shape", [(4,), (4, 3)])
@pytest.mark.parametrize("n_rows", [1, 4])
def test_tensors_are_combined_row_by_row_or_whole(shape: tuple[int, ...], n_rows: int) -> None:
    start, updates = torch.randn(shape), [torch.randn(shape) for _ in range(2)]
    coefficients = torch.randn(n_rows, 2).double()
    result = combined(start, updates, coefficients)
    for row in range(4):
        own = coefficients[row if n_rows > 1 else 0].float()
        torch.testing.assert_close(result[row], start[row] + own[0] * updates[0][row] + own[1] * updates[1][row])
