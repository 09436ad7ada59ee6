"""
Make a control for a benchmark of fitted merges: training on the same prompts, with the same experts, without a fit.

    python scripts/distil_control.py KIND --base BASE --output-dir OUT --calibration EXPERT=FILE ... --steps 100

`all` trains all weights that the experts changed, from their linear merge or another model (`--start`); `lora` a new
LoRA of the base, with factors drawn as PEFT draws them. Both lower KL(expert || merge).

`adamerging` and `samerging` train one coefficient for every expert and tensor, from the linear merge: as AdaMerging
(2310.02575) for predictions of little entropy, without asking the experts; as SAMerging (2512.21288) for KL at a
temperature of 2, by sharpness-aware steps. SAMerging's steps are adaptive (coefficients count by their size); as all
are alike at first, the radius here is its 0.07 times 1/N. `random` is SAMerging with random directions in the place of
the experts' updates of the blocks, each as long as the update it stands for: what any directions would give.

Prompts, optimiser and choice of the best point by held-out distance are those of the package's refinement
(`--refine`), from another start.
"""

from __future__ import annotations

import argparse
import math
import resource
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_frmerge import MergingArguments
from hf_frmerge.calibration.blocks.blockwise_model import Outputs
from hf_frmerge.calibration.blocks.matrices import is_linear
from hf_frmerge.calibration.blocks.weights import WeightReader
from hf_frmerge.calibration.calibrate import fit_settings
from hf_frmerge.calibration.fits.sweep_state import SweepState
from hf_frmerge.calibration.inputs import batches_of, fitted_and_held_out, open_model, prompts_of
from hf_frmerge.calibration.refinement.corrected_merge import CorrectedMerge, corrections_to_refine, read_start
from hf_frmerge.calibration.refinement.expert_updates import ExpertUpdates, coefficients_to_refine
from hf_frmerge.calibration.refinement.losses import row_losses
from hf_frmerge.calibration.refinement.refine import Refinement, RefineOptions
from hf_frmerge.calibration.sweep import FittedBlock, Sweep
from hf_frmerge.kernels.load import load_kernels
from hf_frmerge.merging.arguments.values import as_shares
from hf_frmerge.merging.engine.processes import Processes
from hf_frmerge.merging.planning.build_plan import build_plan

LEARNING_RATES = {"all": 3e-5, "lora": 1e-3, "adamerging": 1e-2, "samerging": 1e-2, "random": 1e-2}
RHO = 0.07  # of SAMerging


def main() -> None:
    args = parse_args()
    sweep = run_experts(args)
    start = read_start(sweep.state) if args.start is None else read_model(args.start)
    blocks = [FittedBlock({}, {}) for _ in sweep.state.model.blocks]
    if args.kind == "all":
        corrections = corrections_to_refine(sweep.state, start, blocks, "dense")
    elif args.kind == "lora":
        corrections = fresh_lora(sweep, start, args.rank, args.seed)
    else:
        corrections = coefficients_to_refine(sweep.state, start, blocks)
    if args.kind == "random":
        sweep.state.reader = RandomDirections(sweep.state, args.seed)
    rate = args.learning_rate or LEARNING_RATES[args.kind]
    rho = RHO / sweep.state.n_experts if args.kind in ("samerging", "random") else 0.0
    options = RefineOptions(args.steps, loss_of(args.kind), rate, args.batch_size, args.seed, rho)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    progress = args.output_dir / "progress.safetensors"
    progress.unlink(missing_ok=True)
    best = Refinement(sweep, start, corrections, options).run(progress)
    if best is None:
        raise SystemExit("The loss is not finite: choose a smaller --learning-rate.")
    progress.unlink()
    print(f"best at step {best.step}: distances {best.distances}")
    with torch.no_grad():
        merge = CorrectedMerge(sweep.state, start, best.corrections, ExpertUpdates(sweep.state))
        save(args, {name: merge.weight(name) for name in start})
    print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").strip().splitlines()[0])
    parser.add_argument("kind", choices=LEARNING_RATES, help="what is trained")
    parser.add_argument("--base", required=True, help="folder of the base model")
    parser.add_argument("--calibration", nargs="+", required=True, metavar="EXPERT=FILE", help="experts and prompts")
    parser.add_argument("--prompts", type=int, default=64, help="prompts an expert")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--start", type=Path, help="all: model to begin with, as a fitted merge")
    parser.add_argument("--learning-rate", type=float, help=f"default: {LEARNING_RATES}")
    parser.add_argument("--batch-size", type=int, default=8, help="prompts a step")
    parser.add_argument("--rank", type=int, default=16, help="of the fresh LoRA")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--output-dir", type=Path, required=True)
    args = parser.parse_args()
    if args.start is not None and args.kind != "all":
        parser.error("--start goes with `all`: the other kinds count from the base or the linear merge.")
    return args


