"""
Merge random matrices with this package and with the authors' own code, and print how far apart the results are.

    git clone https://github.com/Tobeginwith/DC-Merge      # and so on; see --help
    python scripts/compare_authors_code.py --dc-merge DC-Merge --ortho-merge OrthoMerge

None of that code is a package: its functions are imported from a clone that you name, and run in this process on
tensors, so neither models nor a GPU are needed. What a file imports beside them (data sets, evaluation, logging) is
replaced by empty modules, and `.cuda()` leaves a tensor where it is. So look at a clone before you name it.

Every row is a method on one kind of experts, with what has to be set for both to mean the same, or why they cannot
agree. The exit code is 1 if the two are farther apart than a tolerance where they should agree. `--dtype` is what
their code is given, where it does not choose for itself; ours computes as it always does.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from agreement import Row, by_rule, print_table
from torch import Tensor, nn

from hf_frmerge.calibration.baselines.mats import conjugate_gradients
from hf_frmerge.geometry.lowrank import Factors
from hf_frmerge.methods.spectral.decision import Spectral
from hf_frmerge.methods.spectral.inputs import SpectralOptions

ROWS, COLS, RANK = 96, 60, 16  # COLS is a multiple of 2 and 3; RANK is what DC-Merge's code for adapters has
NAME = "layers.0.self_attn.q_proj.weight"


@dataclass(frozen=True)
class Family:
    """
    Experts to merge.

    Attributes:
        name: what they are.
        deltas: `(N, m, n)`.
        left, right: `(N, m, r)` and `(N, r, n)`, their factors, if they are of low rank.
    """

    name: str
    deltas: Tensor
    left: Tensor | None = None
    right: Tensor | None = None

    @property
    def n(self) -> int:
        """Number of experts."""
        return len(self.deltas)

    @property
    def is_full(self) -> bool:
        """Whether they are of full rank."""
        return self.left is None


def families(dtype: torch.dtype) -> list[Family]:
    """Return two and three experts, of full rank with a common part, and of low rank without any."""
    made = []
    for n in (2, 3):
        common = 0.01 * torch.randn(ROWS, COLS, dtype=dtype)
        made.append(Family(f"{n} of full rank", common + 0.02 * torch.randn(n, ROWS, COLS, dtype=dtype)))
        left, right = torch.randn(n, ROWS, RANK, dtype=dtype), 0.01 * torch.randn(n, RANK, COLS, dtype=dtype)
        made.append(Family(f"{n} of rank {RANK}", left @ right, left, right))
    return made


class Absent(ModuleType):
    """Stands for a module that a file imports for other things than what is called here; its names are all None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def load(clone: Path, file: str, *absent: str) -> ModuleType:
    """
    Import one file of a clone.

    Args:
        clone: Path of the clone.
        file: Path of the file in it.
        absent: Names of modules that are replaced by empty ones meanwhile.

    Raises:
        SystemExit: If there is no such file.
    """
    root = clone.resolve()
    path = root / file
    if not path.is_file():
        raise SystemExit(f"{clone} has no {file}. Name a clone of the repository that --help names.")
    spec = spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    code = module_from_spec(spec)
    hidden = {name: sys.modules[name] for name in absent if name in sys.modules}
    with patch.object(sys, "path", [str(path.parent), str(root), *sys.path]):
        sys.modules.update({name: Absent(name) for name in absent})
        try:
            spec.loader.exec_module(code)
        finally:  # several clones have a module of the same name
            for name in [n for n, m in sys.modules.items() if isinstance(m, Absent) or _is_below(root, m)]:
                del sys.modules[name]
            sys.modules.update(hidden)
    return code


def _is_below(root: Path, module: ModuleType) -> bool:
    spec = getattr(module, "__spec__", None)
    places = [spec.origin, *(spec.submodule_search_locations or ())] if spec else []
    return any(root in Path(place).parents for place in places if place)


def on_cpu(call: Callable[[], Any]) -> Any:
    """Call a function with `Tensor.cuda` doing nothing."""
    with patch.object(torch.Tensor, "cuda", lambda tensor: tensor):
        return call()


def swudi(clone: Path, family: Family) -> Iterator[Row]:
    code = load(clone, "LLaMA-Factory/swudi_aswudi.py")

    def layer(weight: Tensor) -> nn.Linear:
        module = nn.Linear(COLS, ROWS, bias=False)
        module.weight = nn.Parameter(weight, requires_grad=False)
        return module

    def theirs() -> Tensor:
        base, experts = layer(torch.zeros_like(family.deltas[0])), [layer(delta) for delta in family.deltas]
        options = {"exp_time": 300.0, "truncate_rank_ratio": 0.85, "merge_device": "cpu", "progress": False}
        return code.swudi_merge(base, experts, [], **options)["weight"]

    reason = "descent_steps 300, density 0.85; where that is no whole number of directions theirs rounds up, ours down"
    yield Row("swudi", family.name, theirs, by_rule("swudi", family.deltas), reason)


