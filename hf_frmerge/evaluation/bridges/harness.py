"""Run tasks of the Language Model Evaluation Harness: local task files, and the benchmarks of the paper by name."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_frmerge.checkpoints.resolve import Source, resolve
from hf_frmerge.checkpoints.source import refuse_gguf
from hf_frmerge.errors import ArgumentError, MergeError
from hf_frmerge.evaluation.models.merged import whole_model
from hf_frmerge.evaluation.record import MERGED, EvaluationRecord, Score

PAPER_TASKS = {
    "hellaswag": "hellaswag",
    "bbh": "bbh",
    "mmlu-pro": "mmlu_pro",
    "musr": "leaderboard_musr",
    "gpqa-diamond": "gpqa_diamond_zeroshot",
}
"""Benchmark of arXiv 2603.04972 -> task name of the harness. Their data come from the Hub."""

_INSTALL = 'pip install "hf_frmerge[lm-eval]"'


def run_lm_eval(
    model: str,
    tasks: Sequence[str],
    *,
    base_model: str | None = None,
    batch_size: int = 8,
    dtype: str = "auto",
    device: str | None = None,
    token: str | None = None,
) -> EvaluationRecord:
    """
    Run tasks of lm-evaluation-harness on a merged model.

    Args:
        model (`str`):
            Folder or Hub id; an adapter is loaded on its base.
        tasks (`Sequence[str]`):
            Paths of task files (`.yaml`, `.yml`), keys of `PAPER_TASKS`, or other task names of the harness.
        base_model (`str`, *optional*):
            Base of an adapter; by default the one in its configuration.
        batch_size, dtype, device:
            Passed to the harness.
        token (`str`, *optional*):
            Token for the Hub.

    Returns:
        `EvaluationRecord`: one `Score` a task, with the task as its domain, and the equivalent command.

    Raises:
        ArgumentError: If a task file cannot be read, or the harness does not know a task.
        MergeError: If the harness is not installed, or fails.
    """
    names, folders = _tasks(tasks)
    lm_eval = _harness()
    source = resolve(model, token=token)
    refuse_gguf([source])
    arguments = _model_arguments(source, base_model, dtype, token)
    # Indexing all tasks of the harness is slow, and skipped if only task files are asked for.
    manager = lm_eval.tasks.TaskManager(
        include_path=[str(folder) for folder in folders] or None,
        include_defaults=len(names) > len(set(tasks) & {task for task in tasks if _is_file(task)}),
    )
    unknown = [name for name in names if name not in {*manager.all_tasks, *manager.all_groups, *manager.all_tags}]
    if unknown:
        raise ArgumentError(
            f"lm-evaluation-harness {lm_eval.__version__} knows no task {unknown[0]!r}. `lm_eval ls tasks` lists all; "
            f"of the paper's there are {', '.join(PAPER_TASKS)}."
        )
    try:
        results = lm_eval.simple_evaluate(
            model="hf",
            model_args=arguments,
            tasks=names,
            batch_size=batch_size,
            device=device,
            task_manager=manager,
            log_samples=False,
            bootstrap_iters=0,  # standard errors are not recorded
        )
    except (OSError, ValueError, RuntimeError) as error:  # no network, no such data, not enough memory, ...
        raise MergeError(f"lm-evaluation-harness failed on {', '.join(names)}: {error}") from error
    record = EvaluationRecord(
        models={MERGED: "merged"}, commands=[_command(source, arguments, names, folders, batch_size)]
    )
    if results is not None:  # the harness returns results on the main process only
        counts = {name: entry["effective"] for name, entry in results.get("n-samples", {}).items()}
        record.scores = [
            Score(MERGED, name, metrics, n_samples=counts.get(name, 0))
            for name, values in results["results"].items()
            if (metrics := _metrics(values))
        ]
    return record


def _tasks(tasks: Sequence[str]) -> tuple[list[str], list[Path]]:
    """Return the harness's names of the tasks, and the folders of the task files."""
    names, folders = [], []
    for task in tasks:
        if not _is_file(task):
            names.append(PAPER_TASKS.get(task.lower().replace("_", "-"), task))
            continue
        path = Path(task).expanduser()
        names.append(_task_name(path))
        folders.append(path.resolve().parent)
    return names, list(dict.fromkeys(folders))


def _is_file(task: str) -> bool:
    return task.endswith((".yaml", ".yml"))


def _task_name(path: Path) -> str:
    """Read the name of the task or group from a task file."""
    import yaml

    if not path.is_file():
        raise ArgumentError(f"The task file {str(path)!r} does not exist.")
    # `compose` builds no objects; loading would fail on tags of the harness such as !function.
    nodes = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    entries = {key.value: value.value for key, value in getattr(nodes, "value", [])}
    name = entries.get("task", entries.get("group"))
    if not isinstance(name, str):
        raise ArgumentError(f"The task file {str(path)!r} has no line `task: NAME`.")
    return name


def _harness() -> Any:
    """Import the harness, which is optional and slow to import."""
    try:
        import lm_eval
        import lm_eval.tasks
    except ImportError as error:
        raise MergeError(f"Tasks of lm-evaluation-harness need it installed: {_INSTALL}") from error
    return lm_eval


def _model_arguments(source: Source, base_model: str | None, dtype: str, token: str | None) -> dict[str, str]:
    """Return the harness's `model_args` for a model or an adapter."""
    if source.kind == "full":
        return {"pretrained": source.path, "dtype": dtype}
    return {"pretrained": whole_model(source.path, base_model, token), "peft": source.path, "dtype": dtype}


def _command(
    source: Source, arguments: Mapping[str, str], names: Sequence[str], folders: Sequence[Path], batch_size: int
) -> str:
    """Return the equivalent command, with folder names instead of paths, because the record is pushed to the Hub."""
    shown = {key: f"./{Path(value).name}" if Path(value).is_dir() else value for key, value in arguments.items()}
    if source.repo_id is not None:
        shown["peft" if "peft" in shown else "pretrained"] = source.repo_id
    parts = ["lm_eval", "--model", "hf", "--model_args", ",".join(f"{key}={value}" for key, value in shown.items())]
    parts += ["--tasks", ",".join(names), "--batch_size", str(batch_size)]
    for folder in folders:
        parts += ["--include_path", f"./{folder.name}"]
    return shlex.join(parts)


def _metrics(values: Mapping[str, Any]) -> dict[str, float]:
    """Convert `{"acc,none": 0.5}` to `{"acc": 0.5}`; a filter other than `none` stays in the name."""
    metrics = {}
    for key, value in values.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value):
            continue  # the task's alias, and standard errors that were not estimated ("N/A")
        name, _, kind = key.partition(",")
        if name == "sample_len":
            continue  # the number of samples, which `Score.n_samples` has
        metrics[name if kind in ("", "none") else f"{name}_{kind}"] = float(value)
    return metrics