def run_experts(args: argparse.Namespace) -> Sweep:
    """Run experts and start over the prompts that a fit would have, and fit nothing."""
    scale = 0.0 if args.kind == "lora" else 1.0  # the base alone, or the linear merge
    sweep = begin_sweep(args, method="linear", scale=scale)
    for index in range(len(sweep.state.model.blocks)):
        sweep.fit_block(index, FittedBlock({}, {}))
    return sweep


def begin_sweep(args: argparse.Namespace, *, method: str, scale: float = 1.0) -> Sweep:
    """Return the sweep of a fit that starts from a merge of deltas, before its first block."""
    calibration = dict(item.split("=", 1) for item in args.calibration)
    merging = MergingArguments(
        output_dir="sweep", method=method, space="deltas", scale=scale, adapter_output="merged",
        num_calibration_samples=args.prompts, calibration_batch_size=args.batch_size, seed=args.seed,
    )  # fmt: skip
    plan = build_plan(list(calibration), merging, None, args.base)
    model = open_model(plan)
    prompts = prompts_of(plan, model, calibration, AutoTokenizer.from_pretrained(args.base))(Processes(alone=True))
    batches = batches_of(plan, model, *fitted_and_held_out(plan, prompts))
    options, is_full = fit_settings(plan)
    reader = WeightReader(plan, load_kernels("cpu"), model)
    sweep = Sweep(model, reader, batches, as_shares(plan.weights), options, is_full=is_full)
    sweep.begin()
    return sweep


def read_model(folder: Path) -> dict[str, Tensor]:
    """Return the weights of a model, by parameters, float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def loss_of(kind: str) -> Callable[[Outputs, Outputs], Tensor]:
    """Return what a control lowers, for every prediction."""
    losses = {"adamerging": entropy, "samerging": softened_kl, "random": softened_kl}
    return losses.get(kind, partial(row_losses, loss="kl"))


def entropy(merged: Outputs, _expert: Outputs) -> Tensor:
    """Return the entropies of the merge's predictions."""
    log_q_RV = torch.log_softmax(merged.values, dim=-1)
    return -(log_q_RV.exp() * log_q_RV).sum(dim=-1)


def softened_kl(merged: Outputs, expert: Outputs) -> Tensor:
    """Return KL(expert || merge) of the predictions at a temperature of 2."""
    return row_losses(*(Outputs(outputs.values / 2, outputs.is_logits) for outputs in (merged, expert)), loss="kl")


class RandomDirections:
    """
    A reader of weights in whose place of every expert's update of a block stands a random direction of its length.

    Weights outside the blocks, of which experts' predictions are made, are the experts' own.

    Args:
        state: What the experts' weights are read by.
        seed: Of the directions, which are drawn again whenever they are asked for: all of them are a whole model.
    """

    def __init__(self, state: SweepState, seed: int) -> None:
        self._state, self._reader, self._seed = state, state.reader, seed
        self._names = {name: number for number, name in enumerate(self._reader.tensors)}
        self._lengths: dict[tuple[int, str], Tensor] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reader, name)

    def factors(self, index: int, parameter: str) -> tuple[Tensor, Tensor] | None:
        """Return factors of what an adapter adds outside the blocks; a random direction has none."""
        return None if self._is_random(parameter) else self._reader.factors(index, parameter)

    def expert(self, index: int, parameter: str) -> Tensor:
        """Return an expert's values, or the base's plus a random direction."""
        if not self._is_random(parameter):
            return self._reader.expert(index, parameter)
        base = self._reader.base(parameter)
        assert base is not None
        if (index, parameter) not in self._lengths:
            self._lengths[index, parameter] = (self._reader.expert(index, parameter) - base).norm()
        generator = torch.Generator().manual_seed(self._seed + 1_000_003 * index + self._names[parameter])
        direction = torch.randn(base.shape, generator=generator)
        return base + direction * (self._lengths[index, parameter] / direction.norm())

    def _is_random(self, parameter: str) -> bool:
        in_block = any(parameter.startswith(f"{block}.") for block in self._state.model.blocks)
        return in_block and self._reader.is_merged(parameter)


def fresh_lora(sweep: Sweep, start: dict[str, Tensor], rank: int, seed: int) -> dict[str, Tensor]:
    """Return new factors of every linear layer of the blocks: uniform in ±1/sqrt(inputs) behind it, zero before."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for block in sweep.state.model.blocks:
        for name, module in sweep.state.model.block(block).named_modules():
            parameter = f"{block}.{name}.weight"
            if is_linear(module) and sweep.state.reader.is_merged(parameter):
                rows, columns = start[parameter].shape
                down = torch.rand(rank, columns, generator=generator) * 2 - 1
                factors[f"{parameter}.up"] = torch.zeros(rows, rank)
                factors[f"{parameter}.down"] = down / math.sqrt(columns)
    return factors


def save(args: argparse.Namespace, weights: dict[str, Tensor]) -> None:
    """Save the model as merges are saved, in the dtype of the base."""
    model = AutoModelForCausalLM.from_pretrained(args.base, dtype="auto")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    model.save_pretrained(args.output_dir)


if __name__ == "__main__":
    main()
