from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import ALICE_TOKEN, HubServer
from merge_reference import write_model
from safetensors.torch import load_file
from tiny_models import save_llama_family
from transformers import TrainerCallback

from hf_frmerge import FisherRaoMerger
from hf_frmerge.errors import ArgumentError, MergeError
from hf_frmerge.merging.arguments.merging_arguments import MergingArguments
from hf_frmerge.merging.callbacks.callback import (
    CallbackHandler,
    DefaultFlowCallback,
    MergeCallback,
    MergeControl,
    PrinterCallback,
)
from hf_frmerge.merging.callbacks.state import MergeState, StepResult

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


@pytest.fixture
def tensors(tmp_path: Path) -> Callable[[int], list[str]]:
    """Write two experts of `n` tensors, `layers.0000.w` and on, with rows enough that each is a batch of its own."""

    def write(n: int) -> list[str]:
        generator = torch.Generator().manual_seed(n)
        models = [{f"layers.{i:04}.w": torch.randn(257, 8, generator=generator) for i in range(n)} for _ in range(2)]
        return [write_model(tmp_path / f"e{number}", model) for number, model in enumerate(models)]

    return write


def make_merger(
    experts: list[str], output: Path, callbacks: list[Any], *, eval_dataset: Any = None, **options: Any
) -> FisherRaoMerger:
    args = MergingArguments(output_dir=str(output), disable_tqdm=True, use_cpu=True, **options)
    return FisherRaoMerger(experts, args, callbacks=callbacks, eval_dataset=eval_dataset)


def test_events_fire_in_the_documented_order(tmp_path: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_FRMERGE_CACHE", str(tmp_path / "cache"))
    words = ["the", "house", "of", "wisdom"]
    save_llama_family(tmp_path, words, 0.05)
    experts = [str(tmp_path / name) for name in ("math", "code")]
    recorder = Recorder()
    merger = make_merger(
        experts,
        tmp_path / "out",
        [recorder],
        eval_dataset=[" ".join(words * 6)],
        logging_steps=8,
        logging_first_step=True,
        do_eval=True,
    )
    merger.merge().push_to_hub("alice/merged", token=ALICE_TOKEN)

    names = list(load_file(tmp_path / "math" / "model.safetensors"))
    due = [1, *range(8, len(names) + 1, 8)]
    steps = [event for n in range(1, len(names) + 1) for event in ["on_step_end", *["on_log"] * (n in due)]]
    # Several tensors are under way at once: some begin before earlier ones have ended.
    assert [event for event in recorder.events if event != "on_step_begin"] == [
        "on_init_end", "on_merge_begin", *steps, "on_save", "on_log", "on_merge_end",
        *["on_prediction_step"] * 3, "on_log", "on_evaluate", "on_push_begin",  # a batch for each of three models
    ]  # fmt: skip
    assert recorder.events.count("on_step_begin") == len(names)
    assert set(recorder.events) == set(EVENTS)
    added = {
        "on_step_end": {"result"}, "on_log": {"logs"}, "on_evaluate": {"metrics", "places", "is_last"},
        "on_prediction_step": {"eval_dataloader"},
    }  # fmt: skip
    for event, keywords in zip(recorder.events, recorder.keywords, strict=True):
        assert set(keywords) == {"model", "processing_class"} | added.get(event, set())
        assert (keywords["model"], keywords["processing_class"]) == (None, None)
    assert [keywords["result"].name for keywords in recorder.keywords if "result" in keywords] == names


def test_events_get_the_model_and_the_tokenizer_of_the_handler() -> None:
    recorder = Recorder()
    handler = CallbackHandler([recorder], model="m", processing_class="p")
    handler.on_save(MergingArguments(), MergeState(), MergeControl())
    assert recorder.keywords == [{"model": "m", "processing_class": "p"}]


def test_no_evaluation_and_few_logs_by_default(tensors: Callable[[int], list[str]], tmp_path: Path) -> None:
    recorder = Recorder()
    make_merger(tensors(1005), tmp_path / "out", [recorder]).merge()
    steps_before = [recorder.events[:i].count("on_step_end") for i, e in enumerate(recorder.events) if e == "on_log"]
    assert steps_before == [500, 1000, 1005]
    assert "on_evaluate" not in recorder.events


def test_stop_and_skip_are_obeyed_and_reset(tensors: Callable[[int], list[str]], tmp_path: Path) -> None:
    class Steering(MergeCallback):
        def on_step_begin(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
            control.should_skip_tensor = state.current_tensor == "layers.0001.w"

        def on_step_end(self, args, state, control, result, **kwargs):  # type: ignore[no-untyped-def]
            if result.name == "layers.0003.w":
                control.should_merge_stop, control.stop_reason = True, "enough"

    recorder = Recorder()
    merger = make_merger(
        tensors(60),
        tmp_path / "out",
        [Steering, recorder],
        block="row",
        num_workers=1,
        do_eval=True,
        eval_dataset=["never read"],
    )
    with pytest.raises(MergeError, match=r"stopped after \d+ of 60 tensors: enough\."):
        merger.merge()
    results = [keywords["result"] for keywords in recorder.keywords if "result" in keywords]
    assert [result.name for result in results if result.action == "skip"] == ["layers.0001.w"]
    # What was under way when the stop was asked for is finished, and nothing is begun after it.
    assert [result.name for result in results] == [f"layers.{i:04}.w" for i in range(len(results))]
    assert 4 <= len(results) < 60
    assert (merger.state.global_step, merger.state.epoch) == (len(results), len(results) / 60)
    assert (merger.control.should_merge_stop, merger.control.stop_reason) == (True, "enough")
    assert not merger.control.should_evaluate  # not due, half way
    assert "on_save" not in recorder.events and recorder.events[-1] == "on_merge_end"

    merger.remove_callback(Steering)
    merger.callback_handler.on_merge_begin(merger.args, merger.state, merger.control)
    assert merger.control == MergeControl()


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
