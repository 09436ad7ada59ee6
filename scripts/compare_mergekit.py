"""
Merge one family of float32 models with this package and with mergekit, and compare the results method by method.

    python scripts/compare_mergekit.py --mergekit-python ~/mergekit-venv/bin/python

mergekit (0.1.5 is what this was written for) stays in an environment of its own: a child process merges the same
tensors with `mergekit.merge_methods.api.merge_tensors`. Where a method draws at random, the child is handed our random
numbers, and equal magnitudes are ranked by position. What is compared is the relative error of every tensor, of the
weights and of the merged deltas; the exit code is 1 if an error of weights is above 1e-5. Each row says what had to be
set for both to mean the same.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from hf_frmerge.kernels.elementwise import key_of, uniforms
from hf_frmerge.merging.arguments.merging_arguments import MergingArguments
from hf_frmerge.merging.engine.outcomes import StepObserver
from hf_frmerge.merging.engine.processes import Processes
from hf_frmerge.merging.planning.build_plan import build_plan
from hf_frmerge.merging.run import run_merge

TOLERANCE = 1e-5
SEED = 11
SHAPES = {
    "model.embed_tokens.weight": (96, 48),
    "model.layers.0.self_attn.q_proj.weight": (48, 48),
    "model.layers.0.mlp.up_proj.weight": (80, 48),
    "model.layers.0.input_layernorm.weight": (48,),
    "lm_head.weight": (96, 48),
}
CONFIG = {"model_type": "llama", "hidden_size": 48, "num_attention_heads": 6, "head_dim": 8, "vocab_size": 96}

MERGEKIT = r"""
import json, sys
import torch
from safetensors.torch import load_file, save_file
from mergekit.merge_methods.api import merge_tensors

folder = sys.argv[1]
base, *experts = (load_file(f"{folder}/{name}/model.safetensors") for name in json.load(open(f"{folder}/models.json")))
draws = load_file(f"{folder}/draws.safetensors")
pending, by_chance = [], False

def bernoulli(probabilities):
    kept = (pending.pop(0).reshape(probabilities.shape) < probabilities.double()).to(probabilities.dtype)
    return kept / probabilities if by_chance else kept

torch.bernoulli = bernoulli
argsort = torch.argsort
torch.argsort = lambda values, **options: argsort(values, stable=True, **options)
for case in json.load(open(f"{folder}/cases.json")):
    by_chance, merged = case["by_chance"], {}
    some = experts[: case["n_experts"]]
    for name in base:
        pending[:] = [draws[f"{i} {name}"] for i in range(len(some))]
        tensors = [expert[name] for expert in some]
        tensors = [base[name], *tensors] if case["with_base"] else tensors
        parameters = dict(case["parameters"])
        if "weight" in parameters:
            parameters["weight"] = {i + case["with_base"]: w for i, w in enumerate(parameters["weight"])}
        index = 0 if case["with_base"] else None
        merged[name] = merge_tensors(tensors, case["theirs"], parameters=parameters, base_index=index).contiguous()
    save_file(merged, f"{folder}/theirs-{case['number']}.safetensors")
