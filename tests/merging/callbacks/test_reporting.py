from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from hf_frmerge.errors import ArgumentError
from hf_frmerge.merging.arguments.merging_arguments import MergingArguments
from hf_frmerge.merging.callbacks.callback import CallbackHandler, MergeControl
from hf_frmerge.merging.callbacks.reporting import ReporterBridge, reporting_callbacks
from hf_frmerge.merging.callbacks.state import MergeState, StepResult

STEP = StepResult("w", "merge", 10, (1.0, 3.0), 1.0, 0.1, 3, 1e-13, True, 0)


def events_on_disk(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    files = sorted(folder.rglob("events.out.tfevents.*"))
    return [EventAccumulator(str(file)).Reload() for file in files]


def test_tensorboard_holds_the_scalars_that_were_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    args = MergingArguments(output_dir=str(tmp_path), report_to="tensorboard", hub_token="hf_secret")
    handler = CallbackHandler(reporting_callbacks(args.report_to))
    state, control = MergeState(max_steps=3), MergeControl()
    handler.on_init_end(args, state, control)
    handler.on_merge_begin(args, state, control)
    residuals = [1e-13, 2.5e-13, 0.125]
    for residual in residuals:
        handler.on_step_begin(args, state, control)
        state.record(STEP)
        handler.on_step_end(args, state, control, STEP)
        handler.on_log(args, state, control, {"residual": residual, "tensor": "w"})
    handler.on_save(args, state, control)
    handler.on_merge_end(args, state, control)
    handler.on_log(args, state, control, {"eval_loss": 2.5})  # opens the run again
    handler.on_evaluate(args, state, control, {"eval_loss": 2.5})
    handler.on_merge_end(args, state, control)

    during, after = sorted(events_on_disk(tmp_path), key=lambda events: "eval/loss" in events.Tags()["scalars"])
    scalars = during.Scalars("train/residual")
    assert [event.step for event in scalars] == [1, 2, 3]
    assert [event.value for event in scalars] == pytest.approx(residuals, rel=1e-7)  # stored as float32
    assert [(event.step, event.value) for event in after.Scalars("eval/loss")] == [(3, 2.5)]
    stored = during.Tensors("args/text_summary")[0].tensor_proto.string_val[0].decode()
    assert json.loads(stored) == args.to_dict()
    assert "hf_secret" not in stored


class Reporter(TrainerCallback):
    """Reads what the integrations of transformers read, and tries to steer."""

    def __init__(self) -> None:
        self.events: list[str] = []


def _reading(event: str) -> Any:
    def read(self: Reporter, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> MergeControl:
        self.events.append(event)
        assert args.hub_token == args.to_dict()["hub_token"] == "<HUB_TOKEN>"
        neutral = (args.load_best_model_at_end, args.save_total_limit, args.resume_from_checkpoint)
        assert neutral == (False, None, False)
        assert (args.project, args.trackio_space_id, args.trackio_static_space_id) == ("huggingface", None, False)
        assert (args.run_name, args.output_dir, model) == ("r", "merged", "a model")
        assert args.to_sanitized_dict()["run_name"] == "r" and '"run_name": "r"' in args.to_json_string()
        assert state.is_world_process_zero and not state.is_hyper_param_search
        args.run_name = None  # as the W&B callback does in a search
        return MergeControl(should_merge_stop=True)

    return read


for _event in [name for name in vars(TrainerCallback) if name.startswith("on_")]:
    setattr(Reporter, _event, _reading(_event))


def test_events_reach_the_reporter_under_the_names_of_a_training() -> None:
    reporter = Reporter()
    handler = CallbackHandler([ReporterBridge(reporter)], model="a model")
    args, state, control = MergingArguments(run_name="r", hub_token="t"), MergeState(), MergeControl()
    handler.on_init_end(args, state, control)
    handler.on_merge_begin(args, state, control)
    handler.on_step_begin(args, state, control)
    handler.on_step_end(args, state, control, STEP)
    handler.on_log(args, state, control, {"a": 1})
    handler.on_save(args, state, control)
    handler.on_merge_end(args, state, control)
    handler.on_evaluate(args, state, control, {"eval_a": 1})
    assert reporter.events == [
        "on_init_end", "on_train_begin", "on_step_end", "on_log", "on_save", "on_train_end", "on_evaluate",
    ]  # fmt: skip
    assert control == MergeControl()
    assert args.run_name == "r"


def test_several_reporters_go_together_and_only_a_repeated_one_is_noticed(caplog: pytest.LogCaptureFixture) -> None:
    class Other(TrainerCallback):
        pass

    handler = CallbackHandler([ReporterBridge(Reporter()), ReporterBridge(Other())])
    assert caplog.text == ""
    handler.add_callback(ReporterBridge(Other()))
    assert "A Other is among the callbacks already (Reporter, Other)" in caplog.text


def test_names_of_integrations(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    assert reporting_callbacks("none") == []
    assert reporting_callbacks(MergingArguments(report_to=None).report_to) == []  # type: ignore[arg-type]
    (bridge,) = reporting_callbacks(" tensorboard")
    assert type(bridge.reporter).__name__ == "TensorBoardCallback"
    assert "TensorBoardCallback" in {type(b.reporter).__name__ for b in reporting_callbacks("all")}
    with pytest.raises(ArgumentError, match=r"unknown report_to 'tensorbord': .*Did you mean 'tensorboard'\?"):
        reporting_callbacks("tensorboard,tensorbord")
    if "kubeflow" not in INTEGRATION_TO_CALLBACK:  # an older transformers
        return
    monkeypatch.delenv("KUBEFLOW_TRAINER_SERVER_URL", raising=False)
    with pytest.raises(
        ArgumentError, match=r"`report_to=kubeflow` cannot be used here: .*KUBEFLOW_TRAINER_SERVER_URL"
    ):
        reporting_callbacks("kubeflow")
