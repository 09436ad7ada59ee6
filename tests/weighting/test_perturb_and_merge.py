"""P&M's coefficient against explicit sums over the tasks in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_frmerge.weighting.perturb_and_merge import TaskLosses

Arrays = dict[str, np.ndarray]


def tensors(arrays: Arrays) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(value) for name, value in arrays.items()}


def random_arrays(seed: int, positive: bool = False) -> Arrays:
    generator = np.random.default_rng(seed)
    arrays = {"a": generator.normal(size=(3, 4)), "b": generator.normal(size=5)}
    return {name: np.abs(value) if positive else value for name, value in arrays.items()}


def loss(theta: Arrays, ends: list[Arrays], fishers: list[Arrays]) -> float:
    return sum(
        float((fisher[name] * (theta[name] - end[name]) ** 2).sum())
        for end, fisher in zip(ends, fishers)
        for name in theta
    )


@pytest.mark.parametrize("n_tasks", [1, 2, 5])
def test_the_coefficient_minimises_the_sum_of_all_losses(n_tasks: int) -> None:
    ends = [random_arrays(i) for i in range(n_tasks)]
    fishers = [random_arrays(100 + i, positive=True) for i in range(n_tasks)]
    losses = TaskLosses()
    for end, fisher in zip(ends, fishers):
        losses.add(tensors(end), tensors(fisher))
    start, trained = random_arrays(50), ends[-1]
    alpha = losses.coefficient(tensors(start), tensors(trained))

    def at(share: float) -> float:
        return loss({name: start[name] + share * (trained[name] - start[name]) for name in start}, ends, fishers)

    grid = np.linspace(0, 1, 2001)
    assert abs(alpha - grid[np.argmin([at(share) for share in grid])]) <= 1 / 2000
    if 0 < alpha < 1:
        assert at(alpha) <= min(at(alpha - 1e-4), at(alpha + 1e-4))


def test_equal_curvatures_give_the_running_mean() -> None:
    ends, losses = [random_arrays(i) for i in range(5)], TaskLosses()
    mean = random_arrays(9)
    for t, end in enumerate(ends, start=1):
        losses.add(tensors(end), {name: torch.ones(value.shape) for name, value in end.items()})
        alpha = losses.coefficient(tensors(mean), tensors(end))
        assert alpha == pytest.approx(1 / t, abs=1e-5)
        mean = {name: mean[name] + alpha * (end[name] - mean[name]) for name in mean}
    assert losses.n_tasks == 5
    assert {name: value.shape for name, value in losses.curvature.items()} == {"a": (3, 4), "b": (5,)}


def test_edges() -> None:
    start, first, second = (random_arrays(i) for i in (1, 2, 3))
    zeros, ones = ({n: fill(v.shape) for n, v in start.items()} for fill in (torch.zeros, torch.ones))
    losses = TaskLosses()
    losses.add(tensors(first), zeros)
    losses.add(tensors(second), ones)
    assert losses.coefficient(tensors(start), tensors(second)) == pytest.approx(1.0)  # nothing of the past to keep
    losses = TaskLosses()
    losses.add(tensors(start), ones)
    losses.add(tensors(second), zeros)
    assert losses.coefficient(tensors(start), tensors(second)) == pytest.approx(0.0)  # nothing to gain
    losses = TaskLosses()
    losses.add(tensors(first), zeros)
    losses.add(tensors(second), zeros)
    assert losses.coefficient(tensors(start), tensors(second)) == 0.5  # nothing is known
    assert losses.coefficient(tensors(start), tensors(start)) == 0.5  # no step: whatever it is, nothing changes