def wudi(clone: Path, family: Family) -> Iterator[Row]:
    code = load(clone, "vit/wudi_main.py", "wandb", "task_vectors", "eval", "args")
    deltas = 0.1 * family.deltas  # of a size that its steps of 1e-5 can move

    def theirs(steps: int) -> Callable[[], Tensor]:
        return lambda: on_cpu(lambda: code.get_redundant_task_vector(NAME, deltas.clone(), iter_num=steps))

    ours = by_rule("swudi", deltas)
    reason = "300 steps of Adam, which are of one size whatever the slope; ours are of gradient descent"
    yield Row("swudi", family.name, theirs(300), ours, reason, agree=False)
    if family.is_full:
        to_the_end = by_rule("swudi", deltas, density=1.0, descent_steps=1e9)
        reason = "the minimum: 4,000 of their steps, descent_steps 1e9, density 1"
        yield Row("swudi", family.name, theirs(4000), to_the_end, reason)


def ortho_merge(clone: Path, family: Family) -> Iterator[Row]:
    code = load(clone, "merge/OrthoMerge_G_TA.py")
    base = torch.randn(ROWS, COLS, generator=torch.Generator().manual_seed(1))

    def theirs(base: Tensor, deltas: Tensor) -> Callable[[], Tensor]:
        def merge() -> Tensor:  # as their main does, with their weight of the rests
            turned = [code.orthogonal_procrustes_torch_right(base + delta, base) for delta in deltas]
            skews = [code.cayley_to_skew(rotation) for rotation in turned]
            rest = sum(base + d - base @ code.cayley_from_skew(skew) for d, skew in zip(deltas, skews))
            return base @ code.cayley_from_skew(code.merge_cayley_Q_list(skews)) + 0.2 * rest - base

        return merge

    deltas = family.deltas.float()  # they go to float32 themselves
    ours = by_rule("ortho_merge", deltas, base=base)
    yield Row("ortho_merge", family.name, theirs(base, deltas), ours, "their -G with task arithmetic of the rests")
    wide = deltas.transpose(1, 2).contiguous()
    yield Row(
        "ortho_merge",
        f"{family.name}, fewer rows than columns",
        theirs(base.T.contiguous(), wide),
        by_rule("ortho_merge", wide, base=base.T.contiguous()),
        "what the base maps to zero is turned at random by theirs, and not at all by ours",
        agree=False,
    )


def res_merge(clone: Path, family: Family) -> Iterator[Row]:
    code = load(clone, "resmerge-main.py")

    def theirs(deltas: Tensor, name: str = NAME) -> Callable[[], Tensor]:
        options = {"rank_topk": 1, "beta_min": 0.7, "beta_max": 1.0, "head_ratio_budget": 0.2, "svd_driver": None}

        def merge() -> Tensor:
            with patch.object(code, "MERGE_DTYPE", deltas.dtype):
                base, cpu = torch.zeros_like(deltas[0]), torch.device("cpu")
                return code.merge_one_tensor_resmerge(name, base, list(deltas), device=cpu, **options)

        return merge

    ours = by_rule("res_merge", family.deltas)
    yield Row("res_merge", family.name, theirs(family.deltas), ours, "same")
    if family.is_full:
        apart = family.deltas.clone()
        apart[0] -= 0.5 * apart[1:].sum(0)
        reason = "same: they agree less than unrelated ones would, so the rest is their mean"
        yield Row("res_merge", f"{family.name}, at odds", theirs(apart), by_rule("res_merge", apart), reason)
        if family.n == 3:
            idle = torch.stack([family.deltas[0], family.deltas[0] + 0.5 * family.deltas[1], torch.zeros(ROWS, COLS)])
            reason = "theirs counts one that changed nothing as at right angles to the others, ours leaves it out"
            name = f"{family.name}, two alike and one without change"
            yield Row("res_merge", name, theirs(idle), by_rule("res_merge", idle), reason, agree=False)
        reason = "called neither attention nor MLP, a matrix is no longer for agreement in theirs"
        other = theirs(family.deltas, "layers.0.mixer.weight")
        yield Row("res_merge", f"{family.name}, of another name", other, ours, reason, agree=False)


