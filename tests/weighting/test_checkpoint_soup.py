"""Weights by step are those of a training whose updates were damped, and errors say which checkpoint is at fault."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_frmerge.errors import ArgumentError, CheckpointError
from hf_frmerge.merging.arguments.named_weights import parse_name
from hf_frmerge.weighting.checkpoint_soup import checkpoint_step, soup_weights, weights_by_step

DECAYS = {"linear": lambda t: 1 - t, "1-sqrt": lambda t: 1 - math.sqrt(t)}
STEPS = st.lists(st.integers(0, 10**6), min_size=2, max_size=8, unique=True)


@pytest.mark.parametrize("name", DECAYS)
@settings(deadline=None)
@given(steps=STEPS, seed=st.integers(0, 99))
def test_the_mean_is_the_first_checkpoint_plus_damped_updates(name: str, steps: list[int], seed: int) -> None:
    """Checkpoints are sums of updates; every update is damped by what is left of the decay at its end."""
    order = sorted(steps)
    updates = np.random.default_rng(seed).normal(size=(len(steps), 3))
    checkpoints = dict(zip(order, np.cumsum(updates, axis=0)))
    gap = (order[-1] - order[0]) / (len(order) - 1)
    left = [DECAYS[name]((step - order[0]) / (order[-1] - order[0] + gap)) for step in order]
    expected = sum(share * update for share, update in zip(left, updates))
    weights = weights_by_step(parse_name(name), steps)
    mean = sum(weight * checkpoints[step] for weight, step in zip(weights, steps))
    np.testing.assert_allclose(mean, expected, rtol=0, atol=1e-12 * len(steps))
    assert min(weights) > 0 and math.isclose(math.fsum(weights), 1)


def test_values_by_hand() -> None:
    assert weights_by_step(parse_name("linear"), [30, 10, 20, 40]) == pytest.approx([1 / 4] * 4)
    assert weights_by_step(parse_name("linear"), [100, 200, 600]) == pytest.approx([1 / 7.5, 4 / 7.5, 2.5 / 7.5])
    assert weights_by_step(parse_name("1-sqrt"), [200, 100, 300, 400]) == pytest.approx(
        [math.sqrt(1 / 2) - 1 / 2, 1 / 2, math.sqrt(3 / 4) - math.sqrt(1 / 2), 1 - math.sqrt(3 / 4)]
    )
    assert weights_by_step(parse_name("ema:0.5"), [30, 10, 20]) == pytest.approx([4 / 7, 1 / 7, 2 / 7])
    shares = np.array([0.25**2, 0.25 ** (4 / 3), 1])  # gaps of 20 and 40: one mean gap is 30
    assert weights_by_step(parse_name("EMA:0.25"), [0, 20, 60]) == pytest.approx(shares / shares.sum())


def test_the_step_is_that_of_the_state_and_else_that_of_the_name(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-7"
    folder.mkdir()
    assert checkpoint_step(str(folder)) == 7
    assert checkpoint_step(f"{folder}/") == 7
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 900}))
    assert checkpoint_step(str(folder)) == 900
    assert checkpoint_step("org/model-step-1000@main") == 1000


def test_errors_name_the_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "final").mkdir()
    with pytest.raises(ArgumentError, match=r"final' has no trainer_state.json"):
        checkpoint_step(str(tmp_path / "final"))
    for text in ("{", "[]", '{"global_step": "soon"}', '{"epoch": 1}', '{"global_step": Infinity}', "[" * 200000):
        (tmp_path / "final" / "trainer_state.json").write_text(text)
        with pytest.raises(CheckpointError, match="does not say at which step"):
            checkpoint_step(str(tmp_path / "final"))
    with pytest.raises(ArgumentError, match="both of step 5"):
        soup_weights(parse_name("linear"), ["a/checkpoint-5", "b/checkpoint-5"])
    assert soup_weights(parse_name("uniform"), ["a/checkpoint-5", "b/checkpoint-5"]) == [0.5, 0.5]
