"""The greedy soup is that of the recipe, written out."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from hf_frmerge.weighting.greedy import greedy_soup


@pytest.mark.parametrize("seed", range(20))
def test_the_recipe_written_out(seed: int) -> None:
    """Models are points, and held-out accuracy is minus the distance from a target."""
    draw = np.random.default_rng(seed)
    models, target = draw.normal(size=(6, 3)), 0.3 * draw.normal(size=3)

    def accuracy(members: list[int]) -> float:
        return -float(np.linalg.norm(models[members].mean(0) - target))

    ingredients: list[int] = []
    for i in sorted(range(6), key=lambda i: accuracy([i]), reverse=True):
        if not ingredients or accuracy([*ingredients, i]) >= accuracy(ingredients):
            ingredients.append(i)
    asked: list[tuple[float, ...]] = []

    def score(weights) -> float:
        asked.append(tuple(weights))
        return -float(np.linalg.norm(np.asarray(weights) @ models - target))

    weights = greedy_soup(6, score)
    assert sorted(ingredients) == [i for i, weight in enumerate(weights) if weight]
    assert {weight for weight in weights if weight} == {1 / len(ingredients)}
    assert len(asked) == 6 + 5
    assert score(weights) >= max(score(one) for one in np.eye(6)) - 1e-12


def test_one_that_changes_nothing_stays_in() -> None:
    """The score must not fall; it need not rise. Of equals the first is taken first."""
    assert greedy_soup(3, lambda weights: 0.5) == [1 / 3] * 3
    assert greedy_soup(3, lambda weights: -max(weights)) == [1 / 3] * 3
    assert greedy_soup(3, max) == [1.0, 0.0, 0.0]


def test_it_is_not_the_best_of_all_subsets() -> None:
    """What greed misses: the best single model blocks the best pair."""
    models = np.array([0.4, -1.0, 1.1])

    def score(weights) -> float:
        return -abs(float(np.asarray(weights) @ models))

    assert greedy_soup(3, score) != [0.0, 0.5, 0.5]
    subsets = [s for k in (1, 2, 3) for s in itertools.combinations(range(3), k)]
    best = max(subsets, key=lambda s: -abs(models[list(s)].mean()))
    assert best == (1, 2)
