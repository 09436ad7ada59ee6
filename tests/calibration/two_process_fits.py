"""Fits that test_processes.py runs in its own process, and once more on two under torchrun."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from hf_frmerge import FisherRaoMerger, MergingArguments
from hf_frmerge.calibration.fits.block_fit import BlockFit
from hf_frmerge.calibration.sweep import Sweep
from hf_frmerge.errors import MergeError, NonFiniteError
from hf_frmerge.merging.engine.processes import Processes

VOCABULARY, LENGTH, N_PROMPTS, N_EXPERTS = 40, 12, 20, 3

FITS: dict[str, dict[str, Any]] = {
    "fit": {"method": "linear"},
    "one-fits": {"method": "linear", "n_prompts": (4, 0, 0)},  # the other process has only what is held out
    "mixture": {"method": "linear", "family": "mixture"},
    "regmean": {"method": "regmean"},
    "regmean++": {"method": "regmean++"},
    "fisher": {"method": "fisher"},
    "own": {"method": "linear", "calibration": "self"},
    "refined": {"method": "linear", "refine_steps": 2},
    "mats": {"method": "mats", "max_iter": 3},
    "auto": {"method": "auto"},
    "auto-refined": {"method": "auto", "refine_steps": 2},
}

TABLES: dict[str, dict[str, Any]] = {
    "table": {"method": "linear", "space": "deltas", "scale": 0.2, "calibration_form": "table"},
    "whitened": {"method": "karcher", "space": "deltas", "fisher": "diagonal", "calibration_form": "auto"},
}


class Killed(Exception):
    """Stands for whatever ends a process."""


def prompts(expert: int, n_prompts: int) -> list[list[int]]:
    """Random tokens of different lengths, so that some places are padding."""
    rng = np.random.default_rng(expert)
    return [rng.integers(VOCABULARY, size=LENGTH - place % 3).tolist() for place in range(n_prompts)]


def fit(
    root: Path,
    out: Path,
    *,
    n_prompts: tuple[int, ...] = (N_PROMPTS,) * N_EXPERTS,
    calibration: Any = None,
    family: str = "dense",
    **options: Any,
) -> None:
    """Merge the family below `root`, with products in float32: rounded to bfloat16, a last digit becomes a third."""
    experts = [str(root / family / f"e{number}") for number in range(N_EXPERTS)]
    own = {expert: prompts(number, n) for number, (expert, n) in enumerate(zip(experts, n_prompts)) if n}
    args = MergingArguments(
        output_dir=str(out), max_calibration_length=LENGTH, num_calibration_samples=N_PROMPTS, disable_tqdm=True,
        calibration_batch_size=4, report_to="none", **({"calibration_form": "dense"} | options),
    )  # fmt: skip
    with patch("hf_frmerge.calibration.inputs._compute_dtype", lambda _: torch.float32):
        FisherRaoMerger(
            experts, args, base_model=str(root / family / "base"), calibration_dataset=calibration or own
        ).merge()


def fit_interrupted(root: Path, out: Path) -> list[list[int]]:
    """Fit one block, be interrupted and go on; return for every block after that whose weights were in memory."""
    fitted, fit_block = [], Sweep.fit_block

    def fit_one(self: Sweep, index: int, known: Any) -> Any:
        if known is None and fitted:
            raise Killed
        fitted.append(index)
        return fit_block(self, index, known)

    with patch.object(Sweep, "fit_block", fit_one), suppress(Killed, MergeError):
        fit(root, out, method="linear")
    with patch.object(BlockFit, "fit", autospec=True, side_effect=BlockFit.fit) as of_block:
        fit(root, out, method="linear", resume_from_checkpoint=True)
    fits = [call.args[0] for call in of_block.call_args_list]
    return [[expert for expert, weights in enumerate(one._experts) if isinstance(weights, dict)] for one in fits]


def main(root: Path) -> None:
    """Run everything on two processes, and write down what this one saw."""
    processes = Processes()
    assert processes.size == 2, "a test of two processes that runs on one proves nothing"
    with (
        patch("hf_frmerge.merging.engine.processes._SLICE", 500),  # Gram matrices have 576 elements
        patch("hf_frmerge.merging.engine.batches.BATCH_TENSORS", 1),  # so that both processes merge some
    ):
        for name, options in (FITS | TABLES).items():
            fit(root, root / "two" / name, **options)
    held = fit_interrupted(root, root / "two" / "resumed")
    error = ""
    fails = patch.object(BlockFit, "fit", side_effect=NonFiniteError("as in a bad prompt"))
    with fails if processes.rank else nullcontext():
        try:
            fit(root, root / "two" / "failed", method="linear")
        except MergeError as caught:
            error = str(caught)
    (root / f"rank{processes.rank}.json").write_text(json.dumps({"held": held, "error": error}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
