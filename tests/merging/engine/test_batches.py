"""Batches: which tensors are solved together, and that nobody is worse off in company."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_frmerge.errors import AmbiguousMeanError
from hf_frmerge.merging.engine import batches
from hf_frmerge.merging.engine.batches import in_batches
from hf_frmerge.merging.engine.solve import solve
from hf_frmerge.merging.planning.tensor_step import TensorStep
from hf_frmerge.methods.span import SpanOptions
from hf_frmerge.methods.table import METHODS


def step(name: str, numel: int = 4, n_blocks: int = 1, action: str = "merge", group: str | None = None) -> TensorStep:
    return TensorStep(
        name, "BF16", (numel,), action, 0, (0.5, 0.5), name if group is None else group, n_blocks, numel // n_blocks
    )


steps = st.lists(
    st.builds(
        lambda numel, n_blocks, action: (numel * n_blocks, n_blocks, action),
        st.sampled_from([1, 1000, 3 << 20, 40 << 20]),
        st.sampled_from([1, 1, 1, 7, 1000]),
        st.sampled_from(["merge", "merge", "merge", "copy"]),
    ),
    max_size=40,
).map(lambda parts: [step(f"t{i}", *part) for i, part in enumerate(parts)])


@given(steps, st.integers(2, 16))
def test_batches_are_runs_of_alike_tensors_of_bounded_size(plan: list[TensorStep], n_models: int) -> None:
    runs = in_batches(plan, n_models)
    assert [s.name for run in runs for s in run] == [s.name for s in plan]
    for run in runs:
        assert len(run) <= batches.BATCH_TENSORS
        assert len(run) == 1 or sum(s.n_blocks for s in run) <= batches.BATCH_BLOCKS
        assert len({s.n_blocks for s in run}) == 1
        assert len(run) == 1 or all(s.action == "merge" and s.n_blocks < 1000 for s in run)
        assert len(run) == 1 or sum(s.nbytes for s in run) * n_models <= batches.BATCH_BYTES
    # Nothing is cut without a reason.
    for before, after in pairwise(runs):
        alike = {(s.action, s.n_blocks) for s in [*before, after[0]]} == {("merge", min(before[0].n_blocks, 7))}
        nbytes, n_blocks = (sum(parts) for parts in zip(*((s.nbytes, s.n_blocks) for s in [*before, after[0]])))
        is_full = len(before) == batches.BATCH_TENSORS or n_blocks > batches.BATCH_BLOCKS
        assert not alike or is_full or nbytes * n_models > batches.BATCH_BYTES


def test_a_sphere_of_several_tensors_is_a_batch_of_its_own() -> None:
    plan = [step("embed"), step("q", group="layer 0"), step("norm"), step("k", group="layer 0"), step("head")]
    batches = [[s.name for s in batch] for batch in in_batches(plan, 2)]
    assert batches == [["embed"], ["q", "k"], ["norm", "head"]]


@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 5),
    st.sampled_from([1, 2, 3, 40]),
    st.sampled_from(sorted(m.name for m in METHODS.values() if m.kind == "span")),
    st.sampled_from(["mean", "median", "max"]),
    st.sampled_from([0.0, 0.3]),
)
def test_the_bits_of_a_tensor_are_the_same_in_company_and_alone(
    seed: int, n_tensors: int, n_blocks: int, method: str, norm: str, beta: float
) -> None:
    rng = np.random.default_rng(seed)
    n = METHODS[method].n_experts or 3
    points = rng.standard_normal((n_tensors, n_blocks, 1, n)) + 0.5 * rng.standard_normal((n_tensors, n_blocks, n, n))
    weights = rng.dirichlet(np.ones(n), n_tensors)
    options, experts = SpanOptions(norm=norm, beta=beta, on_ambiguous="linear"), ["a", "b", "c"][:n]
    names = [f"t{t}" for t in range(n_tensors)]
    together = solve(points, weights, method, options, tensors=names, experts=experts)
    for t in range(n_tensors):
        [alone] = solve(points[t : t + 1], weights[t : t + 1], method, options, tensors=[names[t]], experts=experts)
        assert together[t].coefficients.tobytes() == alone.coefficients.tobytes()
        assert together[t].geometry == alone.geometry


def test_the_ambiguous_tensor_of_a_batch_is_named() -> None:
    points = np.array([[[[1.0, 0.0], [0.8, 0.6]]], [[[1.0, 0.0], [-1.0, 0.0]]]])
    with pytest.raises(AmbiguousMeanError, match=r"'second': 'org/a' and 'org/b' are 3\.14"):
        solve(
            points,
            [[0.5, 0.5]] * 2,
            "karcher",
            SpanOptions(),
            tensors=["first", "second"],
            experts=["org/a", "org/b"],
        )


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_a_zero_expert_is_not_named_as_one_that_balances_out(zero: int) -> None:
    """Three experts 120 degrees apart cancel; the fourth has no direction, and no part in it."""
    directions = [(1.0, 0.0), (-0.5, 0.75**0.5), (-0.5, -(0.75**0.5))]
    directions.insert(zero, (0.0, 0.0))
    names = ["org/a", "org/b", "org/c", "org/d"]
    with pytest.raises(AmbiguousMeanError, match=r"are 2\.0944 rad apart") as error:
        solve(np.array([[directions]]), [[0.25] * 4], "karcher", SpanOptions(), tensors=["w"], experts=names)
    assert names[zero] not in str(error.value)
