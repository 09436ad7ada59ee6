"""The front of many coefficients, by NSGA-II and NSGA-III of pymoo."""

# Shape suffixes: N = experts, P = points, M = tasks.

from __future__ import annotations

import math
from collections.abc import Callable
from importlib.util import find_spec

import numpy as np

from hf_frmerge.errors import MergeError
from hf_frmerge.weighting.pareto.region import Array, Region

_POPULATION, _GENERATIONS = 100, 150
_MOST_DIRECTIONS = 130


def require_pymoo(n_experts: int) -> None:
    """
    Check that pymoo is installed.

    Raises:
        MergeError: If it is not.
    """
    if find_spec("pymoo") is None:
        raise MergeError(
            f"The front over the weights of {n_experts} experts is found by pymoo, which is not installed: pip "
            "install 'hf_frmerge[pareto]'. Or join them two by two: by='nested' (--by nested) does without."
        )


def find_by_nsga(scores_of: Callable[[Array], Array], n_tasks: int, region: Region, seed: int) -> Array:
    """
    Return points near the front, `(P, N)`: what NSGA ends with, and what it began with.

    NSGA-II (Deb et al. 2002) for one or two tasks, NSGA-III (Deb and Jain 2014) for more.

    Args:
        scores_of: Points -> scores of all tasks, `(P, M)`, higher is better.
        n_tasks: Number of tasks.
        region: Where to search.
        seed: Of all that is drawn.

    Raises:
        MergeError: If pymoo is not installed.
    """
    require_pymoo(region.n_experts)
    from pymoo.algorithms.moo.nsga2 import NSGA2
    from pymoo.algorithms.moo.nsga3 import NSGA3
    from pymoo.core.problem import Problem
    from pymoo.optimize import minimize
    from pymoo.util.ref_dirs import get_reference_directions

    n_variables = region.n_experts + 1

    class _Scores(Problem):  # type: ignore[misc]  # pymoo has no types
        def __init__(self) -> None:
            super().__init__(n_var=n_variables, n_obj=n_tasks, xl=0.0, xu=1.0)

        def _evaluate(self, x: Array, out: dict[str, Array], *_: object, **__: object) -> None:
            out["F"] = -scores_of(_points(x, region))

    start_PN = region.sample(_POPULATION, np.random.default_rng(seed))
    sums_P1 = start_PN.sum(1, keepdims=True)
    low, high = region.scales
    start = np.hstack([start_PN / sums_P1, (sums_P1 - low) / (high - low or 1.0)])
    if n_tasks < 3:
        algorithm = NSGA2(pop_size=_POPULATION, sampling=start)
    else:
        directions = get_reference_directions("das-dennis", n_tasks, n_partitions=_n_partitions(n_tasks))
        algorithm = NSGA3(directions, pop_size=max(_POPULATION, len(directions)), sampling=start)
    result = minimize(_Scores(), algorithm, ("n_gen", _GENERATIONS), seed=seed)
    return np.vstack([start_PN, _points(np.atleast_2d(result.X), region)])


def _points(variables: Array, region: Region) -> Array:
    """Return the points of variables in [0, 1]: shares of the experts before they are made to sum to 1, and scale."""
    shares_PN = variables[:, :-1]
    sums_P1 = shares_PN.sum(1, keepdims=True)
    weights_PN = np.where(sums_P1 > 0, shares_PN / np.where(sums_P1 > 0, sums_P1, 1.0), 1.0 / region.n_experts)
    low, high = region.scales
    return weights_PN * (low + (high - low) * variables[:, -1:])


def _n_partitions(n_tasks: int) -> int:
    """Return the finest partition of Das and Dennis with no more directions than a population can follow."""
    parts = 1
    while math.comb(n_tasks + parts, parts + 1) <= _MOST_DIRECTIONS:
        parts += 1
    return parts
