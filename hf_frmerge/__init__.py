"""Merge fine-tuned language models by the weighted Karcher mean on the Fisher–Rao manifold."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_frmerge.comparison.comparison import MergeComparison
    from hf_frmerge.merger import FisherRaoMerger
    from hf_frmerge.merging.arguments.expert_arguments import ExpertArguments
    from hf_frmerge.merging.arguments.merging_arguments import MergingArguments
    from hf_frmerge.merging.callbacks.callback import MergeCallback, MergeControl, PrinterCallback
    from hf_frmerge.merging.callbacks.collapse_guard import CollapseGuardCallback
    from hf_frmerge.merging.callbacks.progress import ProgressCallback
    from hf_frmerge.merging.callbacks.state import MergeState
    from hf_frmerge.search.weight_search import WeightSearch
    from hf_frmerge.training.merge_checkpoints import MergeCheckpointsCallback
    from hf_frmerge.training.perturb_task_vector import TaskVectorPerturbationCallback
    from hf_frmerge.weighting.perturb_and_merge import TaskLosses

__version__ = "0.1.0"

# Public name -> module that defines it. Resolved on first use, so that importing the package costs nothing.
_PUBLIC = {
    "FisherRaoMerger": "hf_frmerge.merger",
    "ExpertArguments": "hf_frmerge.merging.arguments.expert_arguments",
    "MergingArguments": "hf_frmerge.merging.arguments.merging_arguments",
    "MergeState": "hf_frmerge.merging.callbacks.state",
    "MergeControl": "hf_frmerge.merging.callbacks.callback",
    "MergeCallback": "hf_frmerge.merging.callbacks.callback",
    "ProgressCallback": "hf_frmerge.merging.callbacks.progress",
    "MergeComparison": "hf_frmerge.comparison.comparison",
    "PrinterCallback": "hf_frmerge.merging.callbacks.callback",
    "MergeCheckpointsCallback": "hf_frmerge.training.merge_checkpoints",
    "TaskVectorPerturbationCallback": "hf_frmerge.training.perturb_task_vector",
    "TaskLosses": "hf_frmerge.weighting.perturb_and_merge",
    "WeightSearch": "hf_frmerge.search.weight_search",
    "CollapseGuardCallback": "hf_frmerge.merging.callbacks.collapse_guard",
}

__all__ = [
    "CollapseGuardCallback",
    "ExpertArguments",
    "FisherRaoMerger",
    "MergeCallback",
    "MergeCheckpointsCallback",
    "MergeComparison",
    "MergeControl",
    "MergeState",
    "MergingArguments",
    "PrinterCallback",
    "ProgressCallback",
    "TaskLosses",
    "TaskVectorPerturbationCallback",
    "WeightSearch",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
