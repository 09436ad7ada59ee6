from __future__ import annotations

import re

import pytest

from hf_frmerge.merging.arguments.merging_arguments import MergingArguments
from hf_frmerge.merging.callbacks.callback import CallbackHandler, MergeControl
from hf_frmerge.merging.callbacks.progress import ProgressCallback
from hf_frmerge.merging.callbacks.state import MergeState, StepResult

ARGS = MergingArguments()


def merge(state: MergeState, *, sizes: list[int], n_blocks: int) -> None:
    handler, control = CallbackHandler([ProgressCallback]), MergeControl()
    handler.on_merge_begin(ARGS, state, control)
    for index, nbytes in enumerate(sizes):
        result = StepResult(f"w{index}", "merge", nbytes, (1.0,), 1.0, 0.1, 3, 0.0, True, 0, n_blocks=n_blocks)
        handler.on_step_begin(ARGS, state, control)
        state.record(result)
        handler.on_step_end(ARGS, state, control, result)
    handler.on_log(ARGS, state, control, {"residual": 1.23456e-13, "note": "x" * 150})
    handler.on_merge_end(ARGS, state, control)
    for _ in range(4):
        handler.on_prediction_step(ARGS, state, control, eval_dataloader=range(4))
    handler.on_prediction_step(ARGS, state, control, eval_dataloader=iter([0]))  # no length: no bar
    handler.on_evaluate(ARGS, state, control, {})


def test_bar_counts_bytes_blocks_and_tensors(capsys: pytest.CaptureFixture[str]) -> None:
    # Resumed: half of the bytes were written by an earlier run.
    state = MergeState(global_step=2, max_steps=4, bytes_done=2_000_000, bytes_total=4_000_000)
    merge(state, sizes=[1_500_000, 500_000], n_blocks=3)
    out, err = capsys.readouterr()
    assert out == str({"residual": "1.235e-13", "note": "x" * 100 + "… (150 characters)"}) + "\n"
    merging, evaluating = (line.split("\r")[-1] for line in err.strip().split("\n")[-2:])
    assert re.search(r"Merging: 100%.* 4\.00M/4\.00M .*B/s, 6 blocks, 4/4 tensors", merging)
    assert re.search(r"Evaluating: 100%.* 4/4 ", evaluating)
    assert "Merging:  50%" in err  # where the bar began


def test_the_clock_of_the_bar_starts_with_the_first_tensor(capsys: pytest.CaptureFixture[str]) -> None:
    """A calibration comes between the begin of a merge and its first tensor, and may take most of the time."""
    state, handler, control = (
        MergeState(max_steps=1, bytes_total=10),
        CallbackHandler([ProgressCallback]),
        MergeControl(),
    )
    handler.on_merge_begin(ARGS, state, control)
    assert capsys.readouterr() == ("", "")
    handler.on_step_begin(ARGS, state, control)
    assert "Merging:   0%" in capsys.readouterr().err
    handler.on_merge_end(ARGS, state, control)


def test_other_processes_show_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    merge(MergeState(max_steps=1, bytes_total=10, is_world_process_zero=False), sizes=[10], n_blocks=1)
    assert capsys.readouterr() == ("", "")
