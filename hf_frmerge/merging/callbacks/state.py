"""State of a merge and result of each tensor, as callbacks read them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from hf_frmerge.merging.planning.plan import MergePlan


@dataclass(frozen=True)
class StepResult:
    """
    Result of one tensor.

    Args:
        name (`str`):
            Name of the tensor.
        action (`str`):
            `"merge"`, `"copy"` (not a floating-point tensor, or the same everywhere) or `"skip"` (copied because a
            callback asked for it).
        nbytes (`int`):
            Bytes of the tensor in the output.
        norms (`tuple[float, ...]`):
            Frobenius norm of the tensor in each expert (of its delta in delta space).
        norm_ratio (`float`):
            Norm of the merged tensor over the weighted mean of `norms`: below 1 where the merge shrank it.
        max_angle (`float`):
            Largest angle between two experts in any block, in radians.
        n_iter (`int`):
            Largest number of steps over the blocks.
        residual (`float`):
            Largest residual over the blocks, in radians.
        converged (`bool`):
            Whether all blocks reached the tolerance.
        ambiguous (`int`):
            Number of blocks without a preferred direction, which `on_ambiguous="linear"` decided.
        n_blocks (`int`, *optional*, defaults to `1`):
            Blocks in the tensor.
    """

    name: str
    action: Literal["merge", "copy", "skip"]
    nbytes: int
    norms: tuple[float, ...]
    norm_ratio: float
    max_angle: float
    n_iter: int
    residual: float
    converged: bool
    ambiguous: int
    n_blocks: int = 1


@dataclass
class MergeState:
    """
    Progress of a merge; one step is one tensor. The counterpart of `transformers.TrainerState`.

    Args:
        global_step (`int`):
            Tensors done.
        max_steps (`int`):
            Number of tensors.
        epoch (`float`):
            Share of the tensors done, in `[0, 1]`; reporting integrations read it under this name.
        bytes_done (`int`):
            Bytes of output done.
        bytes_total (`int`):
            Bytes of output in total.
        current_tensor (`str`, *optional*):
            Name of the tensor that began or ended last.
        n_not_converged (`int`):
            Merged tensors whose iteration did not reach `tol`.
        worst_residual (`float`):
            Largest residual of a merged tensor, in radians.
        sources (`list[dict]`):
            One entry per expert, and one for the base model: `id`, `revision` (resolved commit), `weight`.
        log_history (`list[dict]`):
            Everything logged, with the step it was logged at.
        logging_steps (`int`):
            Copy of the argument, for reporting integrations.

    The other fields exist for reporting integrations and do not change in a merge (apart from `is_*_process_zero`).
    """

    global_step: int = 0
    max_steps: int = 0
    epoch: float = 0.0
    bytes_done: int = 0
    bytes_total: int = 0
    current_tensor: str | None = None
    n_not_converged: int = 0
    worst_residual: float = 0.0
    sources: list[dict[str, str | float | None]] = field(default_factory=list)
    log_history: list[dict[str, float | int | str]] = field(default_factory=list)
    logging_steps: int = 500
    is_world_process_zero: bool = True
    is_local_process_zero: bool = True
    total_flos: float = 0
    is_hyper_param_search: bool = False
    best_metric: float | None = None
    trial_name: str | None = None
    trial_params: dict[str, str | float | int | bool] | None = None

    def start(self, plan: MergePlan) -> None:
        """Reset all counts and set the totals of a plan. A resumed merge counts its finished tensors again."""
        self.global_step = self.bytes_done = self.n_not_converged = 0
        self.epoch = self.worst_residual = 0.0
        self.max_steps = len(plan.steps)
        self.bytes_total = sum(step.nbytes for step in plan.steps)
        self.logging_steps = plan.args.logging_steps
        self.sources = [
            {"id": model.spec, "revision": model.source.commit, "weight": weight}
            for model, weight in zip(plan.models, [*plan.weights, None])
        ]

    def record(self, result: StepResult) -> None:
        """Add one finished tensor to the counts, whether it was merged, copied or skipped."""
        self.current_tensor = result.name
        self.global_step += 1
        self.bytes_done += result.nbytes
        self.epoch = self.global_step / max(self.max_steps, self.global_step)
        if result.action == "merge":
            self.n_not_converged += not result.converged
            self.worst_residual = max(self.worst_residual, result.residual)