def dc_merge(clone: Path, family: Family) -> Iterator[Row]:
    file = "vision_fft_merge/src/utils/DC_utils.py" if family.is_full else "vision_lora_merge/merging_functions.py"
    code, share = load(clone, file), 0.02

    def theirs() -> Tensor:
        if family.is_full:
            config = SimpleNamespace(DATASETS=range(family.n), device="cpu")
            return code.dc_merge([SimpleNamespace(vector={NAME: delta}) for delta in family.deltas], config)[NAME]
        return code.dc_merge({NAME: list(family.deltas)}, smoothing_strategy="avg")[NAME]

    def with_share() -> Tensor:
        keep = code.keep_topk_percent
        with patch.object(code, "keep_topk_percent", lambda parts, _: keep(parts, share)):
            return theirs()

    kind = "their code for full models" if family.is_full else "their code for adapters, smoothing by the mean"
    shared = by_rule("dc_merge", family.deltas, density=share)
    yield Row("dc_merge", family.name, with_share, shared, f"{kind}; density {share}, set in theirs too")
    reason = "theirs keeps 0.1 % also where that are fewer elements than an expert has directions"
    yield Row("dc_merge", family.name, theirs, by_rule("dc_merge", family.deltas), reason, agree=False)


def core_space(clone: Path, family: Family) -> Iterator[Row]:
    if family.left is None or family.right is None:
        return
    code = load(clone, "task_merger.py", "utils", "einops")
    # The one thing that KnOTS asks einops for: to cut what stands side by side apart.
    code.einops.rearrange = lambda joined, _, b: torch.stack(joined.chunk(b, dim=1))
    merger, n = code.MatrixPerLayerMerger, family.n
    pairs = [{NAME: pair} for pair in zip(family.right, family.left)]

    def in_cores(merge: Callable[[list[Tensor]], Tensor]) -> Callable[[], Tensor]:
        def merged() -> Tensor:
            cores, left, right = merger.get_core_matrices(SimpleNamespace(cache={}), pairs, NAME, {})
            return left @ merge(cores).double() @ right

        return merged

    def ties(parts: list[Tensor]) -> Tensor:
        count = parts[0].numel()
        return merger._process_ties(None, parts, topK=(int(0.2 * count) - 0.5) / count)

    def knots() -> Tensor:
        left, values, rights = merger.get_knots_components(None, list(family.deltas))
        return left * values @ ties(rights)

    def ours_of_factors() -> Tensor:
        factors = [Factors(left.numpy(), right.numpy()) for left, right in zip(family.left, family.right)]
        left, right, scale = Spectral("core_ties", (1 / n,) * n, 1.0, SpectralOptions(0.2)).merge_factors(factors)
        return torch.from_numpy(scale * left @ right)

    reason = "density 0.2, theirs a tenth; theirs keeps one element more than its share, and knows no alpha / r"
    yield Row("core_ties", family.name, in_cores(ties), ours_of_factors, reason)
    tsv_m, iso_c = (by_rule(method, family.deltas) for method in ("tsv_m", "iso_c"))
    in_tsv = in_cores(lambda cores: merger.get_tsv_delta_w(None, cores))
    yield Row("tsv_m", family.name, in_tsv, tsv_m, "theirs in cores, ours of the whole matrices")
    in_iso = in_cores(lambda cores: code.isotropize_matrix(sum(cores)))
    yield Row("iso_c", family.name, in_iso, iso_c, "theirs in cores, ours of the whole matrices")
    yield Row("knots", family.name, knots, by_rule("knots", family.deltas), "as core_ties, of the whole matrices")


def ace(clone: Path, family: Family) -> Iterator[Row]:
    code = load(clone, "src/merge/strategy.py")

    def theirs(deltas: Tensor) -> Callable[[], Tensor]:
        experts = [SimpleNamespace(task_vector_param_dict={NAME: delta.double()}) for delta in deltas]

        def merge() -> Tensor:
            default = torch.get_default_dtype()
            torch.set_default_dtype(torch.float64)
            try:
                return code.MergeStrategy([NAME], experts, "cpu").ace_merging(eps=1e-5, k_frac=0.3)[NAME]
            finally:
                torch.set_default_dtype(default)

        return merge

    def of_norms(*norms: float) -> Tensor:
        return torch.tensor(norms)[:, None, None] * family.deltas / family.deltas.norm(dim=(1, 2), keepdim=True)

    reason = "eps 1e-5, in float64, as its inverse asks for"
    yield Row("ace", family.name, theirs(family.deltas), by_rule("ace", family.deltas), reason)
    uneven = of_norms(0.02, 0.4, 20.0) if family.n == 3 else of_norms(0.02, 2.0)
    name = f"{family.name}, of uneven norms"
    yield Row("ace", name, theirs(uneven), by_rule("ace", uneven), f"{reason}; k_frac is density, 0.3")
    if family.is_full and family.n == 2:
        nearly = of_norms(0.1, 0.4)  # variance 0.19 of the squared mean, or 0.37 divided by N - 1
        reason = "theirs evens out earlier: its variance is divided by N - 1"
        name = f"{family.name}, of norms 0.1 and 0.4"
        yield Row("ace", name, theirs(nearly), by_rule("ace", nearly), reason, agree=False)


