"""Averages by Fisher information, against the formula and its limits."""

from __future__ import annotations

import pytest
import torch

from hf_frmerge.fisher.average import fisher_average

SHARES = [0.5, 0.2, 0.3]


@pytest.fixture
def values() -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(4, 5) for _ in SHARES]


def test_it_is_the_mean_of_normal_distributions_multiplied(values: list[torch.Tensor]) -> None:
    """Precisions add up, and the mean is the one weighted by precision."""
    information = [torch.rand(4, 5) + 0.1 for _ in SHARES]
    terms = [(share, x.double(), f.double()) for share, x, f in zip(SHARES, values, information)]
    expected = sum(share * f * x for share, x, f in terms) / sum(share * f for share, _, f in terms)
    merged, at_floor = fisher_average(values, information, SHARES)
    torch.testing.assert_close(merged, expected.float())
    assert at_floor == 0
    scaled, _ = fisher_average(values, [1e-20 * each for each in information], SHARES)
    torch.testing.assert_close(scaled, merged)  # whatever the unit, also that of language models


def test_its_limits(values: list[torch.Tensor]) -> None:
    average = sum(share * x for share, x in zip(SHARES, values))
    equal, _ = fisher_average(values, [torch.full((4, 5), 1e-12)] * 3, SHARES)
    torch.testing.assert_close(equal, average)
    nothing, at_floor = fisher_average(values, [torch.zeros(4, 5)] * 3, SHARES)
    assert torch.equal(nothing, torch.stack([s * x for s, x in zip(SHARES, values)]).sum(0)) and at_floor == 1
    one, _ = fisher_average(values, [torch.zeros(4, 5), torch.ones(4, 5), torch.zeros(4, 5)], SHARES)
    assert float((one - values[1]).abs().max()) < 0.01  # the others have the floor
    hull = torch.stack(values)
    merged, _ = fisher_average(values, [torch.rand(4, 5) for _ in SHARES], SHARES)
    assert bool(((merged >= hull.amin(0) - 1e-6) & (merged <= hull.amax(0) + 1e-6)).all())


def test_where_no_expert_has_information_they_count_alike(values: list[torch.Tensor]) -> None:
    information = [torch.ones(4, 5), 5 * torch.ones(4, 5), torch.ones(4, 5)]
    for each in information:
        each[0] = 0.0
    merged, at_floor = fisher_average(values, information, SHARES)
    torch.testing.assert_close(merged[0], sum(share * x[0] for share, x in zip(SHARES, values)))
    assert at_floor == pytest.approx(1 / 4)
