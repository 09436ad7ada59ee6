from __future__ import annotations

import logging
from typing import Any

import pytest
from transformers import TrainerCallback

from hf_frmerge.errors import ArgumentError
from hf_frmerge.merging.arguments import MergingArguments
from hf_frmerge.merging.callbacks import (
    CallbackHandler,
    DefaultFlowCallback,
    MergeCallback,
    MergeControl,
    PrinterCallback,
    StepResult,
)
from hf_frmerge.merging.state import MergeState

EVENTS = [name for name in vars(MergeCallback) if name.startswith("on_")]


def step(name: str = "w", action: Any = "merge", norm_ratio: float = 1.0) -> StepResult:
    return StepResult(name, action, 10, (1.0, 3.0), norm_ratio, 0.1, 3, 1e-13, True, 0)


class Recorder(MergeCallback):
    """Writes down every event with the keywords it got."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.keywords: list[dict[str, Any]] = []


def _recording(event: str) -> Any:
    def record(
        self: Recorder, args: MergingArguments, state: MergeState, control: MergeControl, **kwargs: Any
    ) -> None:
        self.events.append(event)
        self.keywords.append(kwargs)

    return record


for _event in EVENTS:
    setattr(Recorder, _event, _recording(_event))


def run(
    handler: CallbackHandler, args: MergingArguments, n_tensors: int
) -> tuple[MergeState, MergeControl, list[str]]:
    """A merge reduced to its events, in the documented order; also the tensors that were to be skipped."""
    state, control, skipped = MergeState(), MergeControl(), []
    control = handler.on_init_end(args, state, control)
    state.max_steps, state.bytes_total = n_tensors, 10 * n_tensors
    control = handler.on_merge_begin(args, state, control)
    for index in range(n_tensors):
        state.current_tensor = f"layers.{index}.w"
        control = handler.on_step_begin(args, state, control)
        skipped += [state.current_tensor] if control.should_skip_tensor else []
        result = step(state.current_tensor, "skip" if control.should_skip_tensor else "merge")
        state.record(result)
        control = handler.on_step_end(args, state, control, result)
        if control.should_log:
            log(handler, args, state, control, {"n": index})
        if control.should_merge_stop:
            break
    if not control.should_merge_stop:
        control = handler.on_save(args, state, control)
    log(handler, args, state, control, {"runtime": 1.0})
    control = handler.on_merge_end(args, state, control)
    if control.should_evaluate:
        for _ in range(2):
            control = handler.on_prediction_step(args, state, control, eval_dataloader=[0, 1])
        log(handler, args, state, control, {"eval_loss": 2.0})
        control = handler.on_evaluate(args, state, control, {"eval_loss": 2.0})
    control = handler.on_push_begin(args, state, control)
    return state, control, skipped


def log(
    handler: CallbackHandler, args: MergingArguments, state: MergeState, control: MergeControl, logs: dict[str, Any]
) -> None:
    state.log_history.append({**logs, "step": state.global_step})
    handler.on_log(args, state, control, state.log_history[-1])


def test_events_fire_in_the_documented_order() -> None:
    recorder = Recorder()
    run(
        CallbackHandler([DefaultFlowCallback, recorder], model="m", processing_class="p"),
        MergingArguments(logging_steps=2, logging_first_step=True, do_eval=True),
        n_tensors=3,
    )
    tensor = ["on_step_begin", "on_step_end"]
    assert recorder.events == [
        "on_init_end", "on_merge_begin", *tensor, "on_log", *tensor, "on_log", *tensor, "on_save", "on_log",
        "on_merge_end", "on_prediction_step", "on_prediction_step", "on_log", "on_evaluate", "on_push_begin",
    ]  # fmt: skip
    assert set(recorder.events) == set(EVENTS)
    added = {
        "on_step_end": {"result"}, "on_log": {"logs"}, "on_evaluate": {"metrics"},
        "on_prediction_step": {"eval_dataloader"},
    }  # fmt: skip
    for event, keywords in zip(recorder.events, recorder.keywords, strict=True):
        assert set(keywords) == {"model", "processing_class"} | added.get(event, set())
        assert (keywords["model"], keywords["processing_class"]) == ("m", "p")


def test_no_evaluation_and_few_logs_by_default() -> None:
    recorder = Recorder()
    run(CallbackHandler([DefaultFlowCallback, recorder]), MergingArguments(), n_tensors=1005)
    steps_before = [recorder.events[:i].count("on_step_end") for i, e in enumerate(recorder.events) if e == "on_log"]
    assert steps_before == [500, 1000, 1005]
    assert "on_evaluate" not in recorder.events


def test_stop_and_skip_are_obeyed_and_reset() -> None:
    class Steering(MergeCallback):
        def on_step_begin(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
            control.should_skip_tensor = state.current_tensor == "layers.1.w"

        def on_step_end(self, args, state, control, result, **kwargs):  # type: ignore[no-untyped-def]
            if result.name == "layers.3.w":
                control.should_merge_stop, control.stop_reason = True, "enough"

    handler = CallbackHandler([DefaultFlowCallback, Steering])
    state, control, skipped = run(handler, MergingArguments(do_eval=True), n_tensors=9)
    assert skipped == ["layers.1.w"]
    assert (state.global_step, state.epoch) == (4, 4 / 9)
    assert (control.should_merge_stop, control.stop_reason) == (True, "enough")
    assert not control.should_evaluate  # not due, half way
    handler.on_merge_begin(MergingArguments(), state, control)
    assert control == MergeControl()


@pytest.mark.parametrize(
    ("event", "cleared"),
    [
        ("on_step_begin", ["should_skip_tensor", "should_log", "should_evaluate"]),
        ("on_log", ["should_log"]),
        ("on_evaluate", ["should_evaluate"]),
        ("on_merge_begin", ["should_merge_stop"]),
        ("on_step_end", []),
        ("on_merge_end", []),
    ],
)
def test_each_event_resets_its_flags_and_no_others(event: str, cleared: list[str]) -> None:
    flags = ["should_merge_stop", "should_skip_tensor", "should_log", "should_evaluate"]
    control = MergeControl(**dict.fromkeys(flags, True))  # type: ignore[arg-type]
    extra: dict[str, Any] = {"on_log": {"logs": {}}, "on_evaluate": {"metrics": {}}, "on_step_end": {"result": step()}}
    handler = CallbackHandler([])
    after = getattr(handler, event)(MergingArguments(), MergeState(), control, **extra.get(event, {}))
    assert {flag for flag in flags if not vars(after)[flag]} == set(cleared)


def test_returned_control_replaces_the_old_one_for_later_callbacks() -> None:
    class Replace(MergeCallback):
        def on_step_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
            return MergeControl(should_log=True)

    class Look(MergeCallback):
        def on_step_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
            self.saw = control.should_log

    look = Look()
    control = CallbackHandler([Replace(), look]).on_step_end(MergingArguments(), MergeState(), MergeControl(), step())
    assert control.should_log and look.saw


def test_callback_that_damages_its_logs_damages_nobody_elses() -> None:
    class Vandal(MergeCallback):
        def on_log(self, args, state, control, logs, **kwargs):  # type: ignore[no-untyped-def]
            logs.clear()

        def on_evaluate(self, args, state, control, metrics, **kwargs):  # type: ignore[no-untyped-def]
            metrics.clear()

    recorder = Recorder()
    handler = CallbackHandler([Vandal, recorder])
    logs, metrics = {"a": 1}, {"eval_a": 2}
    handler.on_log(MergingArguments(), MergeState(), MergeControl(), logs)
    handler.on_evaluate(MergingArguments(), MergeState(), MergeControl(), metrics)
    assert (logs, metrics) == ({"a": 1}, {"eval_a": 2})
    assert (recorder.keywords[0]["logs"], recorder.keywords[1]["metrics"]) == (logs, metrics)


def test_adding_popping_and_removing(caplog: pytest.LogCaptureFixture) -> None:
    first = PrinterCallback()
    handler = CallbackHandler([DefaultFlowCallback, first])
    with caplog.at_level(logging.WARNING):
        handler.add_callback(PrinterCallback)
    assert "A PrinterCallback is among the callbacks already (DefaultFlowCallback, PrinterCallback)" in caplog.text
    second = handler.callbacks[-1]
    assert handler.pop_callback(second) is second
    assert handler.pop_callback(PrinterCallback) is first
    assert handler.pop_callback(PrinterCallback) is None
    handler.remove_callback(first)  # gone already
    handler.remove_callback(DefaultFlowCallback)
    assert handler.callbacks == []


@pytest.mark.parametrize("stranger", [TrainerCallback, TrainerCallback(), "tensorboard"])
def test_what_is_no_merge_callback_is_refused(stranger: Any) -> None:
    with pytest.raises(ArgumentError, match=r"must be a MergeCallback .*ReporterBridge"):
        CallbackHandler([stranger])


def test_printer_prints_readable_numbers_on_one_process_only(capsys: pytest.CaptureFixture[str]) -> None:
    handler = CallbackHandler([PrinterCallback])
    logs = {"residual": 1.23456e-13, "step": 3, "name": "x" * 200}
    handler.on_log(MergingArguments(), MergeState(), MergeControl(), logs)
    assert capsys.readouterr().out == str({"residual": "1.235e-13", "step": 3, "name": "x" * 200}) + "\n"
    handler.on_log(MergingArguments(), MergeState(is_local_process_zero=False), MergeControl(), logs)
    assert capsys.readouterr().out == ""