def mats(clone: Path, family: Family) -> Iterator[Row]:
    if not family.is_full:
        return
    lacking = (
        "utils.utils",
        "utils.checkpoint_filepaths",
        "save_metadata.save_gram_matrix",
        "save_metadata.save_fisher",
    )
    absent = ("src.inference", "src.model.utils", *(f"src.merging.{name}" for name in lacking))
    code = load(clone, "src/merging/conjugateGradient_fisherMerging.py", *absent)
    code.np = np  # comes to it through the files that are absent
    code.getDataset_fromCheckpointFilepath, code.checkEqual_dictKeys = str, lambda *_: None
    code.scale_nonDiagonalElements = lambda matrix, _: matrix  # their lambda is 1
    random = torch.Generator().manual_seed(2)
    start = torch.randn(ROWS, COLS, generator=random)
    scales = {size: torch.rand(size, generator=random) for size in (COLS, ROWS)}
    moments = [
        [x.T @ x / 400 for x in torch.randn(family.n, 400, size, generator=random) * scale]
        for size, scale in scales.items()
    ]

    def rows_of(deltas: Tensor, steps: int) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
        weights = start + deltas
        average = weights.mean(0)

        def theirs() -> Tensor:
            checkpoints = {str(i): {f"{NAME}.weight": weight} for i, weight in enumerate(weights)}
            inputs, outputs = ({str(i): {NAME: each} for i, each in enumerate(of_side)} for of_side in moments)
            arguments = (1.0, steps, "average", checkpoints, inputs, outputs, True, True, None)
            merged, _, _ = on_cpu(lambda: code.conjugateGradient_fisherMerging(*arguments))
            return merged[f"{NAME}.weight"] - average

        def ours() -> Tensor:
            def apply(step: Tensor) -> Tensor:
                return torch.stack([outputs @ step @ inputs for inputs, outputs in zip(*moments)]).sum(0)

            parts = [out @ (each - average) @ into for into, out, each in zip(*moments, weights)]
            return conjugate_gradients(apply, torch.stack(parts).sum(0), steps)

        return theirs, ours

    deltas = family.deltas.float()
    few = rows_of(20 * deltas, 10)
    yield Row("mats", family.name, *few, "10 steps from the average, their lambda 1; ours not divided by its norm")
    close = rows_of(0.1 * deltas, 100)
    reason = "100 steps; theirs stops at a residual of 1e-5 of the right-hand side, ours at 1e-6 of the average's"
    yield Row("mats", f"{family.name}, close to each other", *close, reason, agree=False)


SOURCES: dict[str, tuple[str, Callable[[Path, Family], Iterator[Row]]]] = {
    "swudi": ("WalkerWorldPeace/MLLMerging", swudi),
    "wudi": ("nathanielyvo/WUDI-Merging", wudi),
    "ortho-merge": ("Sphere-AI-Lab/OrthoMerge", ortho_merge),
    "res-merge": ("sunyd0303-cpu/ResMerge-release", res_merge),
    "dc-merge": ("Tobeginwith/DC-Merge", dc_merge),
    "core-space": ("apanariello4/core-space-merging", core_space),
    "ace": ("unravel-xu/ACE-Merging", ace),
    "mats": ("r-three/mats", mats),
}
"""By the name of its option: the repository on GitHub, and the rows it makes of a family of experts."""


def main(arguments: list[str] | None = None) -> int:
    """Print a table, and return 1 if two results differ that should not."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    for option, (repository, _) in SOURCES.items():
        parser.add_argument(f"--{option}", type=Path, metavar="CLONE", help=f"clone of github.com/{repository}")
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float32", help="what their code is given")
    chosen = vars(parser.parse_args(arguments))
    dtype = getattr(torch, chosen.pop("dtype"))
    clones = {option: clone for option in SOURCES if (clone := chosen[option.replace("-", "_")]) is not None}
    if not clones:
        parser.error("name a clone for one of the options, as --dc-merge DC-Merge")
    torch.manual_seed(0)
    experts = families(dtype)
    rows = (row for option, clone in clones.items() for family in experts for row in SOURCES[option][1](clone, family))
    return int(print_table(rows) > 0)


if __name__ == "__main__":
    sys.exit(main())
