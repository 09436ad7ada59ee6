from __future__ import annotations

import json
import math
from contextlib import closing
from pathlib import Path

from merge_reference import SHAPES, write_family
from transformers import TrainerState

from hf_frmerge.merging.arguments.merging_arguments import MergingArguments
from hf_frmerge.merging.callbacks.state import MergeState, StepResult
from hf_frmerge.merging.planning.build_plan import build_plan


def step(
    name: str, action: str = "merge", nbytes: int = 10, residual: float = 0.0, converged: bool = True
) -> StepResult:
    return StepResult(name, action, nbytes, (1.0, 1.0), 1.0, 0.1, 3, residual, converged, 0)  # type: ignore[arg-type]


def test_recording_steps_counts_tensors_bytes_and_failures() -> None:
    state = MergeState(max_steps=4, bytes_total=100)
    state.record(step("a", residual=1e-13))
    state.record(step("b", nbytes=40, residual=3e-3, converged=False))
    state.record(step("c", action="copy", nbytes=30, residual=math.nan, converged=False))  # copies iterate nothing
    assert (state.global_step, state.bytes_done, state.epoch) == (3, 80, 0.75)
    assert (state.n_not_converged, state.worst_residual, state.current_tensor) == (1, 3e-3, "c")
    assert MergeState().epoch == 0.0


def test_a_start_takes_the_totals_of_the_plan(tmp_path: Path) -> None:
    base, experts = write_family(tmp_path, 2)
    args = MergingArguments(output_dir=str(tmp_path / "out"), logging_steps=7, space="deltas")
    state = MergeState(global_step=5, bytes_done=3, epoch=0.5, n_not_converged=1, worst_residual=1.0)
    with closing(build_plan(experts, args, [3.0, 1.0], base)) as plan:
        state.start(plan)
    sizes = [4 * math.prod(shape) for shape in SHAPES.values()]
    assert (state.max_steps, state.bytes_total, state.logging_steps) == (len(sizes), sum(sizes), 7)
    assert state.sources == [
        {"id": model, "revision": None, "weight": weight}
        for model, weight in zip([*experts, base], [0.75, 0.25, None])
    ]
    assert (state.global_step, state.bytes_done, state.epoch) == (0, 0, 0.0)
    assert (state.n_not_converged, state.worst_residual) == (0, 0.0)


def test_reporters_find_the_fields_they_read_on_a_trainer() -> None:
    # What the integrations of transformers read from the state (integration_utils.py of 5.23).
    read = ["global_step", "max_steps", "epoch", "is_world_process_zero", "is_local_process_zero", "best_metric"]
    read += ["is_hyper_param_search", "trial_name", "trial_params", "total_flos", "logging_steps", "log_history"]
    ours, theirs = vars(MergeState()), vars(TrainerState())
    for name in read:
        assert name in theirs
        assert name in ours
    assert json.dumps(ours)