"""


@dataclass(frozen=True)
class Case:
    """
    One comparison.

    Attributes:
        ours: our method and its options.
        theirs: mergekit's method.
        parameters: its parameters; `weight` is one number for each expert.
        note: what was set for both to mean the same.
        by_chance: whether kept elements are divided by their own chance, which mergekit does not do.
    """

    ours: dict[str, Any]
    theirs: str
    parameters: dict[str, Any] = field(default_factory=dict)
    weights: tuple[float, ...] = (0.5, 0.3, 0.2)
    with_base: bool = True
    note: str = ""
    by_chance: bool = False


def cases() -> list[Case]:
    """Return every comparison."""
    three, two = (0.5, 0.3, 0.2), (0.7, 0.3)
    equal = (1 / 3,) * 3
    votes = {"weight": three, "normalize": True}
    return [
        Case({"method": "linear"}, "linear", {"weight": three}, with_base=False),
        Case({"method": "nuslerp"}, "nuslerp", {"weight": two}, two, with_base=False),
        Case({"method": "nuslerp", "space": "deltas"}, "nuslerp", {"weight": two}, two),
        Case({"method": "nuslerp", "space": "deltas", "block": "row"}, "nuslerp",
             {"weight": two, "nuslerp_flatten": False}, two, note="nuslerp_flatten=false is block=row"),
        Case({"method": "multislerp"}, "multislerp", {"weight": three}, with_base=False),
        Case({"method": "multislerp", "space": "deltas"}, "multislerp", {"weight": three}),
        Case({"method": "karcher"}, "karcher", {"max_iter": 100, "tol": 1e-9}, equal, with_base=False,
             note="equal weights, 100 steps"),
        Case({"method": "task_arithmetic", "scale": 0.4}, "task_arithmetic", {"weight": three, "lambda": 0.4}),
        Case({"method": "model_stock"}, "model_stock", {}, equal, note="equal weights"),
        Case({"method": "model_stock", "block": "row"}, "model_stock", {"filter_wise": True}, equal,
             note="filter_wise is block=row"),
        Case({"method": "ties", "density": 0.3, "scale": 0.7}, "ties", {**votes, "density": 0.3, "lambda": 0.7}),
        Case({"method": "dare_linear", "density": 0.6, "seed": SEED}, "dare_linear",
             {"weight": three, "density": 0.6, "rescale": False, "lambda": 1 / 0.6},
             note="our draws; divided by density, not to the old L1 norm"),
        Case({"method": "dare_ties", "density": 0.6, "seed": SEED}, "dare_ties",
             {**votes, "density": 0.6, "rescale": False, "lambda": 1 / 0.6}, note="the same; normalize"),
        Case({"method": "della", "density": 0.6, "epsilon": 0.2, "seed": SEED}, "della",
             {**votes, "density": 0.6, "epsilon": 0.2, "rescale": False}, by_chance=True,
             note="our draws; each divided by its own chance"),
        Case({"method": "breadcrumbs", "density": 0.3, "gamma": 0.02, "scale": 0.4}, "breadcrumbs",
             {"weight": three, "density": 0.3, "gamma": 0.02, "lambda": 0.4}),
        Case({"method": "sce", "density": 0.2}, "sce", {"select_topk": 0.2}, equal, note="equal weights"),
        Case({"method": "ram", "min_change": 0.05}, "ram", {"epsilon": 0.05}, equal, note="equal weights"),
    ]  # fmt: skip


def write_models(folder: Path) -> list[Path]:
    """Write a base and three experts of unequal distance to it, with a common part."""
    rng = np.random.default_rng(0)
    base = {name: rng.standard_normal(shape) * 0.2 for name, shape in SHAPES.items()}
    common = {name: rng.standard_normal(shape) for name, shape in SHAPES.items()}
    models = [base]
    models += [
        {name: x + size * (0.6 * common[name] + 0.8 * rng.standard_normal(x.shape)) for name, x in base.items()}
        for size in (0.08, 0.1, 0.15)
    ]
    folders = [folder / name for name in ("base", "one", "two", "three")]
    for path, tensors in zip(folders, models):
        path.mkdir()
        save_file({name: x.astype(np.float32) for name, x in tensors.items()}, path / "model.safetensors")
        (path / "config.json").write_text(json.dumps(CONFIG))
    (folder / "models.json").write_text(json.dumps([path.name for path in folders]))
    draws = {
        f"{i} {name}": uniforms(key_of(SEED, i, name), 0, int(np.prod(shape)))
        for i in range(3)
        for name, shape in SHAPES.items()
    }
    save_file(draws, folder / "draws.safetensors")
    return folders


def merge_all(folder: Path, models: list[Path], found: list[Case], mergekit: str) -> None:
    """Run every case with both."""
    told = []
    for number, case in enumerate(found):
        experts = [str(path) for path in models[1 : 1 + len(case.weights)]]
        args = MergingArguments(output_dir=str(folder / f"ours-{number}"), **case.ours)
        base = str(models[0]) if case.with_base else None
        run_merge(build_plan(experts, args, case.weights, base), StepObserver(), Processes())
        told.append({**vars(case), "number": number, "n_experts": len(experts)})
    (folder / "cases.json").write_text(json.dumps(told))
    subprocess.run([mergekit, "-c", MERGEKIT, str(folder)], check=True)


def errors(folder: Path, number: int, base: dict[str, np.ndarray]) -> tuple[float, float]:
    """Return the largest relative error of a tensor, of weights and of deltas."""
    ours = load_file(folder / f"ours-{number}" / "model.safetensors")
    theirs = load_file(folder / f"theirs-{number}.safetensors")
    wide = {name: (ours[name].astype(np.float64), x.astype(np.float64)) for name, x in theirs.items()}
    weights = max(np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in wide.values())
    deltas = max(np.linalg.norm(a - b) / np.linalg.norm(b - base[name]) for name, (a, b) in wide.items())
    return float(weights), float(deltas)


def compare(mergekit: str) -> bool:
    """Print the table; return whether all errors are small enough."""
    with tempfile.TemporaryDirectory() as name:
        folder, found = Path(name), cases()
        models = write_models(folder)
        merge_all(folder, models, found, mergekit)
        base = load_file(models[0] / "model.safetensors")
        print("| ours | mergekit | error of weights | of deltas | set alike |\n|---|---|---|---|---|")
        worst = 0.0
        for number, case in enumerate(found):
            weights, deltas = errors(folder, number, base)
            worst = max(worst, weights)
            ours = " ".join(f"{option}={value}" for option, value in case.ours.items())
            print(f"| {ours.removeprefix('method=')} | {case.theirs} | {weights:.1e} | {deltas:.1e} | {case.note} |")
    return worst <= TOLERANCE


def main() -> None:
    """Compare from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mergekit-python", required=True, help="python of an environment with mergekit")
    sys.exit(not compare(parser.parse_args().mergekit_python))


if __name__ == "__main__":
    main()
