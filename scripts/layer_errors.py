"""
Print how far the hidden states of a merge are from the experts' behind every block: without data, and fitted.

    python scripts/layer_errors.py --base BASE --calibration EXPERT=FILE ... [--prompts 16] [--method karcher]

The error is that of the residual stream, relative to the expert's, `|h - h_e| / |h_e|`, each token by itself, and the
median over tokens: a few have huge activations. On prompts that the fit has seen it says how well layers can do
what is asked of them; on others, what of that is general. The difference is what more prompts could give.
"""

from __future__ import annotations

import argparse

import torch
from distil_control import begin_sweep
from torch import Tensor

from hf_frmerge.calibration.sweep import Sweep


def main() -> None:
    args = parse_args()
    torch.set_num_threads(1)
    sweep = begin_sweep(args, method=args.method)
    print("| block | without data, held out | fitted, its own prompts | fitted, held out |")
    print("|---:|---:|---:|---:|")
    if sweep.head is not None:
        sweep.fit_head()
    for index in range(len(sweep.state.model.blocks)):
        sweep.fit_block(index)
        found = errors(sweep)
        print(f"| {index + 1} | {' | '.join(f'{error:.3f}' for error in found)} |", flush=True)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").strip().splitlines()[0])
    parser.add_argument("--base", required=True, help="folder of the base model")
    parser.add_argument("--calibration", nargs="+", required=True, metavar="EXPERT=FILE", help="experts and prompts")
    parser.add_argument("--prompts", type=int, default=16, help="prompts an expert")
    parser.add_argument("--method", default="karcher", help="the merge without data")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seed", type=int, default=42)
    return parser.parse_args()


def errors(sweep: Sweep) -> tuple[float, float, float]:
    """Return the errors of the start on held-out prompts, and of the fit on its own and on held-out ones."""
    state = sweep.state
    held_out = [b for b, batch in enumerate(state.batches) if batch.is_held_out]
    fitted = [b for b, batch in enumerate(state.batches) if not batch.is_held_out]
    return (
        median_error(sweep, {b: sweep.start[b] for b in held_out}),
        median_error(sweep, {b: state.merged[b] for b in fitted}),
        median_error(sweep, {b: state.merged[b] for b in held_out}),
    )


def median_error(sweep: Sweep, hidden: dict[int, Tensor]) -> float:
    """Return the median over tokens of the relative error of some batches' hidden states."""
    found = []
    for b, hidden_BTH in hidden.items():
        batch = sweep.state.batches[b]
        merged_TH, expert_TH = batch.tokens(hidden_BTH), batch.tokens(sweep.state.expert[b])
        found.append((merged_TH - expert_TH).norm(dim=1) / expert_TH.norm(dim=1))
    return float(torch.cat(found).median())


if __name__ == "__main__":
    main()
