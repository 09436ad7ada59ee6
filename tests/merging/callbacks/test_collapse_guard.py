from __future__ import annotations

import logging
import math
from typing import Any

import pytest

from hf_frmerge.errors import ArgumentError
from hf_frmerge.merging.arguments.merging_arguments import MergingArguments
from hf_frmerge.merging.callbacks.callback import CallbackHandler, MergeControl
from hf_frmerge.merging.callbacks.collapse_guard import CollapseGuardCallback
from hf_frmerge.merging.callbacks.state import MergeState, StepResult
from hf_frmerge.merging.callbacks.thresholds import Trip, parse_threshold

ARGS = MergingArguments()


def step(
    norm_ratio: float, action: Any = "merge", norms: tuple[float, ...] = (1.0, 3.0), name: str = "w"
) -> StepResult:
    return StepResult(name, action, 10, norms, norm_ratio, 0.1, 3, 1e-13, True, 0)


def after_step(guard: CollapseGuardCallback, result: StepResult) -> MergeControl:
    return CallbackHandler([guard]).on_step_end(ARGS, MergeState(), MergeControl(), result)


def after_evaluation(guard: CollapseGuardCallback, metrics: dict[str, float]) -> MergeControl:
    return CallbackHandler([guard]).on_evaluate(ARGS, MergeState(), MergeControl(), metrics)


@pytest.mark.parametrize(
    ("result", "stops"),
    [
        (step(0.8), False),  # on the bound is still fine
        (step(math.nextafter(0.8, 0)), True),
        (step(math.nan), True),
        (step(1 / math.sqrt(2)), True),  # the plain mean of two orthogonal deltas
        (step(math.nan, norms=(0.0, 0.0)), False),  # nothing there to lose
        (step(0.1, action="copy"), False),
        (step(0.1, action="skip"), False),
    ],
)
def test_norms_below_the_bound_stop_the_merge(result: StepResult, stops: bool) -> None:
    guard = CollapseGuardCallback(min_norm_ratio=0.8)
    control = after_step(guard, result)
    assert control.should_merge_stop is stops
    assert len(guard.trips) == stops
    if stops and not math.isnan(result.norm_ratio):
        assert guard.trips == [Trip("w", "norm_ratio", result.norm_ratio, "norm_ratio<0.8")]
        assert control.stop_reason.startswith("collapse guard: w: norm_ratio is 0.")


@pytest.mark.parametrize(
    ("threshold", "metrics", "stops"),
    [
        ("effective_rank<0.9", {"eval_effective_rank": 0.89}, True),
        ("effective_rank < 0.9", {"eval_effective_rank": 0.9}, False),
        ("eval_effective_rank<0.9", {"eval_effective_rank": 0.5}, True),
        ("perplexity>4e1", {"eval_perplexity": 41}, True),
        ("perplexity>4e1", {"eval_perplexity": 39}, False),
        ("perplexity>40", {"eval_perplexity": math.nan}, True),
        ("perplexity>40", {"perplexity": 50.0, "eval_perplexity": 1.0}, True),  # the exact name comes first
    ],
)
def test_metrics_across_a_threshold_stop_the_merge(threshold: str, metrics: dict[str, float], stops: bool) -> None:
    guard = CollapseGuardCallback(thresholds=[threshold])
    assert after_evaluation(guard, metrics).should_merge_stop is stops
    assert [trip.where for trip in guard.trips] == ["evaluation"] * stops


def test_metric_that_is_not_there_is_said(caplog: pytest.LogCaptureFixture) -> None:
    control = after_evaluation(CollapseGuardCallback(thresholds=["rank<1"]), {"eval_loss": 1.0})
    assert not control.should_merge_stop
    assert "watches 'rank', but the metrics are eval_loss" in caplog.text


def test_a_bound_holds_for_every_dataset_and_for_no_other_metric() -> None:
    metrics = {"eval_math_accuracy": 0.4, "eval_code_accuracy": 0.9, "eval_math_token_accuracy": 0.1}
    assert parse_threshold("accuracy<0.5").find(metrics) == {"eval_math_accuracy": 0.4, "eval_code_accuracy": 0.9}
    assert parse_threshold("token_accuracy<0.5").find(metrics) == {"eval_math_token_accuracy": 0.1}
    assert parse_threshold("math_accuracy<0.5").find(metrics) == {"eval_math_accuracy": 0.4}
    trips = parse_threshold("accuracy<0.5").trips(metrics, {"eval_math_accuracy": "math"})
    assert [str(trip) for trip in trips] == ["math: eval_math_accuracy is 0.4 (guard: accuracy<0.5)"]


def test_only_the_last_dataset_tells_that_a_metric_is_missing(caplog: pytest.LogCaptureFixture) -> None:
    guard = CollapseGuardCallback(thresholds=["effective_rank<0.9", "perplexity>9", "rank_of_none<1"])
    handler, control = CallbackHandler([guard]), MergeControl()
    handler.on_evaluate(ARGS, MergeState(), control, {"eval_math_perplexity": 8.0}, is_last=False)
    assert not caplog.records
    places = {"eval_effective_rank": "layer 4"}
    handler.on_evaluate(ARGS, MergeState(), control, {"eval_effective_rank": 0.6}, places=places)
    assert [record.args[0] for record in caplog.records] == ["rank_of_none"]
    assert control.stop_reason == "collapse guard: layer 4: eval_effective_rank is 0.6 (guard: effective_rank<0.9)"


def test_warning_goes_on_and_counts(caplog: pytest.LogCaptureFixture) -> None:
    guard = CollapseGuardCallback(min_norm_ratio=0.9, action="warn")
    handler, control = CallbackHandler([guard]), MergeControl()
    with caplog.at_level(logging.WARNING):
        handler.on_merge_begin(ARGS, MergeState(), control)
        for i, ratio in enumerate([0.8, 0.95, 0.3, 0.5]):
            handler.on_step_end(ARGS, MergeState(), control, step(ratio, name=f"w{i}"))
        handler.on_merge_end(ARGS, MergeState(), control)
    assert control == MergeControl()
    assert [record.getMessage() for record in caplog.records] == [
        "Collapse guard: w0: norm_ratio is 0.8 (guard: norm_ratio<0.9)",
        "Collapse guard: 3 tensors in all; the worst is w2: norm_ratio is 0.3 (guard: norm_ratio<0.9)",
    ]
    handler.on_merge_begin(ARGS, MergeState(), control)
    assert guard.trips == []


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({}, "watches nothing"),
        ({"thresholds": ["perplexity=40"]}, "NAME<VALUE or NAME>VALUE.*'perplexity=40'"),
        ({"thresholds": ["perplexity>many"]}, "'perplexity>many'"),
        ({"thresholds": ["perplexity>nan"]}, "'perplexity>nan'"),
        ({"thresholds": [">40"]}, "'>40'"),
        ({"min_norm_ratio": 0.5, "action": "raise"}, "must be 'stop' or 'warn', but got 'raise'"),
    ],
)
def test_guards_that_make_no_sense_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ArgumentError, match=sentence):
        CollapseGuardCallback(**options)
